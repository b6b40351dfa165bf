"""The lab's gold reward as a scorer. A scorer is handed generations and returns one number for each."""

from collections.abc import Sequence

from dpo_ref.generation.records import Generation
from dpo_ref.lab.gold import gold_rewards


def gold(generations: Sequence[Generation]) -> list[float]:
    """The gold reward of each answer, in [0, 1]. Raises ValueError for prompts that are not the lab's."""
    prompts = [g.prompt for g in generations]
    return gold_rewards(prompts, [g.output for g in generations], [g.finished for g in generations])
