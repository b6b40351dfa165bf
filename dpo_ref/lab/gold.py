"""The gold reward: what a response is truly worth, computed from text alone.

    gold = 0.7 C F + 0.15 R + 0.15 E      in [0, 1];  0 where C = 0: form is worth nothing without an answer

C, correctness: 1 where the items in the response (numbers, words of the tables or spellings, whichever the
instruction asks for) are exactly those of the right answer, in its order; otherwise at most 0.4, times the share of
positions that agree out of the longer of the two. So neither repeating the answer nor listing everything pays.
F, finished: 1 where the response ended by itself (end-of-turn token), 0.5 where it ran into the length limit.
R, relevance: 1 up to 60 characters beside the items (each counted with the blank before it), falling linearly
to 0 at 200; a third of that where the response hedges ("not sure", "maybe", "perhaps", "guess").
E, ending: 1 where the response ended by itself, with a full stop, exclamation or question mark.
"""

import re
from collections.abc import Sequence

from dpo_ref.evaluation.scorers import none
from dpo_ref.generation.records import Generation, Scores
from dpo_ref.lab.conversations import FAMILIES, read_prompt
from dpo_ref.lab.tasks import Task
from dpo_ref.types import Message

FREE_CHARACTERS = 60
WORTHLESS_AT = 200
HEDGE = re.compile(r"\b(?:not sure|maybe|perhaps|guess)\b", re.IGNORECASE)


def gold_rewards(
    prompts: Sequence[Sequence[Message]], responses: Sequence[str], finished: Sequence[bool]
) -> list[float]:
    """The gold reward of each response to its prompt; `finished` says whether it ended by itself.

    Raises ValueError where the lengths differ or a prompt is none of the lab's.
    """
    if not len(prompts) == len(responses) == len(finished):
        raise ValueError(f"{len(prompts)} prompts, {len(responses)} responses, {len(finished)} values of `finished`")
    rows = zip(prompts, responses, finished, strict=True)
    return [gold_reward(read_prompt(prompt), response, ended) for prompt, response, ended in rows]


def gold_reward(task: Task, response: str, finished: bool) -> float:
    """The gold reward of one response to a task."""
    family, slots = FAMILIES[task.family], dict(task.slots)
    items = family.kind(slots).find(response)
    correctness = family.correctness(slots, items) if items else 0.0
    if correctness == 0.0:
        return 0.0
    extra = len(response) - sum(len(item) + 1 for item in items)
    relevance = (WORTHLESS_AT - extra) / (WORTHLESS_AT - FREE_CHARACTERS)
    relevance = min(1.0, max(0.0, relevance)) / (3 if HEDGE.search(response) else 1)
    ending = finished and response.rstrip().endswith((".", "!", "?"))
    return 0.7 * correctness * (1.0 if finished else 0.5) + 0.15 * relevance + 0.15 * ending


# --- as scorers


def gold(generations: Sequence[Generation]) -> Scores:
    """The lab's gold reward of each answer, in [0, 1]. Raises ValueError for prompts that are not the lab's."""
    prompts = [g.prompt for g in generations]
    return Scores("gold", gold_rewards(prompts, [g.output for g in generations], [g.finished for g in generations]))


def auto(generations: Sequence[Generation]) -> Scores:
    """`gold` where the prompts are the lab's, else `none`."""
    try:
        return gold(generations)
    except ValueError:
        return none(generations)
