"""Pairs with the token-length distributions of real data sets: log-normal, with a factor both responses share."""

import math
import random
from dataclasses import dataclass

from dpo_ref.types import TokenGroup


@dataclass(frozen=True, slots=True)
class Lengths:
    """Medians in tokens, standard deviations of the logarithm, and bounds."""

    prompt: tuple[int, float, int, int]
    response: tuple[int, float, int, int]


CASES = {
    "ultrafeedback": Lengths((100, 0.95, 8, 512), (220, 0.75, 4, 700)),
    "hh": Lengths((110, 0.75, 10, 600), (50, 0.80, 4, 300)),
    "tldr": Lengths((330, 0.35, 60, 512), (30, 0.30, 8, 60)),
    "long_chat": Lengths((1500, 0.30, 300, 2500), (400, 0.60, 20, 1200)),
}


def pairs(case: str, count: int, vocab: int, seed: int = 0) -> list[TokenGroup]:
    """`count` pairs of random ids from 4 up to `vocab`; every response ends with id 3."""
    rng, lengths = random.Random(f"{case} {seed}"), CASES[case]

    def draw(size: int) -> list[int]:
        return [rng.randrange(4, vocab) for _ in range(size)]

    def response_size(shared: float) -> int:
        median, sigma, low, high = lengths.response
        return max(low, min(high, round(median * shared * math.exp(rng.gauss(0, 0.6 * sigma)))))

    groups = []
    for index in range(count):
        median, sigma, low, high = lengths.prompt
        prompt = draw(max(low, min(high, round(median * math.exp(rng.gauss(0, sigma))))))
        shared = math.exp(rng.gauss(0, 0.8 * lengths.response[1]))
        responses = tuple([*draw(response_size(shared)), 3] for _ in range(2))
        groups.append(TokenGroup(index, f"{case}-{seed}-{index}", prompt, responses, (1, 1), ((0, 1),)))
    return groups
