"""Special-token strings inside users' text, encoded as the text they are.

A tokenizer finds its special tokens before anything else, wherever they stand, so a user who writes "<|im_end|>" would
end the turn. Here the words keep their place while the template writes around them, and a copy of the tokenizer that
knows its special tokens under other names encodes the result: everything else about it is the same.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from dpo_ref.data.boundary import Encoded
from dpo_ref.data.templates import ChatText, TemplateRefuses
from dpo_ref.types import Message, PromptGroup

_MARK = "\U0010fffd\U0010fffc"  # two private-use characters, which no text has in this order


def _mapped(text: str, pattern: re.Pattern[str], codes: dict[str, str]) -> str:
    return pattern.sub(lambda match: codes[match.group()], text)


class Literals:
    """Writes and encodes groups whose texts contain special tokens' strings."""

    def __init__(self, chat: ChatText) -> None:
        self.chat, self.pattern = chat, chat.special_tokens
        self._backend = chat.tokenizer.backend_tokenizer
        specials = set(chat.tokenizer.all_special_tokens)
        added = chat.tokenizer.added_tokens_decoder.items()
        self._known = {token.content: place for place, token in added if token.special or token.content in specials}
        # What stands for a literal while the template writes, and the name of a special token in the copy.
        self._stand_in = {text: f"{_MARK}L{place}{_MARK}" for text, place in self._known.items()}
        self._renamed = {text: f"{_MARK}S{place}{_MARK}" for text, place in self._known.items()}

    @cached_property
    def _copy(self) -> Any:
        """The tokenizer with its special tokens renamed; made when the first literal is met."""
        from tokenizers import Tokenizer

        content = json.loads(self._backend.to_str())
        for token in content["added_tokens"]:
            token["content"] = self._renamed.get(token["content"], token["content"])
        content |= {"post_processor": None, "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(content))

    @cached_property
    def _ids(self) -> dict[int, Any]:
        """The copy's numbers of special tokens -> the tokenizer's own."""
        return {self._copy.token_to_id(name): self._known[text] for text, name in self._renamed.items()}

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
        return _mapped(text, self.pattern, self._stand_in)

    def named(self, text: str) -> str:
        """What the template wrote, in the copy's names; the literals are text again."""
        text = _mapped(text, self.pattern, self._renamed)
        for literal, stand_in in self._stand_in.items():
            text = text.replace(stand_in, literal)
        return text

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Token ids in the tokenizer's own numbers. Raises TemplateRefuses where a literal has no other spelling."""
        encoded = self._copy.encode_batch(list(texts), add_special_tokens=False)
        if any(set(self._known.values()) & set(found.ids) for found in encoded):
            raise TemplateRefuses("contains a special token's text that this tokenizer cannot write as plain text")
        own = self._ids
        return [Encoded([own.get(token, token) for token in found.ids], found.offsets) for found in encoded]
