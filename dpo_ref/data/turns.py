"""Which tokens of a group are which turn: the ids are the truth, the chat template says where its turns end.

A turn ends where the template's text of the conversation up to it ends, if the whole goes on from there; where a
template writes a turn differently once others follow, behind the turn's words. What cannot be told apart is one block.
The tokens that are left of a group that was cut keep their turns.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from dpo_ref.data.encoding import Decode, Encode, Encoder, attempted
from dpo_ref.data.groups import Groups
from dpo_ref.data.render_check import TemplateRefuses, has_words
from dpo_ref.types import Message, PromptGroup, conversation

# What the template says by itself; plain text, which has no turns; turns of which nothing is known.
TEMPLATE, TEXT, TURNS = "template", "text", "turns"


class Block(NamedTuple):
    """Tokens [start, stop) of a prompt with a response behind it, and who says them: the role of a turn, or those of
    several that cannot be told apart."""

    role: str
    start: int
    stop: int


Ends = list[tuple[str, int]]  # by block: who says it, and where it ends


def blocks_of(tokenizer: Any, groups: Groups) -> list[list[list[Block]]]:
    """By group and response: whose the tokens are, from the prompt's first to the response's last."""
    encoder = Encoder(tokenizer)
    texts = [groups.text(index) for index in range(len(groups))]
    found = []
    for group, text, written in zip(groups, texts, _all_written(encoder, texts), strict=True):
        encode = encoder.literals.encode if encoder.literals.occur_in(text) else encoder.encode
        of_responses = zip(written, group.response_ids, strict=True)
        found.append([_blocks(encode, encoder.decode, *one, group.prompt_ids + ids) for one, ids in of_responses])
    return found


# --- in characters


def _all_written(encoder: Encoder, texts: Sequence[PromptGroup]) -> list[list[tuple[str, Ends]]]:
    """By group and response: the template's text, and where its blocks end; of plain text nothing."""
    found = []
    try:
        for written in encoder.chat.apart(lambda text: _written(encoder, text), texts):
            found.append([(text, [(role, end) for role, end in ends]) for text, ends in written])
    except TemplateRefuses:  # one takes too long: those behind it do without as well
        pass
    return found + [[("", [(TURNS, 0)])] * len(text.responses) for text in texts[len(found) :]]


def _written(encoder: Encoder, group: PromptGroup) -> list[tuple[str, Ends]]:
    if not group.prompt:
        return [("", [(TEXT, 0)])] * len(group.responses)
    writer = _Writer(encoder, group)
    prompt, responses = writer.group.prompt, writer.group.responses
    begun = [writer.begun(prompt[: size + 1]) for size in range(len(prompt))]
    return [writer.ends(conversation(prompt, response), begun) for response in responses]


class _Writer:
    """What the template writes of one group, in the names under which it is encoded."""

    def __init__(self, encoder: Encoder, group: PromptGroup) -> None:
        self.group, self._reveal, self._chat = group, str, encoder.chat
        if encoder.literals.occur_in(group):
            self.group, self._reveal = encoder.literals.hide(group), encoder.literals.reveal
        self._mark, self._tail = self._reveal(encoder.decode([encoder.chat.end_id])), self._reveal(encoder.chat.tail)

    def begun(self, turns: Sequence[Message]) -> str:
        """The text of the first turns; nothing where the template wants more."""
        text = attempted(lambda: self._text(turns))
        return "" if isinstance(text, TemplateRefuses) else text

    def ends(self, turns: Sequence[Message], begun: Sequence[str]) -> tuple[str, Ends]:
        """A conversation's text through its last token, and where its blocks end; `begun` are the texts of the turns
        up to each of the first."""
        group = self.group
        (texts,) = self._chat.last_turns([turns], group.tools, group.template_options)
        whole = self._reveal("".join(texts))
        begun = [*begun, *(self.begun(turns[: size + 1]) for size in range(len(begun), len(turns) - 1))]
        ends: Ends = []
        roles: list[str] = []
        for turn, text in zip(turns, begun, strict=False):
            roles.append(turn["role"])
            place = ends[-1][1] if ends else 0
            end = self._end(whole, place, text, self._reveal(turn["content"]).strip())
            if end is not None:
                ends.append((_joined(roles), end))
                roles.clear()
        ends.append((_joined([*roles, turns[-1]["role"]]), len(whole)))
        return whole, [*self._said_by_template(whole, ends[0]), *ends]

    def _text(self, turns: Sequence[Message]) -> str:
        group = self.group
        (text,) = self._chat.write([turns], start=False, tools=group.tools, options=group.template_options)
        return self._reveal(text)

    def _end(self, whole: str, place: int, text: str, words: str) -> int | None:
        """Where the turn ends that begins at `place`, whose conversation up to it is `text` if it stands alone."""
        if len(text) > place and whole.startswith(text) and has_words(text[place:], words):
            return len(text)
        at = whole.find(self._mark, place)
        if at < 0 or not words or not whole[place:at].endswith(words):
            return None
        end = at + len(self._mark)
        return end + len(self._tail) * whole.startswith(self._tail, end)

    def _said_by_template(self, whole: str, first: tuple[str, int]) -> Ends:
        """What ends within the first turn: a turn that nobody but the template says."""
        role, end = first
        ended = [match.end() for match in re.finditer(re.escape(self._mark), whole[:end])]
        if len(ended) < 2 or "," in role:
            return []
        blanks = takewhile(str.isspace, whole[ended[-2] :])
        return [(TEMPLATE, ended[-2] + len(list(blanks)))]


def _joined(roles: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(roles))


# --- in tokens


def _blocks(encode: Encode, decode: Decode, text: str, ends: Ends, ids: list[int]) -> list[Block]:
    """The blocks of `ids`, which are those of the text or what is left of them."""
    (encoded,) = encode([text])
    starts = [start for start, _ in encoded.offsets]
    borders = [bisect_left(starts, end) for _, end in ends[:-1]]
    places = _places(decode, encoded.ids, ids, borders)
    blocks: list[Block] = []
    roles: list[str] = []
    place = 0
    for (role, _), at in zip(ends, places, strict=False):
        roles.append(role)
        if at is not None:
            blocks.append(Block(_joined(roles), place, at))
            roles, place = [], at
    blocks.append(Block(_joined([*roles, *(role for role, _ in ends[-1:])]), place, len(ids)))
    return [block for block in blocks if block.start < block.stop]


def _places(decode: Decode, whole: list[int], left: list[int], borders: Sequence[int]) -> list[int | None]:
    """Where the tokens of the whole before each border end in what is left of it; None where that is not known."""
    kept = _Kept(whole, left, [0, *borders])
    if kept.is_known or decode(left) != decode(whole):
        return [kept.place(border) for border in borders]
    # The same text, written in other tokens here and there.
    sizes = [len(decode(whole[:border])) for border in borders]
    return [bisect_left(range(len(left)), size, key=lambda count: len(decode(left[:count]))) for size in sizes]


class _Kept:
    """Where tokens of a whole are in what is left of it: its beginning and its end, and what may stand between."""

    def __init__(self, whole: list[int], left: list[int], borders: Sequence[int]) -> None:
        self._head, tail = common_start(whole, left), common_start(whole[::-1], left[::-1])
        self.is_known = self._head + tail >= len(left)
        if self.is_known:  # a cut between two blocks may look like one some tokens later, where both begin alike
            cuts = range(len(left) - tail, self._head + 1)
            self._head = next((border for border in borders if border in cuts), self._head)
            tail = len(left) - self._head
        self._gone, self._end = len(whole) - len(left), len(whole) - tail

    def place(self, index: int) -> int | None:
        """Where what stands before the token at `index` ends; None where that is not known."""
        if index <= self._head:
            return index
        if index >= self._end:
            return index - self._gone
        return self._head if self.is_known else None


def common_start(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many first elements two sequences share."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))
