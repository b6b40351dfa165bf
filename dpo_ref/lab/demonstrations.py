"""Demonstrations: one writer's answers, the text that the lab's models are built from."""

import random
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Literal

from dpo_ref.lab.conversations import FAMILIES, draw_prompt
from dpo_ref.lab.gold import gold_reward
from dpo_ref.lab.preferences import check_counts, draw_prompts
from dpo_ref.lab.tasks import Split
from dpo_ref.lab.writers import STYLE_MIXES, Writer
from dpo_ref.progress import Progress, silent
from dpo_ref.types import PreferenceData, PromptGroup


def lab_sft(
    seed: int,
    progress: Progress = silent,
    *,
    num_examples: int = 16384,
    num_eval_examples: int = 512,
    num_test_prompts: int = 400,
    test_split: Literal["validation", "test"] = "test",
    competence: float = 0.45,
    styles: Literal["mixed", "clean"] = "mixed",
) -> PreferenceData:
    """Demonstrations of one writer: groups of one response, without pairs. For `objective=sft`.

    The writer is right with probability `competence`; `styles` is the mix it writes in: every style, or the clean
    ones alone (`writers.py`). `rewards` holds the gold reward of each. Prompts as in `lab`. Raises ValueError for an
    option out of range.
    """
    check_counts(num_examples=num_examples, num_eval_examples=num_eval_examples, num_test_prompts=num_test_prompts)
    if not 0 <= competence <= 1:
        raise ValueError(f"data.competence={competence}: a probability, must be in [0, 1]")
    writer = Writer(competence, STYLE_MIXES[styles])
    train = draw_demonstrations(writer, "train", random.Random(f"{seed} train demonstrations"))
    held_out = draw_demonstrations(writer, "validation", random.Random(f"{seed} eval demonstrations"))
    return PreferenceData(
        train=list(progress(islice(train, num_examples), "drawing the lab's data", num_examples)),
        eval=list(islice(held_out, num_eval_examples)),
        test_prompts=draw_prompts(test_split, num_test_prompts),
    )


def draw_demonstrations(writer: Writer, split: Split, rng: random.Random) -> Iterator[PromptGroup]:
    """An endless stream of one writer's answers; the families take turns."""
    for family in cycle(FAMILIES.values()):
        task, prompt = draw_prompt(family, split, rng)
        response = writer.respond(task, rng)
        yield PromptGroup(prompt, (response,), (), (gold_reward(task, response, True),), origin="lab_sft")
