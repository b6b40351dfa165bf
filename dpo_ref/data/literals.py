"""Special-token strings inside users' text, encoded as the text they are.

A tokenizer finds its special tokens before anything else, wherever they stand, so a user who writes "<|im_end|>" would
end the turn. Here the words keep their place while the template writes around them, and a copy of the tokenizer that
knows its special tokens under other names encodes the result: everything else about it is the same.
"""

import json
import re
from collections.abc import Sequence

from dpo_ref.data.boundary import Encoded
from dpo_ref.data.templates import ChatText, TemplateRefuses
from dpo_ref.types import Message, PromptGroup

_STAND_IN = 0xF0000  # private-use characters: for a literal while the template writes
_RENAMED = 0x100000  # and for a special token in the copy


def _mapped(text: str, pattern: re.Pattern[str], codes: dict[str, str]) -> str:
    return pattern.sub(lambda match: codes[match.group()], text)


class Literals:
    """Writes and encodes groups whose texts contain special tokens' strings."""

    def __init__(self, chat: ChatText) -> None:
        from tokenizers import Tokenizer

        self.chat, self.pattern = chat, chat.special_tokens
        content = json.loads(chat.tokenizer.backend_tokenizer.to_str())
        specials = set(chat.tokenizer.all_special_tokens)
        renamed = [token for token in content["added_tokens"] if token["special"] or token["content"] in specials]
        texts = [token["content"] for token in renamed]
        self._stand_in = {text: chr(_STAND_IN + place) for place, text in enumerate(texts)}
        self._renamed = {text: chr(_RENAMED + place) for place, text in enumerate(texts)}
        ids = {token["content"]: token["id"] for token in renamed}
        for token in renamed:
            token["content"] = self._renamed[token["content"]]
        content |= {"post_processor": None, "truncation": None, "padding": None}
        self._copy = Tokenizer.from_str(json.dumps(content))
        self._ids = {self._copy.token_to_id(name): ids[text] for text, name in self._renamed.items()}
        self._special_ids = set(ids.values())

    def occur_in(self, group: PromptGroup) -> bool:
        """Whether a text of the group contains a special token's string."""
        texts = (*(turn["content"] for turn in group.prompt), *group.responses)
        return any(self.pattern.search(text) for text in texts)

    def hide(self, turns: Sequence[Message]) -> list[Message]:
        """The turns with every literal replaced by its stand-in."""
        return [turn | {"content": self.hidden(turn["content"])} for turn in turns]  # pyright: ignore

    def hidden(self, text: str) -> str:
        """The text with every literal replaced by its stand-in."""
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
        if any(self._special_ids & set(found.ids) for found in encoded):
            raise TemplateRefuses("contains a special token's text that this tokenizer cannot write as plain text")
        return [Encoded([self._ids.get(token, token) for token in found.ids], found.offsets) for found in encoded]
