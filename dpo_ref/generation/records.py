"""Generations on disk: one JSON object a line, the master from which everything else is computed again; and scores,
one number for each of them.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo_ref.distributed import ranks
from dpo_ref.files.digests import Damaged, sealed, unsealed
from dpo_ref.files.writing import write_lines
from dpo_ref.types import THOUGHTS, Message, PromptGroup, digest, words_of


@dataclass(frozen=True, slots=True)
class Generation:
    """One sampled answer and how it came about.

    `token_ids` are the tokens drawn, the end token included if it was drawn; `output` is their text without it.
    `finish_reason` is "stop" for an answer that ended by itself and "length" for one that was cut. `prompt_index`
    counts the questions of a prompt set; answers of one conversation share it, and `turn` counts them from 1. The
    prompt of a later turn holds the answers before it. `prompt_set`, `question_id` and `category` are the question
    file's own. `tokens` is "text" where a server gave text alone, so that `token_ids` are its encoding and need not
    be what was drawn. `logps` are log-probs of the tokens by the server that drew them, in nats; the end token's is
    lacking where a server leaves that token out.
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
    turn: int = 1
    prompt_set: str = ""
    question_id: int | str | None = None
    category: str = ""
    tokens: Literal["drawn", "text"] = "drawn"
    tools: tuple[dict[str, Any], ...] | None = None
    template_options: dict[str, Any] | None = None
    logps: tuple[float, ...] | None = None
    parsed: dict[str, Any] | None = None  # the answer as a message, where thought, calls and words can be told apart

    @property
    def answer(self) -> str:
        """What is said behind the thought, words and calls; all of the output where that is not told apart."""
        if self.parsed is None:
            return self.output
        said: Any = {key: value for key, value in self.parsed.items() if key not in THOUGHTS}
        return words_of(({"role": "assistant", "content": ""} | said,))

    @property
    def texts(self) -> PromptGroup:
        """What was asked, and the answer."""
        return PromptGroup(self.prompt, (self.output,), tools=self.tools, template_options=self.template_options)

    @property
    def question(self) -> str:
        """Digest of what was asked, equal for all who were asked it: their own earlier answers are left out."""
        if self.turn == 1:
            return digest(self.prompt)
        first = len(self.prompt) - 2 * (self.turn - 1)
        return digest([self.prompt[:first], [turn["content"] for turn in self.prompt[first + 1 :: 2]]])

    @property
    def finished(self) -> bool:
        """Whether the answer ended by itself."""
        return self.finish_reason == "stop"

    @property
    def content_ids(self) -> tuple[int, ...]:
        """The tokens of the answer without the end token."""
        return self.token_ids[:-1] if self.finished else self.token_ids


OPTIONAL = ("tools", "template_options", "logps", "parsed")  # left out of lines that have none


def line_of(generation: Generation) -> str:
    """A generation as one line of JSON, with its digest."""
    values = {key: value for key, value in asdict(generation).items() if key not in OPTIONAL or value is not None}
    return json.dumps(sealed(values), ensure_ascii=False) + "\n"


def write_generations(path: Path, generations: Iterable[Generation]) -> None:
    """Replace a `.jsonl` file atomically."""
    write_lines(path, map(line_of, generations))


REQUIRED = [f.name for f in fields(Generation) if f.default is MISSING]
LATER = [f.name for f in fields(Generation) if f.default is not MISSING]  # that older files lack


SAMPLE_AGAIN = "sample again with stage=generate"


def record_of(line: bytes, where: str, remedy: str = SAMPLE_AGAIN) -> Generation:
    """A line's generation. Raises Damaged, naming the row, for what is none."""
    row = unsealed(line, where, remedy)
    try:
        values: dict[str, Any] = {name: row[name] for name in REQUIRED} | {n: row[n] for n in LATER if n in row}
        values |= {name: tuple(values[name]) for name in ("prompt", "prompt_ids", "token_ids")}
        values["tools"] = tuple(values["tools"]) if values.get("tools") else None
        values["logps"] = None if values.get("logps") is None else tuple(values["logps"])
    except (KeyError, TypeError) as error:
        raise Damaged(f"{where} is not a generation: it lacks {error}", remedy) from error
    return Generation(**values)


def read_generations(path: Path, remedy: str = SAMPLE_AGAIN) -> list[Generation]:
    """The generations in a file, in its order. Raises ValueError where there is no file, and Damaged, naming the row
    and `remedy`, for what is no generation."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; make it with stage=generate")
    with path.open("rb") as file:
        return [record_of(line, f"{path} row {row_number}", remedy) for row_number, line in enumerate(file, start=1)]


class Scores(NamedTuple):
    """Under what name the numbers are reported, and the number of each generation."""

    name: str
    values: list[float]


def scored_together(scorer: Callable[[Sequence[Generation]], Scores], generations: Sequence[Generation]) -> Scores:
    """What a scorer says of all answers, of which each rank asks about its own; those to one prompt stay together."""
    prompts = list(dict.fromkeys(generation.prompt_index for generation in generations))
    own = set(prompts[ranks().index :: ranks().size])
    places = [at for at, generation in enumerate(generations) if generation.prompt_index in own]
    scores = scorer([generations[at] for at in places]) if places or ranks().size == 1 else None
    told = ranks().gather([places, None if scores is None else scores._asdict()])
    values = {at: value for ats, said in told if said for at, value in zip(ats, said["values"], strict=True)}
    name = next(said["name"] for _, said in told if said)
    return Scores(name, [values[at] for at in range(len(generations))])
