"""Which characters of a conversation are scored: the assistant's turns of `data.score`, and of each turn the thought,
the answer, or both (`data.score_thinking`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dpo_ref.data.chat_templates import ChatText
from dpo_ref.data.render_check import SENTINEL, Offer, TemplateRefuses
from dpo_ref.types import Message, PromptGroup

# A thought inside of a turn's words. Where the template opens it for the assistant, the words begin within it.
_THOUGHT = re.compile(r"\s*(?:<think>|<thinking>|\[THINK\])?(.*)(?:</think>|</thinking>|\[/THINK\])(.*)\Z", re.DOTALL)
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>|<thinking>\s*</thinking>|\[THINK\]\s*\[/THINK\]")

Name = Callable[[str], str]
Span = tuple[int, int]


def _whole(answer: int, end: int) -> Span:
    return 0, end


def _answer(answer: int, end: int) -> Span:
    return answer, end


def _thought(answer: int, end: int) -> Span:
    return 0, answer


# Of a turn whose answer begins at `answer` and that ends at `end`.
PARTS: dict[str, Callable[[int, int], Span]] = {"all": _whole, "answer": _answer, "thought": _thought}


@dataclass(frozen=True, slots=True)
class Scoring:
    """Which turns are scored, `last`: those of the response, `all`: those of the prompt as well; and what of each:
    all, answer, or thought."""

    turns: str = "last"
    part: str = "all"

    def first(self, group: PromptGroup) -> int:
        """The index of the first turn that is scored."""
        before = (index for index, turn in enumerate(group.prompt) if turn["role"] == "assistant")
        return next(before, len(group.prompt)) if self.turns == "all" else len(group.prompt)

    def is_whole(self, group: PromptGroup) -> bool:
        """Whether each response is scored from its first token to its last."""
        if self.part != "all" or self.first(group) < len(group.prompt):
            return not group.prompt
        return all(isinstance(response, str) or len(response) == 1 for response in group.responses)


def scoring(
    *, score: Literal["last", "all"] = "last", score_thinking: Literal["all", "answer", "thought"] = "all"
) -> Scoring:
    """What `tokenise` scores with these options."""
    return Scoring(score, score_thinking)


class Turns(NamedTuple):
    """A conversation's text before its first scored turn, the rest, which characters of the rest are scored, and where
    in it the assistant begins to write."""

    start: str
    body: str
    spans: list[Span]
    begins: list[int]


def scored_turns(
    chat: ChatText, turns: Sequence[Message], first: int, group: PromptGroup, scoring: Scoring, name: Name
) -> Turns:
    """Where the assistant speaks from turn `first` on; `name` is applied to all text.

    Raises TemplateRefuses for a template that writes earlier turns differently once others follow: the model would not
    have seen what the text says.
    """
    indices = [index for index, turn in enumerate(turns) if turn["role"] == "assistant" and index >= first]
    settings: dict[str, Any] = {"tools": group.tools, "options": group.template_options}
    prefixes = chat.write([turns[:index] for index in indices], start=True, **settings)
    fulls = chat.write([turns[: index + 1] for index in indices], start=False, **settings)
    raw = [chat.body(start, full) for start, full in zip(prefixes, fulls, strict=True)]
    chat.lost.check(prefixes[-1] + raw[-1], turns, 0, Offer(group.tools, group.template_options))
    starts, bodies = list(map(name, prefixes)), list(map(name, raw))
    whole = starts[-1] + bodies[-1]
    spans = []
    for place, (index, start, body) in enumerate(zip(indices, starts, bodies, strict=True)):
        if not whole.startswith(start + body):
            raise TemplateRefuses(
                f"cannot be scored with data.score={scoring.turns}: the chat template writes a turn differently once "
                f"others follow ({(start + body)[-60:]!r}); {_REMEDIES[scoring.turns]}",
                "the chat template writes earlier turns differently once others follow",
            )
        answer = 0
        if scoring.part != "all":
            at = answer_start(chat, turns[: index + 1], prefixes[place], raw[place], settings)
            answer = len(name(raw[place][:at]))
        begin, end = PARTS[scoring.part](answer, len(body))
        spans.append((len(start) - len(starts[0]) + begin, len(start) - len(starts[0]) + end))
    begins = [len(start) - len(starts[0]) for start in starts]
    return Turns(starts[0], whole[len(starts[0]) :], [span for span in spans if span[0] < span[1]], begins)


_REMEDIES = {
    "all": "use data.score=last",
    "last": "end the response with its first turn, or choose a template that keeps what was written",
}


def answer_start(chat: ChatText, turns: Sequence[Message], start: str, body: str, settings: Mapping[str, Any]) -> int:
    """Where in the text of the last turn its answer begins, behind a thought; 0 where nothing comes before it.

    That is where the template writes a sentinel in the place of the turn's words, or what comes instead of it where
    calls are all that is said.
    """
    turn = turns[-1]
    split = thought_and_words(turn["content"])
    words = turn["content"] if split is None else split[1].lstrip()
    before = turn["content"][: len(turn["content"]) - len(words)] if split else ""
    probe: Any = turn | {"content": before + SENTINEL}
    if not words.strip():  # some templates write words or calls, not both
        probe.pop("tool_calls", None)
    (full,) = chat.write([[*turns[:-1], probe]], start=False, **settings)
    other = chat.body(start, full)
    at = other.find(SENTINEL)
    same = next(
        (i for i, (a, b) in enumerate(zip(body, other[: max(at, 0)], strict=False)) if a != b), min(at, len(body))
    )
    if at < 0 or (words.strip() and same < at):
        raise TemplateRefuses(
            f"has an answer that is not found behind its thought: {words[:60]!r}; use data.score_thinking=all"
        )
    # A blank before a word is the word's own, in most tokenizers one token with it.
    return len(body[:same].rstrip(" ")) if body[:same].strip() else 0


def thought_and_words(text: str) -> tuple[str, str] | None:
    """A text's thought and what comes behind it; None where no thought ends in it."""
    match = _THOUGHT.match(text)
    return None if match is None else (match[1], match[2])


def mask_of(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens begin within a span; all in characters of the same text, both in order."""
    mask, at = [], 0
    for start, _ in offsets:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        mask.append(at < len(spans) and spans[at][0] <= start)
    return mask
