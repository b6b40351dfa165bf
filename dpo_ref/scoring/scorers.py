"""Scorers: handed generations, they return a name and one number for each, nan for an answer that nobody scored."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from dpo_ref.generation.records import Generation
from dpo_ref.lab.gold import gold_rewards


class Scores(NamedTuple):
    """Under what name the numbers are reported, and the number of each generation."""

    name: str
    values: list[float]


def gold(generations: Sequence[Generation]) -> Scores:
    """The lab's gold reward of each answer, in [0, 1]. Raises ValueError for prompts that are not the lab's."""
    prompts = [g.prompt for g in generations]
    return Scores("gold", gold_rewards(prompts, [g.output for g in generations], [g.finished for g in generations]))


def none(generations: Sequence[Generation]) -> Scores:
    """No score: lengths, KL and held-out pairs are measured, and there is no win rate."""
    return Scores("none", [math.nan] * len(generations))


def auto(generations: Sequence[Generation]) -> Scores:
    """`gold` where the prompts are the lab's, else `none`."""
    try:
        return gold(generations)
    except ValueError:
        return none(generations)
