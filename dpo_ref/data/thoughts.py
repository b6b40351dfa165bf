"""Thoughts before an answer: in keys of their own, or inside of a turn's words, between marks."""

import re
from collections.abc import Sequence

from dpo_ref.types import THOUGHTS, Message, thoughts_of

# How families write the beginning and the end of a thought.
CLOSES = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>thought": "<channel|>",
}
_OPEN, _CLOSE = (f"(?:{'|'.join(map(re.escape, marks))})" for marks in (CLOSES, CLOSES.values()))
# A thought inside of a turn's words. Where the template opens it for the assistant, the words begin within it.
_THOUGHT = re.compile(rf"\s*{_OPEN}?(.*){_CLOSE}(.*)\Z", re.DOTALL)
EMPTY_THOUGHT = re.compile(rf"{_OPEN}\s*{_CLOSE}")
_LEADING_EMPTY = re.compile(rf"\s*(?:{_OPEN}\s*)?{_CLOSE}")
LEADING_OPEN = re.compile(rf"\s*{_OPEN}")
_BEGUN = re.compile(rf"{_OPEN}(\s*)\Z")  # how a prompt ends within a thought
_ENDED = re.compile(rf"(?:{_OPEN}\s*)?{_CLOSE}\s*\Z")  # and behind one
_END_ALONE = re.compile(rf"^{_CLOSE}$", re.MULTILINE)
_TAIL = 64  # characters at the end of a prompt, where a mark may stand


def thought_and_words(text: str) -> tuple[str, str] | None:
    """A text's thought and what comes behind it; None where no thought ends in it."""
    match = _THOUGHT.match(text)
    return None if match is None else (match[1], match[2])


def thinks(turn: Message) -> bool:
    """Whether a turn begins with a thought, in a key or between marks in its words."""
    return bool(thoughts_of(turn) or (LEADING_OPEN.match(turn["content"]) and thought_and_words(turn["content"])))


def begun_thought(start: str) -> str:
    """The mark, with its blanks, by which a prompt ends within a thought; nothing where it does not."""
    match = _BEGUN.search(start[-_TAIL:])
    return match[0] if match else ""


def ended_thought(start: str) -> str:
    """What of a prompt is a thought that ends where the prompt does, an empty one; nothing where it has none."""
    match = _ENDED.search(start[-_TAIL:])
    return match[0] if match else ""


def without_empty_thought(body: str) -> str:
    """What the assistant writes, without an empty thought at its beginning."""
    match = _LEADING_EMPTY.match(body)
    return body[match.end() :] if match else body


def without_thought(turn: Message) -> Message:
    """The turn without what was thought before its words, in keys or in the words themselves: there it begins with a
    mark, or its end has a line of its own, as models write it that are begun within a thought."""
    is_thought = LEADING_OPEN.match(turn["content"]) or _END_ALONE.search(turn["content"])
    said = thought_and_words(turn["content"]) if is_thought else None
    kept: dict[str, object] = {key: value for key, value in turn.items() if key not in THOUGHTS}
    return Message(**(kept | {"content": turn["content"] if said is None else said[1].strip()}))  # pyright: ignore


def without_earlier_thoughts(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns, those of the assistant before the user's last without their thoughts."""
    asked = max((index for index, turn in enumerate(turns) if turn["role"] == "user"), default=0)
    earlier = [without_thought(turn) if turn["role"] == "assistant" else turn for turn in turns[:asked]]
    return (*earlier, *turns[asked:])
