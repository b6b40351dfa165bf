"""What `+recipe=delta` makes of two models' answers: preference pairs without a judge."""

import json
from collections.abc import Sequence
from pathlib import Path

from dpo_ref.cli.resolve import RunConfig
from dpo_ref.files.writing import write_text
from dpo_ref.generation.records import Generation, read_generations
from dpo_ref.tracking.terminal import progress, say
from dpo_ref.types import Message

AGAIN = "delete the folder, and type the command again"


def write_prompts(path: Path, config: RunConfig) -> None:
    """The training prompts of a run's data, each once, as questions (`prompts=jsonl`). Raises ValueError for rows with
    tools or template options, which a question has no place for, and for data without prompts."""
    if path.is_file():
        return
    rows = {group.asked_id: group for group in config.data(config.seed, progress).train}
    special = next((row for row in rows.values() if row.tools or row.template_options), None)
    if special is not None:
        raise ValueError(
            f"recipe=delta: {special.origin or 'a row'} offers tools or sets template options; two models are asked "
            "plain conversations here"
        )
    prompts = [row.prompt for row in rows.values() if row.prompt]
    if not prompts:
        raise ValueError("recipe=delta: the data has no prompts to be answered")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _lines([{"prompt": list(prompt)} for prompt in prompts]))


def write_pairs(path: Path, stronger: Path, weaker: Path) -> None:
    """Pairs of the answers in two folders, the stronger model's chosen. Raises ValueError where none is left."""
    chosen, rejected = (_answers(folder) for folder in (stronger, weaker))
    pairs, left_out = [], 0
    for key, better in chosen.items():
        worse = rejected.get(key)
        if worse is None or not (better.finished and worse.finished) or better.output == worse.output:
            left_out += 1
            continue
        pairs.append({"prompt": list(better.prompt), "chosen": better.output, "rejected": worse.output})
    if not pairs:
        raise ValueError(
            f"recipe=delta: none of {len(chosen):,} pairs of answers is left: they are equal, or have not ended "
            "within recipe.max_new_tokens"
        )
    write_text(path, _lines(pairs))
    say(f"{len(pairs):,} pairs in {path}; {left_out:,} left out, whose answers are equal or have not ended")


def _answers(folder: Path) -> dict[tuple[tuple[str, ...], int], Generation]:
    """The answers in a folder, by what was asked and the sample's number."""
    generations = read_generations(folder / "generations.jsonl", AGAIN)
    return {(_asked(generation.prompt), generation.sample_index): generation for generation in generations}


def _asked(prompt: Sequence[Message]) -> tuple[str, ...]:
    return tuple(json.dumps(turn, sort_keys=True) for turn in prompt)


def _lines(rows: Sequence[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
