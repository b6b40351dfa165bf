"""Groups as one tokenizer writes and encodes them.

Generation starts from the prompt's ids and cannot merge backwards. So the prompt is encoded alone, and the response's
ids are what the tokenizer writes after them; where a token of the whole text straddles the boundary, the response is
encoded on its own side of it.

A tokenizer finds its special tokens before anything else, wherever they stand, so a user who writes "<|im_end|>" would
end the turn. Here the words keep their place while the template writes around them, and a copy of the tokenizer that
knows its special tokens under other names encodes the result: everything else about it is the same.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from dpo_ref.data.chat_templates import ChatText, Rendered, TemplateRefuses
from dpo_ref.types import Message, PromptGroup, conversation

# --- where a prompt's tokens end and a response's begin


class Encoded(NamedTuple):
    """A text's token ids, and the characters each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


Encode = Callable[[Sequence[str]], list[Encoded]]
Decode = Callable[[Sequence[int]], str]


def split(before: list[int], whole: list[int]) -> list[int] | None:
    """The response's ids if the whole's go on from the prompt's; None where a token straddles the boundary."""
    return whole[len(before) :] if whole[: len(before)] == before else None


def resume(before: list[int], whole: list[int], body: str, anchor: str, encode: Encode, decode: Decode) -> list[int]:
    """Ids of `body` that continue `before` and decode to the same text as `whole`.

    Tried in turn: the body encoded alone; encoded behind `anchor`, a special token, where the tokenizer puts a blank
    before whatever comes first; the whole text's ids from behind the straddling token, and what is left of that token
    character by character. Raises TemplateRefuses where none gives back the text.
    """
    text = decode(whole)
    alone, anchored = encode([body, anchor + body])
    for ids in (alone.ids, anchored.ids[1:]):
        if decode([*before, *ids]) == text:
            return ids
    length = len(decode(before))
    straddling = next(size for size in range(1, len(whole) + 1) if len(decode(whole[:size])) >= length)
    remainder = decode(whole[:straddling])[length:]
    pieces = [piece for character in remainder for piece in encode([anchor + character])[0].ids[1:]]
    ids = [*pieces, *whole[straddling:]]
    if decode([*before, *ids]) == text:
        return ids
    raise TemplateRefuses("begins in the middle of a token of this tokenizer and cannot be written on from the prompt")


# --- special-token strings inside users' text, encoded as the text they are


_MARK = "\U0010fffd\U0010fffc"  # two private-use characters, which no text has in this order


def _substitute(text: str, pattern: re.Pattern[str], codes: dict[str, str]) -> str:
    return pattern.sub(lambda match: codes[match.group()], text)


class Literals:
    """Writes and encodes groups whose texts contain special tokens' strings."""

    def __init__(self, chat: ChatText) -> None:
        self.chat, self.pattern = chat, chat.special_tokens
        self._backend = chat.tokenizer.backend_tokenizer
        specials = set(chat.tokenizer.all_special_tokens)
        added_tokens = chat.tokenizer.added_tokens_decoder.items()
        self._special_ids = {
            token.content: token_id for token_id, token in added_tokens if token.special or token.content in specials
        }
        # What stands for a literal while the template writes, and the name of a special token in the copy.
        self._stand_ins = {text: f"{_MARK}L{token_id}{_MARK}" for text, token_id in self._special_ids.items()}
        self._copy_names = {text: f"{_MARK}S{token_id}{_MARK}" for text, token_id in self._special_ids.items()}

    @cached_property
    def _copy(self) -> Any:
        """The tokenizer with its special tokens renamed; made when the first literal is met."""
        from tokenizers import Tokenizer

        content = json.loads(self._backend.to_str())
        for token in content["added_tokens"]:
            token["content"] = self._copy_names.get(token["content"], token["content"])
        content |= {"post_processor": None, "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(content))

    @cached_property
    def _own_ids(self) -> dict[int, Any]:
        """The copy's ids of special tokens -> the tokenizer's own."""
        return {self._copy.token_to_id(name): self._special_ids[text] for text, name in self._copy_names.items()}

    def occur_in(self, group: PromptGroup) -> bool:
        """Whether a text of the group contains a special token's string."""
        texts = (*(turn["content"] for turn in group.prompt), *group.responses)
        return any(self.pattern.search(text) for text in texts)

    def hide(self, turns: Sequence[Message]) -> list[Message]:
        """The turns with every literal replaced by its stand-in."""
        return [turn | {"content": self.hidden(turn["content"])} for turn in turns]  # pyright: ignore

    def hidden(self, text: str) -> str:
        """The text with every literal replaced by its stand-in."""
        if _MARK in text:
            raise TemplateRefuses("contains U+10FFFD U+10FFFC beside a special token's text; they stand for it here")
        return _substitute(text, self.pattern, self._stand_ins)

    def reveal(self, text: str) -> str:
        """What the template wrote, in the copy's names; the literals are text again."""
        text = _substitute(text, self.pattern, self._copy_names)
        for literal, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, literal)
        return text

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Token ids as the tokenizer has them. Raises TemplateRefuses where a literal has no other spelling."""
        encodings = self._copy.encode_batch(list(texts), add_special_tokens=False)
        if any(set(self._special_ids.values()) & set(encoding.ids) for encoding in encodings):
            raise TemplateRefuses("contains a special token's text that this tokenizer cannot write as plain text")
        own_ids = self._own_ids
        return [
            Encoded([own_ids.get(token, token) for token in encoding.ids], encoding.offsets) for encoding in encodings
        ]


# --- every assistant turn of a conversation scored, not the last alone: `data.score=all`


Name = Callable[[str], str]


class Turns(NamedTuple):
    """A conversation's text before its first assistant turn, the rest, and which characters of the rest are scored."""

    start: str
    body: str
    spans: list[tuple[int, int]]


def scored_turns(chat: ChatText, turns: Sequence[Message], tools: Any, name: Name) -> Turns:
    """Where the assistant speaks in the text of a conversation; `name` is applied to all text.

    Raises TemplateRefuses for a template that writes earlier turns differently once others follow.
    """
    indices = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    prefixes = chat.write([turns[:index] for index in indices], start=True, tools=tools)
    fulls = chat.write([turns[: index + 1] for index in indices], start=False, tools=tools)
    bodies = [name(chat.body(start, full)) for start, full in zip(prefixes, fulls, strict=True)]
    starts = [name(text) for text in prefixes]
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


class Ids(NamedTuple):
    """A group's token ids; `scored` marks the response tokens that count, None: all."""

    prompt: list[int]
    responses: list[list[int]]
    scored: list[list[bool]] | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(map(len, self.responses), default=0)


# --- groups encoded


def naming_row(group: PromptGroup, make: Callable[[], Any]) -> Any:
    """What `make` gives; its refusal as a ValueError that names the row."""
    try:
        return make()
    except TemplateRefuses as error:
        raise ValueError(f"{group.origin} {error}") from error


def _common_end(first: Sequence[int], second: Sequence[int]) -> int:
    """How many last elements two sequences share."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return next((size for size, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


class Encoder:
    """Writes groups with the chat template and encodes them; counts what was unusual."""

    def __init__(self, tokenizer: Any) -> None:
        self.chat = ChatText(tokenizer)
        self.literals = Literals(self.chat)
        self.counts: Counter[str] = Counter()
        self._backend, self._anchor = tokenizer.backend_tokenizer, tokenizer.eos_token
        self._added_tokens = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
        self._closings: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids and offsets of texts: exactly the special tokens that are written in them."""
        self._backend.no_truncation()
        self._backend.no_padding()
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [Encoded(encoding.ids, encoding.offsets) for encoding in encodings]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, without the offsets, which cost time."""
        self._backend.no_truncation()
        self._backend.no_padding()
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self.chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def closing(self, group: PromptGroup) -> list[int]:
        """Ids of what the template writes between the words of the prompt's last turn and the assistant's."""
        role = group.prompt[-1]["role"] if group.prompt else ""
        if role not in self._closings:
            self._closings[role] = self.ids([self.chat.closing(role)])[0] if role else []
        return self._closings[role]

    def last_turns(self, groups: Sequence[PromptGroup]) -> list[Ids]:
        """Prompts and responses, every response one assistant turn. ValueError names a row that cannot be written."""
        have_literals = [self.literals.occur_in(group) for group in groups]
        texts = [Rendered(*text) for text in self._written(self._last_turn, groups, have_literals)]
        members = list(zip(groups, texts, have_literals, strict=True))
        plain = iter(list(self._plain([(group, text) for group, text, has_literals in members if not has_literals])))
        return [
            naming_row(group, lambda text=text: self._with_literals(text)) if has_literals else next(plain)
            for group, text, has_literals in members
        ]

    def all_turns(self, groups: Sequence[PromptGroup]) -> list[Ids]:
        """Prompts up to the first assistant turn and all that follows, the assistant's turns scored."""
        have_answers = [any(turn["role"] == "assistant" for turn in group.prompt) for group in groups]
        several, single = (
            [g for g, has in zip(groups, have_answers, strict=True) if has is kind] for kind in (True, False)
        )
        have_literals = [self.literals.occur_in(group) for group in several]
        texts = zip(self._written(self._every_turn, several, have_literals), have_literals, strict=True)
        ids = iter(self.last_turns(single))
        return [
            naming_row(group, lambda: self._all_turns(*next(texts))) if has_answers else next(ids)
            for group, has_answers in zip(groups, have_answers, strict=True)
        ]

    def _written(self, write: Callable[[Any], Any], groups: Sequence[PromptGroup], flags: Sequence[bool]) -> list[Any]:
        """What `write` makes of each group and its flag, apart, all in one go. ValueError names the row."""
        outcomes = self.chat.apart(write, list(zip(groups, flags, strict=True)))
        return [naming_row(group, lambda: next(outcomes)) for group in groups]

    def _last_turn(self, item: tuple[PromptGroup, bool]) -> Rendered:
        """What the template writes, special tokens and literals in the copy's names where there are literals."""
        group, has_literals = item
        if not has_literals:
            return self.chat.render(group.prompt, group.responses, group.tools)
        hide, hidden, reveal = self.literals.hide, self.literals.hidden, self.literals.reveal
        text = self.chat.render(hide(group.prompt), [hidden(response) for response in group.responses], group.tools)
        return Rendered(reveal(text.start), [reveal(body) for body in text.bodies])

    def _plain(self, members: Sequence[tuple[PromptGroup, Rendered]]) -> Iterator[Ids]:
        texts = [text for _, text in members]
        prompts = self.ids([text.start for text in texts])
        tails = [self._tail(text.start, ids) for text, ids in zip(texts, prompts, strict=True)]
        continuations = [tail + body for (tail, _), text in zip(tails, texts, strict=True) for body in text.bodies]
        wholes = iter(self.ids(continuations))
        for (group, text), prompt, (_, before) in zip(members, prompts, tails, strict=True):
            calls = [(before, next(wholes), body, self.encode, self._anchor) for body in text.bodies]
            yield Ids(
                prompt, naming_row(group, lambda calls=calls: [self._response(*arguments) for arguments in calls])
            )

    def _tail(self, start: str, prompt: list[int]) -> tuple[str, list[int]]:
        """The end of the prompt that decides how a response is encoded, as text and ids: from the last special token
        on, because a tokenizer encodes what stands between two of them on its own."""
        marks = [match.start() for match in self.chat.added_tokens.finditer(start)]
        indices = [index for index, token in enumerate(prompt) if token in self._added_tokens]
        if not marks or not indices or not start.startswith(self._added_tokens[prompt[indices[-1]]], marks[-1]):
            return start, prompt
        return start[marks[-1] :], prompt[indices[-1] :]

    def _response(self, before: list[int], whole: list[int], body: str, encode: Encode, anchor: str) -> list[int]:
        ids = split(before, whole)
        if ids is None:
            self.counts["merged at the boundary"] += 1
            ids = resume(before, whole, body, anchor, encode, self.decode)
        return ids

    def _with_literals(self, text: Rendered) -> Ids:
        self.counts["special tokens in a text, encoded as text"] += 1
        encode, anchor = self.literals.encode, self.literals.reveal(self._anchor)
        prompt, *wholes = (
            encoding.ids for encoding in encode([text.start, *(text.start + body for body in text.bodies)])
        )
        pairs = zip(wholes, text.bodies, strict=True)
        return Ids(prompt, [self._response(prompt, whole, body, encode, anchor) for whole, body in pairs])

    def _every_turn(self, item: tuple[PromptGroup, bool]) -> list[Turns]:
        """Each response's conversation as the template writes it, every assistant turn marked."""
        group, has_literals = item
        hide, reveal = (self.literals.hide, self.literals.reveal) if has_literals else (list, str)
        conversations = [hide(conversation(group.prompt, response)) for response in group.responses]
        return [scored_turns(self.chat, turns, group.tools, reveal) for turns in conversations]

    def _all_turns(self, texts: Sequence[Sequence[Any]], has_literals: bool) -> Ids:
        encode, anchor = self.encode, self._anchor
        if has_literals:
            self.counts["special tokens in a text, encoded as text"] += 1
            encode, anchor = self.literals.encode, self.literals.reveal(self._anchor)
        prompt: list[int] = []
        responses, masks = [], []
        for start, body, spans in texts:
            text = Turns(start, body, [(begin, end) for begin, end in spans])  # as JSON, pairs are lists
            (prompt, _), whole = encode([text.start, text.start + text.body])
            spans = [(begin + len(text.start), end + len(text.start)) for begin, end in text.spans]
            responses.append(self._response(prompt, whole.ids, text.body, encode, anchor))
            mask = mask_of(whole.offsets, spans)
            changed = len(responses[-1]) - _common_end(responses[-1], whole.ids)  # where the boundary was resolved
            masks.append([True] * changed + mask[len(mask) - len(responses[-1]) + changed :])
        return Ids(prompt, responses, masks)
