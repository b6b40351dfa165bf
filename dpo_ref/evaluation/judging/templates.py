"""What a judge is asked: messages with places for the prompt and two answers, and how its verdict is written.

A template is a YAML file; those that come with dpo_ref lie in `templates/` beside this file and are named by their
stem. Texts of prompts and answers are put in as they are and never searched for places again.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_ref.types import Message, digest

FOLDER = Path(__file__).with_name("templates")
PLACES = ("prompt", "first", "second")
_PLACE = re.compile("{(" + "|".join(PLACES) + ")}")
ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a judge names the better answer. `pattern` is a regular expression with one group, the label; its last
    match in the answer counts. Without it the answer is the label alone. `lead` is what the judge writes before it."""

    first: str
    second: str
    tie: str | None = None
    pattern: str | None = None
    lead: str = ""

    @property
    def labels(self) -> dict[str, float]:
        """Every label with the share of the win that it gives the first answer."""
        tie = {} if self.tie is None else {self.tie: 0.5}
        return {self.first: 1.0, self.second: 0.0} | tie


@dataclass(frozen=True, slots=True)
class Template:
    """Messages with the places {prompt}, {first} and {second}, and the form of the verdict."""

    name: str
    messages: tuple[Message, ...]
    verdict: Verdict

    @property
    def identity(self) -> str:
        """Digest of everything that is asked and how it is read."""
        return digest([self.messages, asdict(self.verdict)])

    def fill(self, prompt: Sequence[Message], first: str, second: str) -> tuple[Message, ...]:
        """The messages that ask which of two answers to `prompt` is better."""
        texts = {"prompt": conversation_text(prompt), "first": first, "second": second}
        return tuple(
            Message(role=turn["role"], content=_PLACE.sub(lambda match: texts[match[1]], turn["content"]))
            for turn in self.messages
        )


def conversation_text(prompt: Sequence[Message]) -> str:
    """A single user turn as it is, a longer conversation with the name of each turn's speaker before it."""
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{ROLES.get(turn['role'], turn['role'])}: {turn['content']}" for turn in prompt)


def load_template(name: str) -> Template:
    """The template of a name or in a file. Raises ValueError naming the file, the key and what belongs there."""
    own = FOLDER / f"{name}.yaml"
    path = own if own.is_file() else Path(name).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ValueError(f"judge.template={name} is no file and none of {names}")
    content = _content(path)
    _check_keys(content, {"messages", "verdict"}, str(path))
    return Template(path.stem, _messages(content, path), _verdict(content, path))


def _content(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"judge.template={path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"judge.template={path} must hold messages: and verdict:")
    return content


def _check_keys(content: Mapping[str, Any], keys: set[str], origin: str) -> None:
    if unknown := sorted(map(str, content.keys() - keys)):
        raise ValueError(f"{origin}: {', '.join(unknown)} is not known there; it may hold {', '.join(sorted(keys))}")


def _messages(content: Mapping[str, Any], path: Path) -> tuple[Message, ...]:
    turns = content.get("messages")
    fits = isinstance(turns, list) and all(
        isinstance(turn, dict)
        and turn.keys() == {"role", "content"}
        and all(isinstance(v, str) for v in turn.values())
        for turn in turns
    )
    if not fits:
        raise ValueError(f"{path}: messages must be a list of turns, each with the texts role and content")
    messages = tuple(Message(role=turn["role"], content=turn["content"]) for turn in turns)  # pyright: ignore
    missing = set(PLACES) - {place for turn in messages for place in _PLACE.findall(turn["content"])}
    if missing:
        raise ValueError(
            f"{path}: the messages have no place for {', '.join(f'{{{name}}}' for name in sorted(missing))}"
        )
    return messages


def _verdict(content: Mapping[str, Any], path: Path) -> Verdict:
    fields = content.get("verdict")
    if not isinstance(fields, dict) or not {"first", "second"} <= fields.keys():
        raise ValueError(f"{path}: verdict must hold first and second, the labels of the two answers")
    _check_keys(fields, set(Verdict.__dataclass_fields__), f"{path}: verdict")
    if not all(isinstance(value, str) for value in fields.values()):
        raise ValueError(f"{path}: verdict: labels, pattern and lead must be texts; put them in quotes")
    verdict = Verdict(**fields)
    if len(verdict.labels) < 2 + ("tie" in fields) or any(
        label != label.strip() or not label for label in verdict.labels
    ):
        raise ValueError(f"{path}: verdict: labels must differ and have no space around them")
    try:
        groups = 1 if verdict.pattern is None else re.compile(verdict.pattern).groups
    except re.error as error:
        raise ValueError(f"{path}: verdict.pattern is no regular expression: {error}") from error
    if groups != 1:
        raise ValueError(f"{path}: verdict.pattern must have one group, which matches the label, not {groups}")
    return verdict
