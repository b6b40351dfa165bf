"""Generations on disk: one JSON object a line, the master from which everything else is computed again."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dpo_ref.types import Message


@dataclass(frozen=True, slots=True)
class Generation:
    """One sampled answer and how it came about.

    `token_ids` are the tokens drawn, the end token included if it was drawn; `output` is their text without it.
    `finish_reason` is "stop" for an answer that ended by itself and "length" for one that was cut.
    """

    prompt: tuple[Message, ...]
    prompt_index: int
    sample_index: int
    output: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    num_tokens: int
    num_chars: int
    seed: int
    temperature: float
    top_p: float

    @property
    def finished(self) -> bool:
        """Whether the answer ended by itself."""
        return self.finish_reason == "stop"

    @property
    def content_ids(self) -> tuple[int, ...]:
        """The tokens of the answer without the end token."""
        return self.token_ids[:-1] if self.finished else self.token_ids


def write_generations(path: Path, generations: Iterable[Generation]) -> None:
    """Replace a `.jsonl` file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    lines = (json.dumps(asdict(generation), ensure_ascii=False) + "\n" for generation in generations)
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(partial, path)


def _record(line: str, where: str) -> Generation:
    try:
        row = json.loads(line)
        values: dict[str, Any] = {f.name: row[f.name] for f in fields(Generation)}
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}); sample again with stage=generate") from error
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{where} is not a generation: it lacks {error}; sample again with stage=generate") from error
    values |= {name: tuple(values[name]) for name in ("prompt", "prompt_ids", "token_ids")}
    return Generation(**values)


def read_generations(path: Path) -> list[Generation]:
    """The generations in a file, in its order. Raises ValueError, naming the row, for what is none."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; make it with stage=generate")
    with path.open(encoding="utf-8") as file:
        return [_record(line, f"{path} row {number}") for number, line in enumerate(file, start=1)]
