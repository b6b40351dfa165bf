"""What the assistant writes of a turn, behind where generation begins.

Templates of models that think go on differently in generation than in a conversation that is over: generation begins
with `<think>`, or with an empty thought, and an answered turn has neither, or the thought is cut from it. What a model
writes is what counts: from where generation begins to the token that ends the turn.
"""

from dpo_ref.data.render_check import TemplateRefuses
from dpo_ref.data.thoughts import (
    CLOSES,
    LEADING_OPEN,
    begun_thought,
    ended_thought,
    thinks,
    thought_and_words,
    without_empty_thought,
)
from dpo_ref.types import Message, thoughts_of


def written_behind(start: str, full: str, turn: Message, remedy: str) -> str:
    """What the assistant writes of its turn behind `start`, where generation begins; `full` is the template's text of
    the answered conversation. Raises TemplateRefuses where the one does not lead to the other."""
    begun, ended = begun_thought(start), ended_thought(start)
    if full.startswith(start):
        return _as_it_is(full[len(start) :], begun, ended, turn, remedy)
    for mark, write in ((ended, _behind_thought), (begun, _within_thought)):
        if mark and full.startswith(start.removesuffix(mark)):
            return write(full[len(start) - len(mark) :], mark, turn, remedy)
    raise TemplateRefuses(
        "cannot be written by the chat template: it writes the prompt differently once it is answered, so the "
        f"response has no definite beginning: {start[-60:]!r} is not how {full[: len(start)][-60:]!r} goes on"
    )


def _as_it_is(written: str, begun: str, ended: str, turn: Message, remedy: str) -> str:
    """What the template writes behind the prompt. Where it knows no thoughts inside of words, it writes an empty one
    before them."""
    if begun and CLOSES[begun.strip()] not in written:
        raise _missing(remedy)
    if ended and _has_thought(turn):
        raise _unwanted(remedy)
    words = without_empty_thought(written)
    if words == written or not thinks(turn) or not LEADING_OPEN.match(words):
        return written
    return _within_thought(begun + written, begun, turn, remedy) if begun else words.lstrip()


def _has_thought(turn: Message) -> bool:
    """Whether there is a thought in the turn, also one whose beginning is not marked."""
    return bool(thoughts_of(turn) or thought_and_words(turn["content"]))


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


def _behind_thought(rest: str, mark: str, turn: Message, remedy: str) -> str:
    """The prompt has an empty thought already; the answer follows."""
    if _has_thought(turn):
        raise _unwanted(remedy)
    return without_empty_thought(rest).removeprefix(mark[len(mark.rstrip()) :])


def _within_thought(rest: str, mark: str, turn: Message, remedy: str) -> str:
    """The prompt has a thought's beginning; the thought, its end and the answer follow."""
    said = thought_and_words(turn["content"])
    thought = "\n".join(thoughts_of(turn)) or (said[0] if said else "")
    if not thought.strip():
        raise _missing(remedy)
    opened = LEADING_OPEN.match(turn["content"]) if said and not thoughts_of(turn) else None
    if opened and opened[0].strip() != mark.strip():
        raise TemplateRefuses(
            f"has a thought behind {opened[0].strip()}, and the chat template begins one with {mark.strip()}; write "
            "it so, or into reasoning_content"
        )
    rest = without_empty_thought(rest)
    if LEADING_OPEN.match(rest):  # written as well, with other blanks around its mark
        return _behind_mark(rest, mark)
    if said and rest.startswith(turn["content"]):  # words that go on from the prompt's mark
        return rest
    return _with_thought(thought, rest, mark, turn)


def _with_thought(thought: str, rest: str, mark: str, turn: Message) -> str:
    """The thought that the template leaves out, its end, and the answer `rest`."""
    said = thought_and_words(turn["content"])
    words = said[1] if said and not thoughts_of(turn) else turn["content"]
    has_both = not words.strip() and thought.strip() in rest
    if has_both or not rest.lstrip().startswith(words.strip()):
        raise TemplateRefuses(
            f"cannot be written by the chat template: it writes {rest[:60]!r} of a turn that begins within a thought, "
            f"where the answer is {words[:60]!r}"
        )
    if words == turn["content"]:
        return f"{thought.strip()}\n{CLOSES[mark.strip()]}\n\n{rest.lstrip()}"
    blanks = words[: len(words) - len(words.lstrip())]
    written = turn["content"][: len(turn["content"]) - len(words)] + blanks + rest.lstrip()
    return _behind_mark(written, mark)


def _behind_mark(text: str, mark: str) -> str:
    """A text without the mark at its beginning, if it has one, and without as many blanks as the prompt has."""
    opened = LEADING_OPEN.match(text)
    return text[opened.end() :].removeprefix(mark[len(mark.rstrip()) :]) if opened else text
