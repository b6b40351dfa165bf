"""Best-of-n sampling: of n answers to a prompt the one that a scorer prefers."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Annotated, Any

from dpo_ref.component import LEFT_OPEN, MemberOf, component
from dpo_ref.generation.engine import Answer, Engine, Request, Sampling, check_temperatures
from dpo_ref.generation.records import Generation, Scores
from dpo_ref.generation.sampling import transformers
from dpo_ref.models.loading import Policy
from dpo_ref.types import Progress


@dataclass(frozen=True, slots=True)
class BestOf:
    """Lets `engine` draw `draws` answers and keeps the one that `scorer` prefers."""

    engine: Engine
    scorer: Callable[[Sequence[Generation]], Scores]
    draws: int

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    @property
    def sampling(self) -> Sampling:
        return self.engine.sampling

    def weights(self) -> str:
        """Digest of the policy's weights."""
        return self.engine.weights()

    def chosen(self, generations: Sequence[Generation]) -> list[Generation]:
        """The best of every sample's draws; of equal ones the first."""
        scores = self.scorer(generations)
        if any(map(math.isnan, scores.values)):
            raise ValueError(
                f"scorer {scores.name} has no number for an answer; choose with scorer@generation.scorer=..."
            )
        winners = []
        order = sorted(range(len(generations)), key=lambda index: self._sample(generations[index]))
        for (_, _, sample), members in groupby(order, key=lambda index: self._sample(generations[index])):
            best = generations[max(members, key=scores.values.__getitem__)]
            winners.append(replace(best, sample_index=sample))
        return winners

    def _sample(self, generation: Generation) -> tuple[int, int, int]:
        return generation.prompt_index, generation.turn, generation.sample_index // self.draws

    def answers(
        self, requests: Sequence[Request], skip: Set[int], progress: Progress
    ) -> Generator[Mapping[int, Answer], None, None]:
        """The engine's."""
        return self.engine.answers(requests, skip, progress)


def _check_options(best_of: int, temperature: float | list[float], **rest: Any) -> None:
    if best_of < 2:
        raise ValueError(f"generation.best_of={best_of} must be at least 2; generation=transformers draws single ones")
    check_temperatures(temperature)
    if 0 in (temperature if isinstance(temperature, list) else [temperature]):
        raise ValueError("generation.temperature=0 gives best_of equal answers; use generation=greedy for that one")


@component(check=_check_options)
def best_of(
    policy: Policy,
    *,
    scorer: Annotated[Any, MemberOf("scorer")],
    best_of: int = 4,
    temperature: float | list[float] = 1.0,
    top_p: float = 1.0,
    max_new_tokens: Annotated[int, LEFT_OPEN] = 128,
    samples_per_prompt: int = 1,
    batch_size: int = 128,
) -> Engine:
    """`samples_per_prompt` answers to every prompt, each the best of `best_of` draws by `scorer`; of equal ones the
    first. The other options are those of `transformers`.

    Such answers are no samples of the policy: their distribution is at most log n - (n - 1) / n nats away from it
    (arXiv:2401.01879). Raises ValueError where the scorer has no number for an answer.
    """
    engine = transformers(
        policy,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        samples_per_prompt=samples_per_prompt,
        batch_size=batch_size,
    )
    return BestOf(engine, scorer, best_of)
