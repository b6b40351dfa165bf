"""Thoughts before an answer: their marks in a text, and what the assistant writes where a template begins its turn
within a thought, or behind one.

Templates of models that think go on differently in generation than in a conversation that is over: generation begins
with `<think>`, or with an empty thought, and an answered turn has neither, or the thought is cut from it. What a model
writes is what counts: from where generation begins to the token that ends the turn.
"""

import re
from collections.abc import Sequence

from dpo_ref.data.render_check import TemplateRefuses
from dpo_ref.types import THOUGHTS, Message, thoughts_of

# How families write the beginning and the end of a thought.
_CLOSES = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>thought": "<channel|>",
}
_OPEN, _CLOSE = (f"(?:{'|'.join(map(re.escape, marks))})" for marks in (_CLOSES, _CLOSES.values()))
# A thought inside of a turn's words. Where the template opens it for the assistant, the words begin within it.
_THOUGHT = re.compile(rf"\s*{_OPEN}?(.*){_CLOSE}(.*)\Z", re.DOTALL)
EMPTY_THOUGHT = re.compile(rf"{_OPEN}\s*{_CLOSE}")
_LEADING_EMPTY = re.compile(rf"\s*(?:{_OPEN}\s*)?{_CLOSE}")
_LEADING_OPEN = re.compile(rf"\s*{_OPEN}")
_BEGUN = re.compile(rf"{_OPEN}(\s*)\Z")  # how a prompt ends within a thought
_ENDED = re.compile(rf"(?:{_OPEN}\s*)?{_CLOSE}\s*\Z")  # and behind one
_TAIL = 64  # characters at the end of a prompt, where a mark may stand


def thought_and_words(text: str) -> tuple[str, str] | None:
    """A text's thought and what comes behind it; None where no thought ends in it."""
    match = _THOUGHT.match(text)
    return None if match is None else (match[1], match[2])


def begun_thought(start: str) -> str:
    """The mark by which a prompt ends within a thought; nothing where it does not."""
    match = _BEGUN.search(start[-_TAIL:])
    return match[0] if match else ""


def without_empty_thought(body: str) -> str:
    """What the assistant writes, without an empty thought at its beginning."""
    match = _LEADING_EMPTY.match(body)
    return body[match.end() :] if match else body


def without_thought(turn: Message) -> Message:
    """The turn without what was thought before its words, in keys or in the words themselves."""
    said = thought_and_words(turn["content"])
    kept: dict[str, object] = {key: value for key, value in turn.items() if key not in THOUGHTS}
    return Message(**(kept | {"content": turn["content"] if said is None else said[1].strip()}))  # pyright: ignore


def without_earlier_thoughts(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns, those of the assistant before the user's last without their thoughts."""
    asked = max((index for index, turn in enumerate(turns) if turn["role"] == "user"), default=0)
    earlier = [without_thought(turn) if turn["role"] == "assistant" else turn for turn in turns[:asked]]
    return (*earlier, *turns[asked:])


def written_behind(start: str, full: str, turn: Message, remedy: str) -> str:
    """What the assistant writes of its turn behind `start`, where generation begins; `full` is the template's text of
    the answered conversation. Raises TemplateRefuses where the one does not lead to the other."""
    if full.startswith(start):
        written, begun = full[len(start) :], begun_thought(start)
        if begun and _CLOSES[begun.strip()] not in written:
            raise _missing(remedy)
        if _thinks(turn) and _ENDED.search(start, max(0, len(start) - _TAIL)):
            raise _unwanted(remedy)
        return written
    for mark, write in ((_ENDED, _behind_thought), (_BEGUN, _within_thought)):
        match = mark.search(start, max(0, len(start) - _TAIL))
        if match and full.startswith(start[: match.start()]):
            return write(full[match.start() :], match[0], turn, remedy)
    raise TemplateRefuses(
        "cannot be written by the chat template: it writes the prompt differently once it is answered, so the "
        f"response has no definite beginning: {start[-60:]!r} is not how {full[: len(start)][-60:]!r} goes on"
    )


class ThoughtMissing(TemplateRefuses):
    """A turn without a thought where the template begins it within one, or the other way round."""


def _missing(remedy: str) -> ThoughtMissing:
    return ThoughtMissing(
        f"has no thought, and the chat template begins the assistant's turn within one{remedy}",
        "no thought where the chat template begins within one",
    )


def _unwanted(remedy: str) -> ThoughtMissing:
    return ThoughtMissing(
        f"has a thought, and the chat template begins the assistant's turn behind an empty one{remedy}",
        "a thought where the chat template begins behind an empty one",
    )


def _thinks(turn: Message) -> bool:
    return bool(thoughts_of(turn) or (_LEADING_OPEN.match(turn["content"]) and thought_and_words(turn["content"])))


def _behind_thought(rest: str, mark: str, turn: Message, remedy: str) -> str:
    """The prompt has an empty thought already; the answer follows."""
    if _thinks(turn):
        raise _unwanted(remedy)
    return without_empty_thought(rest).removeprefix(mark[len(mark.rstrip()) :])


def _within_thought(rest: str, mark: str, turn: Message, remedy: str) -> str:
    """The prompt has a thought's beginning; the thought, its end and the answer follow."""
    said = thought_and_words(turn["content"])
    thought = "\n".join(thoughts_of(turn)) or (said[0] if said else "")
    if not thought.strip():
        raise _missing(remedy)
    rest = without_empty_thought(rest)
    if _LEADING_OPEN.match(rest):  # written as well, with other blanks around its mark
        return _behind_mark(rest, mark)
    if said and rest.startswith(turn["content"]):  # words that go on from the prompt's mark
        return rest
    words = said[1] if said and not thoughts_of(turn) else turn["content"]
    if not rest.lstrip().startswith(words.strip()):
        raise TemplateRefuses(
            f"cannot be written by the chat template: it writes {rest[:60]!r} of a turn that begins within a thought, "
            f"where the answer is {words[:60]!r}"
        )
    if words == turn["content"]:
        return f"{thought.strip()}\n{_CLOSES[mark.strip()]}\n\n{rest.lstrip()}"
    blanks = words[: len(words) - len(words.lstrip())]
    written = turn["content"][: len(turn["content"]) - len(words)] + blanks + rest.lstrip()
    return _behind_mark(written, mark)


def _behind_mark(text: str, mark: str) -> str:
    """A text without the mark at its beginning, if it has one, and without as many blanks as the prompt has."""
    opened = _LEADING_OPEN.match(text)
    return text[opened.end() :].removeprefix(mark[len(mark.rstrip()) :]) if opened else text
