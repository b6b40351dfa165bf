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
from dataclasses import replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from dpo_ref.data.chat_templates import ChatText, Rendered
from dpo_ref.data.render_check import RenderCheck, TemplateRefuses
from dpo_ref.data.scoring import Scoring, Turns, mask_of, scored_turns
from dpo_ref.data.thoughts import EMPTY_THOUGHT
from dpo_ref.types import PromptGroup, conversation

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


def texts_of(group: PromptGroup) -> Iterator[str]:
    """All that is said in a group."""
    for turn in group.prompt:
        yield turn["content"]
        if len(turn) > 2:
            yield from _texts([inner for key, inner in turn.items() if key not in ("role", "content")])
    for response in group.responses:
        yield from (response,) if isinstance(response, str) else _texts(response)
    yield from _texts(group.tools)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


class Names:
    """The texts of a tokenizer's added tokens by their ids, and a pattern that finds them in a text."""

    def __init__(self, of_ids: dict[int, str]) -> None:
        self.of_ids = of_ids
        texts = sorted(set(of_ids.values()), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)")


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
    def names(self) -> Names:
        """How the copy writes added tokens."""
        added: dict[int, Any] = self.chat.tokenizer.added_tokens_decoder
        return Names({id_: self._copy_names.get(token.content) or token.content for id_, token in added.items()})

    @cached_property
    def _own_ids(self) -> dict[Any, Any]:
        """The copy's ids of added tokens, special or not, -> the tokenizer's own: a new name may have moved them."""
        return {self._copy.token_to_id(name): token_id for token_id, name in self.names.of_ids.items()}

    def occur_in(self, group: PromptGroup) -> bool:
        """Whether something said in the group contains a special token's string."""
        return any(self.pattern.search(text) for text in texts_of(group))

    def hide(self, group: PromptGroup) -> PromptGroup:
        """The group with every literal replaced by its stand-in."""
        prompt, responses, tools = self._hidden([group.prompt, group.responses, group.tools])
        return replace(group, prompt=tuple(prompt), responses=tuple(responses), tools=tools)

    def _hidden(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(map(self._hidden, value))
        if isinstance(value, dict):
            return {self._hidden(key): self._hidden(inner) for key, inner in value.items()}
        if not isinstance(value, str):
            return value
        if _MARK in value:
            raise TemplateRefuses("contains U+10FFFD U+10FFFC beside a special token's text; they stand for it here")
        return _substitute(value, self.pattern, self._stand_ins)

    def plain(self, message: str) -> str:
        """A message in which literals stand as they were said."""
        for literal, stand_in in self._stand_ins.items():
            message = message.replace(repr(stand_in)[1:-1], literal).replace(stand_in, literal)
        return message

    def reveal(self, text: str) -> str:
        """What the template wrote, in the copy's names; the literals are text again."""
        text = _substitute(text, self.pattern, self._copy_names)
        for literal, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, literal)
        return text

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Token ids as the tokenizer has them. Raises TemplateRefuses where a literal has no other spelling."""
        encodings = self._copy.encode_batch(list(texts), add_special_tokens=False)
        own_ids = self._own_ids
        special = set(self._special_ids.values()) - own_ids.keys()  # ids by which the copy means them as well
        if any(special & set(encoding.ids) for encoding in encodings):
            raise TemplateRefuses("contains a special token's text that this tokenizer cannot write as plain text")
        return [
            Encoded([own_ids.get(token, token) for token in encoding.ids], encoding.offsets) for encoding in encodings
        ]


# --- groups encoded


class Ids(NamedTuple):
    """A group's token ids; `scored` marks the response tokens that count, None: all."""

    prompt: list[int]
    responses: list[list[int]]
    scored: list[list[bool]] | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(map(len, self.responses), default=0)

    def alike(self, first: int, second: int) -> bool:
        """Whether two responses are the same tokens."""
        return self.responses[first] == self.responses[second]


def _common_end(first: Sequence[int], second: Sequence[int]) -> int:
    """How many last elements two sequences share."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return next((size for size, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


Outcome = TypeVar("Outcome")


def attempted(make: Callable[[], Outcome]) -> Outcome | TemplateRefuses:
    """What `make` gives, or its refusal."""
    try:
        return make()
    except TemplateRefuses as error:
        return error


def _as_far_as(outcomes: Iterator[Any]) -> list[Any]:
    """The outcomes, the last of them a refusal if there is one."""
    found = []
    try:
        for outcome in outcomes:
            found.append(outcome)
    except TemplateRefuses as error:
        found.append(error)
    return found


class Encoder:
    """Writes groups with the chat template and encodes them; counts what was unusual."""

    def __init__(self, tokenizer: Any, check: type[RenderCheck] = RenderCheck) -> None:
        self.chat = ChatText(tokenizer, check)
        self.literals = Literals(self.chat)
        self.counts: Counter[str] = Counter()
        self._backend, self._anchor = tokenizer.backend_tokenizer, tokenizer.eos_token
        self._names = Names({token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()})
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
        """Prompts and responses. ValueError names a row that cannot be written."""
        return self.named(groups, Scoring())

    def named(self, groups: Sequence[PromptGroup], scoring: Scoring) -> list[Ids]:
        """As `outcomes`, but ValueError names the first row that cannot be written."""
        found = []
        for group, ids in zip(groups, self.outcomes(groups, scoring), strict=True):
            if isinstance(ids, TemplateRefuses):
                raise ValueError(f"{group.origin} {ids}") from ids
            found.append(ids)
        return found

    def outcomes(self, groups: Sequence[PromptGroup], scoring: Scoring) -> list[Ids | TemplateRefuses]:
        """Ids of every group, up to where its first scored turn begins and from there on, or why there are none."""
        are_whole = [scoring.is_whole(group) for group in groups]
        whole, several = (
            [group for group, is_whole in zip(groups, are_whole, strict=True) if is_whole is kind]
            for kind in (True, False)
        )
        of_kind = {True: iter(self._whole(whole)), False: iter(self._masked(several, scoring))}
        return [next(of_kind[is_whole]) for is_whole in are_whole]

    def _written(
        self, write: Callable[[PromptGroup, bool], Any], groups: Sequence[PromptGroup], have_literals: Sequence[bool]
    ) -> list[Any]:
        """What `write` makes of each group, or its refusal; apart, all in one go. As JSON, tuples are lists."""

        def attempt(item: tuple[PromptGroup, bool]) -> Any:
            outcome = attempted(lambda: write(*item))
            if not isinstance(outcome, TemplateRefuses):
                return outcome
            return {"refused": [self.literals.plain(str(outcome)), outcome.cause]}

        items, found = list(zip(groups, have_literals, strict=True)), []
        while len(found) < len(items):  # one that takes too much ends the others of its go
            found += _as_far_as(self.chat.apart(attempt, items[len(found) :]))
        return [TemplateRefuses(*value["refused"]) if isinstance(value, dict) else value for value in found]

    # Responses that are scored from end to end: the prompt and its responses, each encoded once.

    def _whole(self, groups: Sequence[PromptGroup]) -> list[Ids | TemplateRefuses]:
        have_literals = [self.literals.occur_in(group) for group in groups]
        texts = self._written(self._prompt_and_responses, groups, have_literals)
        texts = [text if isinstance(text, TemplateRefuses) else Rendered(*text) for text in texts]
        members = list(zip(texts, have_literals, strict=True))
        plain = iter(self._plain([t for t, has in members if not has and not isinstance(t, TemplateRefuses)]))
        found: list[Ids | TemplateRefuses] = []
        for text, has_literals in members:
            if isinstance(text, TemplateRefuses):
                found.append(text)
            else:
                found.append(attempted(lambda text=text: self._with_literals(text)) if has_literals else next(plain))
        return found

    def _prompt_and_responses(self, group: PromptGroup, has_literals: bool) -> Rendered:
        """What the template writes, special tokens and literals in the copy's names where there are literals."""
        self.chat.lost.check_words(self.chat.marks.refuse, group)
        if not has_literals:
            return self.chat.render(group.prompt, group.responses, group.tools, group.template_options)
        hidden, reveal = self.literals.hide(group), self.literals.reveal
        text = self.chat.render(hidden.prompt, hidden.responses, hidden.tools, hidden.template_options)
        return Rendered(reveal(text.start), [reveal(body) for body in text.bodies])

    def _plain(self, texts: Sequence[Rendered]) -> Iterator[Ids | TemplateRefuses]:
        prompts = self.ids([text.start for text in texts])
        tails = [self._tail(text.start, ids, self._names) for text, ids in zip(texts, prompts, strict=True)]
        continuations = [tail + body for (tail, _), text in zip(tails, texts, strict=True) for body in text.bodies]
        wholes = iter(self.ids(continuations))
        for text, prompt, (_, before) in zip(texts, prompts, tails, strict=True):
            self._count_thoughts(text.bodies)
            calls = [(before, next(wholes), body, self.encode, self._anchor) for body in text.bodies]
            yield attempted(lambda prompt=prompt, calls=calls: Ids(prompt, [self._response(*call) for call in calls]))

    def _tail(self, start: str, prompt: list[int], names: Names) -> tuple[str, list[int]]:
        """The end of the prompt that decides how a response is encoded, as text and ids: from the last special token
        on, because a tokenizer encodes what stands between two of them on its own."""
        marks = [match.start() for match in names.pattern.finditer(start)]
        indices = [index for index, token in enumerate(prompt) if token in names.of_ids]
        if not marks or not indices or not start.startswith(names.of_ids[prompt[indices[-1]]], marks[-1]):
            return start, prompt
        return start[marks[-1] :], prompt[indices[-1] :]

    def _response(self, before: list[int], whole: list[int], body: str, encode: Encode, anchor: str) -> list[int]:
        ids = split(before, whole)
        if ids is None:
            self.counts["merged at the boundary"] += 1
            ids = resume(before, whole, body, anchor, encode, self.decode)
        return ids

    def _count_thoughts(self, bodies: Sequence[str]) -> None:
        """Count empty thoughts; a group that has them in some responses alone teaches to think or not to."""
        empty = sum("</" in body and bool(EMPTY_THOUGHT.search(body)) for body in bodies)
        if empty:
            self.counts["responses with an empty thought (data.score_thinking=answer does not score it)"] += empty
            self.counts["groups in which some responses alone have an empty thought"] += empty < len(bodies)

    def _with_literals(self, text: Rendered) -> Ids:
        self._count_thoughts(text.bodies)
        self.counts["special tokens in a text, encoded as text"] += 1
        encode, anchor = self.literals.encode, self.literals.reveal(self._anchor)
        prompt, *wholes = (
            encoding.ids for encoding in encode([text.start, *(text.start + body for body in text.bodies)])
        )
        pairs = zip(wholes, text.bodies, strict=True)
        return Ids(prompt, [self._response(prompt, whole, body, encode, anchor) for whole, body in pairs])

    # Of others, which tokens of the text are scored.

    def _masked(self, groups: Sequence[PromptGroup], scoring: Scoring) -> list[Ids | TemplateRefuses]:
        have_literals = [self.literals.occur_in(group) for group in groups]
        texts = self._written(partial(self._turns, scoring), groups, have_literals)
        return [
            text if isinstance(text, TemplateRefuses) else attempted(lambda text=text, has=has: self._ids(text, has))
            for text, has in zip(texts, have_literals, strict=True)
        ]

    def _turns(self, scoring: Scoring, group: PromptGroup, has_literals: bool) -> list[Turns]:
        """Each response's conversation as the template writes it, what is scored marked."""
        self.chat.check_options(group.template_options)
        self.chat.lost.check_words(self.chat.marks.refuse, group)
        group, reveal = (self.literals.hide(group), self.literals.reveal) if has_literals else (group, str)
        whole = [conversation(group.prompt, response) for response in group.responses]
        return [scored_turns(self.chat, turns, scoring.first(group), group, scoring, reveal) for turns in whole]

    def _ids(self, texts: Sequence[Sequence[Any]], has_literals: bool) -> Ids:
        encode, anchor, names = self.encode, self._anchor, self._names
        if has_literals:
            self.counts["special tokens in a text, encoded as text"] += 1
            encode, anchor, names = self.literals.encode, self.literals.reveal(self._anchor), self.literals.names
        self._count_thoughts([text[1] for text in texts])
        prompt: list[int] = []
        responses, masks = [], []
        for start, body, pairs, begins in texts:
            spans = [(first, last) for first, last in pairs]  # as JSON, pairs are lists
            prompt = encode([start])[0].ids
            ids: list[int] = []
            mask: list[bool] = []
            before, known = start, prompt
            for begin, end in pairwise([*begins, len(body)]):  # generation begins a token of its own at each
                tail, known = self._tail(before, known, names)
                piece = body[begin:end]
                (whole,) = encode([tail + piece])
                found = self._response(known, whole.ids, piece, encode, anchor)
                shift = begin - len(tail)
                inside = mask_of([(first + shift, last + shift) for first, last in whole.offsets], spans)
                resolved = len(found) - _common_end(found, whole.ids)  # tokens at the boundary that are other ones
                is_scored = any(first <= begin < last for first, last in spans)
                mask += [is_scored] * resolved + inside[len(inside) - len(found) + resolved :]
                ids += found
                before, known = tail + piece, known + found
            responses.append(ids)
            masks.append(mask)
        return Ids(prompt, responses, masks)
