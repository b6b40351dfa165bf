"""From the rewards of a prompt's samples to what is trained on: a pair, the best one, or all with advantages.

Rewards may have any scale. Pure functions; what is left to chance comes from the generator handed over.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import NamedTuple


class Picked(NamedTuple):
    """The samples kept of a prompt, in the order of the group's responses, and what is said about them."""

    places: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    advantages: tuple[float, ...] | None = None


Grouping = Callable[[Sequence[float], random.Random], Picked | None]


def _pair(better: int, worse: int) -> Picked:
    return Picked((better, worse), ((0, 1),))


def best_vs_worst(rewards: Sequence[float], chance: random.Random) -> Picked | None:
    """The sample of highest reward over the one of lowest, the first of equals; None if all are equal."""
    better, worse = rewards.index(max(rewards)), rewards.index(min(rewards))
    return None if rewards[better] == rewards[worse] else _pair(better, worse)


def random_two(rewards: Sequence[float], chance: random.Random) -> Picked | None:
    """Two samples at random, in the order of their rewards; None if these are equal."""
    first, other = chance.sample(range(len(rewards)), 2)
    if rewards[first] == rewards[other]:
        return None
    return _pair(first, other) if rewards[first] > rewards[other] else _pair(other, first)


def bradley_terry(rewards: Sequence[float], chance: random.Random, scale: float = 1.0) -> Picked:
    """Two samples at random; the first is preferred with probability sigmoid(scale (r_1 - r_2)) (Bradley and Terry
    1952), so that equal rewards are a coin flip."""
    first, other = chance.sample(range(len(rewards)), 2)
    first_wins = chance.random() < 0.5 * (1 + math.tanh(scale * (rewards[first] - rewards[other]) / 2))
    return _pair(first, other) if first_wins else _pair(other, first)


def best_of_n(rewards: Sequence[float], chance: random.Random) -> Picked:
    """The sample of highest reward alone, the first of equals (RAFT, arXiv:2304.06767)."""
    return Picked((rewards.index(max(rewards)),))


def none(rewards: Sequence[float]) -> list[float]:
    """The rewards themselves."""
    return list(rewards)


def group_mean(rewards: Sequence[float]) -> list[float]:
    """Reward less the mean reward of the prompt's samples."""
    mean = fmean(rewards)
    return [reward - mean for reward in rewards]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Reward less the mean reward of the prompt's other samples, an unbiased baseline (RLOO, arXiv:2402.14740)."""
    total, others = math.fsum(rewards), len(rewards) - 1
    return [reward - (total - reward) / others for reward in rewards]


def group_standardised(rewards: Sequence[float]) -> list[float]:
    """Reward less the mean, over the standard deviation (of k - 1) of the prompt's samples, as in GRPO
    (arXiv:2402.03300, section 4.1.2); 0 where all rewards are equal."""
    spread = stdev(rewards)
    return [value / spread if spread else 0.0 for value in group_mean(rewards)]


PAIRS: dict[str, Grouping] = {f.__name__: f for f in (best_vs_worst, random_two, bradley_terry)}
ADVANTAGES = {f.__name__: f for f in (none, group_mean, leave_one_out, group_standardised)}


def _with_advantages(
    rewards: Sequence[float], chance: random.Random, advantage: Callable[[Sequence[float]], list[float]]
) -> Picked:
    return Picked(tuple(range(len(rewards))), advantages=tuple(advantage(rewards)))


def all_with(advantage: str) -> Grouping:
    """Every sample, with the advantage of this name."""
    return partial(_with_advantages, advantage=ADVANTAGES[advantage])
