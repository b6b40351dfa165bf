"""Every assistant turn of a conversation scored, not the last alone: `data.score=all`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dpo_ref.data.templates import ChatText, TemplateRefuses
from dpo_ref.types import Message

Name = Callable[[str], str]


class Turns(NamedTuple):
    """A conversation's text before its first assistant turn, the rest, and which characters of the rest are scored."""

    start: str
    body: str
    spans: list[tuple[int, int]]


def scored_turns(chat: ChatText, turns: Sequence[Message], tools: Any, name: Name) -> Turns:
    """Where the assistant speaks in the text of a conversation; `name` is applied to all text (see `literals.py`).

    Raises TemplateRefuses for a template that writes earlier turns differently once others follow.
    """
    places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    written = chat.write([turns[:place] for place in places], start=True, tools=tools)
    answered = chat.write([turns[: place + 1] for place in places], start=False, tools=tools)
    bodies = [name(chat.body(start, full)) for start, full in zip(written, answered, strict=True)]
    starts = [name(text) for text in written]
    whole = starts[-1] + bodies[-1]
    for start, body in zip(starts, bodies, strict=True):
        if not whole.startswith(start + body):
            raise TemplateRefuses(
                "cannot be scored with data.score=all: the chat template writes a turn differently once others follow "
                f"({(start + body)[-60:]!r}); use data.score=last"
            )
    first = len(starts[0])
    spans = [(len(start) - first, len(start) + len(body) - first) for start, body in zip(starts, bodies, strict=True)]
    return Turns(starts[0], whole[first:], spans)


def mask_of(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens begin within a span; all in characters of the same text."""
    return [any(begin <= start < end for begin, end in spans) for start, _ in offsets]
