"""Groups as one tokenizer writes and encodes them."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dpo_ref.data.boundary import Encode, Encoded, resume, split
from dpo_ref.data.limits import Ids
from dpo_ref.data.literals import Literals
from dpo_ref.data.templates import ChatText, TemplateRefuses
from dpo_ref.data.turns import mask_of, scored_turns
from dpo_ref.types import PromptGroup, conversation


def named(group: PromptGroup, make: Callable[[], Any]) -> Any:
    """What `make` gives; its refusal as a ValueError that names the row."""
    try:
        return make()
    except TemplateRefuses as error:
        raise ValueError(f"{group.origin} {error}") from error


def _common_end(one: Sequence[int], other: Sequence[int]) -> int:
    """How many last elements two sequences share."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((size for size, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class Encoder:
    """Writes groups with the chat template and encodes them; counts what was unusual."""

    def __init__(self, tokenizer: Any) -> None:
        self.chat = ChatText(tokenizer)
        self.literals = Literals(self.chat)
        self.counts: Counter[str] = Counter()
        self._backend, self._anchor = tokenizer.backend_tokenizer, tokenizer.eos_token
        self._added = {place: token.content for place, token in tokenizer.added_tokens_decoder.items()}
        self._closings: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids and offsets of texts: exactly the special tokens that are written in them."""
        self._backend.no_truncation()
        self._backend.no_padding()
        found = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [Encoded(one.ids, one.offsets) for one in found]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts, without the offsets, which cost time."""
        self._backend.no_truncation()
        self._backend.no_padding()
        return [one.ids for one in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

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
        plain = [place for place, group in enumerate(groups) if not self.literals.occur_in(group)]
        found = dict(zip(plain, self._plain([groups[place] for place in plain]), strict=True))
        return [
            found[place] if place in found else named(group, lambda g=group: self._with_literals(g))
            for place, group in enumerate(groups)
        ]

    def all_turns(self, groups: Sequence[PromptGroup]) -> list[Ids]:
        """Prompts up to the first assistant turn and all that follows, the assistant's turns scored."""
        several = [any(turn["role"] == "assistant" for turn in group.prompt) for group in groups]
        single = iter(self.last_turns([g for g, many in zip(groups, several, strict=True) if not many]))
        return [
            named(group, lambda g=group: self._all_turns(g)) if many else next(single)
            for group, many in zip(groups, several, strict=True)
        ]

    def _plain(self, groups: Sequence[PromptGroup]) -> Iterator[Ids]:
        written = [named(group, lambda g=group: self.chat.render(g.prompt, g.responses, g.tools)) for group in groups]
        prompts = self.ids([text.start for text in written])
        tails = [self._tail(text.start, ids) for text, ids in zip(written, prompts, strict=True)]
        rest = [tail + body for (tail, _), text in zip(tails, written, strict=True) for body in text.bodies]
        wholes = iter(self.ids(rest))
        for group, prompt, (_, before), text in zip(groups, prompts, tails, written, strict=True):
            found = [(before, next(wholes), body, self.encode, self._anchor) for body in text.bodies]
            yield Ids(prompt, named(group, lambda found=found: [self._response(*one) for one in found]))

    def _tail(self, start: str, prompt: list[int]) -> tuple[str, list[int]]:
        """The end of the prompt that decides how a response is encoded, as text and ids: from the last special token
        on, because a tokenizer encodes what stands between two of them on its own."""
        written = [match.start() for match in self.chat.added_tokens.finditer(start)]
        places = [place for place, token in enumerate(prompt) if token in self._added]
        if not written or not places or not start.startswith(self._added[prompt[places[-1]]], written[-1]):
            return start, prompt
        return start[written[-1] :], prompt[places[-1] :]

    def _response(self, before: list[int], whole: list[int], body: str, encode: Encode, anchor: str) -> list[int]:
        found = split(before, whole)
        if found is None:
            self.counts["merged at the boundary"] += 1
            found = resume(before, whole, body, anchor, encode, self.decode)
        return found

    def _with_literals(self, group: PromptGroup) -> Ids:
        self.counts["special tokens in a text, encoded as text"] += 1
        hide, name, encode = self.literals.hide, self.literals.named, self.literals.encode
        text = self.chat.render(hide(group.prompt), [self.literals.hidden(r) for r in group.responses], group.tools)
        start, bodies = name(text.start), [name(body) for body in text.bodies]
        prompt, *wholes = (found.ids for found in encode([start, *(start + body for body in bodies)]))
        pairs, anchor = zip(wholes, bodies, strict=True), name(self._anchor)
        return Ids(prompt, [self._response(prompt, whole, body, encode, anchor) for whole, body in pairs])

    def _all_turns(self, group: PromptGroup) -> Ids:
        hide, name, encode = list, str, self.encode
        if self.literals.occur_in(group):
            self.counts["special tokens in a text, encoded as text"] += 1
            hide, name, encode = self.literals.hide, self.literals.named, self.literals.encode
        prompt: list[int] = []
        responses, masks = [], []
        for response in group.responses:
            text = scored_turns(self.chat, hide(conversation(group.prompt, response)), group.tools, name)
            (prompt, _), whole = encode([text.start, text.start + text.body])
            spans = [(begin + len(text.start), end + len(text.start)) for begin, end in text.spans]
            responses.append(self._response(prompt, whole.ids, text.body, encode, name(self._anchor)))
            mask = mask_of(whole.offsets, spans)
            changed = len(responses[-1]) - _common_end(responses[-1], whole.ids)  # where the boundary was resolved
            masks.append([True] * changed + mask[len(mask) - len(responses[-1]) + changed :])
        return Ids(prompt, responses, masks)
