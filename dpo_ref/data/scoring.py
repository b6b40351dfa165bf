"""Which characters of a conversation are scored: the assistant's turns of `data.score`, and of each turn the thought,
the answer, or both (`data.score_thinking`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dpo_ref.data.chat_templates import ChatText
from dpo_ref.data.render_check import SENTINEL, Offer, TemplateRefuses
from dpo_ref.data.thoughts import thought_and_words, without_empty_thought
from dpo_ref.types import Message, PromptGroup

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
    have seen what the text says. An empty thought that a template writes in a last turn alone may go.
    """
    indices = [index for index, turn in enumerate(turns) if turn["role"] == "assistant" and index >= first]
    conversation = _Conversation(chat, turns, indices, group, scoring)
    places = conversation.places
    whole = conversation.text
    start, body, spans, begins, at = name(whole[: places[0].begin]), "", [], [], places[0].begin
    for place in places:
        body += name(whole[at : place.begin])
        begins.append(len(body))
        answer, end = (len(name(whole[place.begin : place.begin + size])) for size in (place.answer, place.size))
        span_begin, span_end = PARTS[scoring.part](answer, end)
        spans.append((len(body) + span_begin, len(body) + span_end))
        body, at = body + name(whole[place.begin : place.begin + place.size]), place.begin + place.size
    return Turns(start, body, [span for span in spans if span[0] < span[1]], begins)


class _Place(NamedTuple):
    """Where in a conversation's text the assistant begins a turn, how many characters it writes, and behind how many
    of them the answer begins."""

    begin: int
    size: int
    answer: int


class _Window(NamedTuple):
    """A turn behind some of those before it: the index of the first that is scored, the turns, the template's text up
    to where that one begins and up to where this one does, and what the assistant writes of this one."""

    first: int
    before: list[Message]
    begin: str
    start: str
    body: str


_NEAR = 8  # turns before one of a long conversation that are written with it


class _Conversation:
    """A conversation that ends with a turn of the assistant, and where in its text the assistant writes.

    What generation sees of a turn is the template's text of all turns before it. Writing that for each of many turns
    would take the square of their number: behind the first few a turn is written with those near it alone, behind a
    question of the user, and has to be in the text as it is there; where it is not, all turns before it are written.
    """

    def __init__(
        self, chat: ChatText, turns: Sequence[Message], indices: Sequence[int], group: PromptGroup, scoring: Scoring
    ) -> None:
        self._chat, self._turns, self._scoring = chat, turns[: indices[-1] + 1], scoring
        self._settings: dict[str, Any] = {"tools": group.tools, "options": group.template_options}
        is_system = [turn["role"] == "system" for turn in turns]
        self._system = list(turns[: is_system.index(False)])
        first = [index for index in indices if index <= _NEAR or index == indices[-1]]
        written = chat.last_turns([turns[: index + 1] for index in first], **self._settings)
        self.text = "".join(written[-1])
        chat.lost.check(self.text, self._turns, 0, Offer(group.tools, group.template_options))
        self._written = dict(zip(first, written, strict=True))
        self._windows = self._near([index for index in indices if index not in self._written], indices)
        self._known: dict[int, _Place] = {}
        for index in indices:
            self._known[index] = self._as_near(index) or self._exact(index)

    @property
    def places(self) -> list[_Place]:
        """Of the turns that were asked for, in order."""
        return list(self._known.values())

    def _exact(self, index: int) -> _Place:
        """The place of a turn that is written with all before it."""
        before = self._turns[:index]
        if index not in self._written:
            (self._written[index],) = self._chat.last_turns([self._turns[: index + 1]], **self._settings)
        start, body = self._written[index]
        place = self._at(start, len(start), body, before, index) if self.text.startswith(start) else None
        if place is None:
            raise TemplateRefuses(
                f"cannot be scored with data.score={self._scoring.turns}: the chat template writes a turn differently "
                f"once others follow ({(start + body)[-60:]!r}); {_REMEDIES[self._scoring.turns]}",
                "the chat template writes earlier turns differently once others follow",
            )
        return place

    def _near(self, later: Sequence[int], indices: Sequence[int]) -> dict[int, _Window]:
        """Turns written behind those near them, as far as the template does so."""
        firsts = [next(known for known in indices if known >= index - _NEAR) for index in later]
        asked = [
            next((i for i in range(first - 1, -1, -1) if self._turns[i]["role"] == "user"), None) for first in firsts
        ]
        parts = {
            index: (first, [*self._system, self._turns[question]])
            for index, first, question in zip(later, firsts, asked, strict=True)
            if first < index and question is not None
        }
        befores = [[*question, *self._turns[first:index]] for index, (first, question) in parts.items()]
        windows = [[*before, self._turns[index]] for before, index in zip(befores, parts, strict=True)]
        try:
            begins = self._chat.write([question for _, question in parts.values()], start=True, **self._settings)
            written = self._chat.last_turns(windows, **self._settings)
        except TemplateRefuses:
            return {}
        items = zip(parts.items(), befores, begins, written, strict=True)
        return {index: _Window(first, before, begin, *texts) for (index, (first, _)), before, begin, texts in items}

    def _as_near(self, index: int) -> _Place | None:
        """The place of a turn that the text has as it is written behind those near it; None where it has not."""
        if index not in self._windows:
            return None
        window = self._windows[index]
        between, known = window.start[len(window.begin) :], self._known[window.first].begin
        if not window.start.startswith(window.begin) or not self.text.startswith(between, known):
            return None
        return self._at(window.start, known + len(between), window.body, window.before, index)

    def _at(self, start: str, begin: int, body: str, before: Sequence[Message], index: int) -> _Place | None:
        """The place of a turn that begins there, if the text has it; `start` and `body` are how it is written behind
        `before`."""
        size = len(body) if self.text.startswith(body, begin) else self._without_empty_thought(begin, body)
        if size is None or self._scoring.part == "all":
            return None if size is None else _Place(begin, size, 0)
        answer = answer_start(self._chat, [*before, self._turns[index]], start, body, self._settings)
        return _Place(begin, size, max(0, size - len(body) + answer))

    def _without_empty_thought(self, begin: int, body: str) -> int | None:
        """How many characters the turn has, if the text has it without the empty thought that it begins with."""
        words = without_empty_thought(body).lstrip()
        at = begin
        while self.text[at : at + 1].isspace():
            at += 1
        has_it = words != body.lstrip() and self.text.startswith(words, at)
        return at + len(words) - begin if has_it else None


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
    other = chat.body(start, full, probe)
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


def mask_of(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens begin within a span; all in characters of the same text, both in order."""
    mask, at = [], 0
    for start, _ in offsets:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        mask.append(at < len(spans) and spans[at][0] <= start)
    return mask
