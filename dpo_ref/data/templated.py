"""Texts that bring a chat template's turns with them: they would be written twice, or as words.

A text may speak of special tokens, which are then text. What begins or ends with one that a template writes there, or
holds the end of one turn and the beginning of the next, was written by a template already.
"""

import re
from collections.abc import Iterator, Sequence

from dpo_ref.data.render_check import TemplateRefuses
from dpo_ref.types import Message, Response, turns_of

# How turns of families begin and end, whose tokens another tokenizer does not know.
_BEGINS = re.compile(
    r"\s*(?:(?:<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>)\s*)?"
    r"(\[INST\]|<\|start_header_id\|>|<\|(?:user|system|assistant)\|>|<｜(?:User|Assistant)｜>|"
    r"(?:<\|im_start\|>|<\|start\|>|<start_of_turn>)\s*(?:system|developer|user|assistant|model)\b)"
)
_ENDS = re.compile(r"(<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|end\|>|<\|endoftext\|>|<\|end_of_text\|>|</s>)\s*\Z")
_HAS_TAG = re.compile(r"<s\b")  # of HTML, which </s> ends
_REMEDY = "give the words alone, as messages {role, content} or as text without the template's marks"


_OWN, _OTHERS = "the chat template's own turns already", "another chat template's turns"


class Templated(TemplateRefuses):
    """A text that a chat template wrote."""

    def __init__(self, turns: str, text: str, how: str, mark: str) -> None:
        super().__init__(f"carries {turns}: {text} {how} {mark!r}; {_REMEDY}", f"it carries {turns}")


class Marks:
    """What one template writes around turns: before the user's words, between them and where the assistant begins, and
    at the end of the assistant's; and the tokens that begin and end texts."""

    def __init__(self, header: str, closing: str, ending: str, bos: str, eos: str) -> None:
        self._header, self._closing, self._ending = header.strip(), closing.strip(), ending.strip()
        self._bos, self._eos = bos, eos
        first = re.match(r"<[^>]*>|\[[^\]]*\]", self._header)  # with a role behind it, it begins any turn
        begin = re.escape(first[0]) + r"\s*" if first else r"(?!)"
        self._turn = re.compile(begin + r"(?:system|developer|user|assistant|model|tool)\b")
        self._answer = re.compile(begin + r"(?:assistant|model)\b")

    def refuse(self, prompt: Sequence[Message], responses: Sequence[Response]) -> None:
        """Raise Templated for a group with such a text."""
        if prompt and prompt[-1]["role"] == "user" and self._closing:
            is_begun = prompt[-1]["content"].rstrip().endswith(self._closing)
            self._refuse_if(is_begun, "a prompt", "ends with", self._closing)
        for name, text in _texts(prompt, responses):
            self._refuse_beginning(name, text.lstrip())
            if name == "a response":
                self._refuse_end(text)
            elif self._closing.count("<") > 1:  # the end of a turn and the beginning of the next
                self._refuse_if(self._closing in text, name, "contains", self._closing)

    def _refuse_if(self, has_it: bool, name: str, how: str, mark: str) -> None:
        if has_it:
            raise Templated(_OWN, name, how, mark)

    def _refuse_beginning(self, name: str, text: str) -> None:
        if text[:1] not in ("<", "["):
            return
        if name == "a response":  # which may show what a user's turn looks like
            self._refuse_if(self._answer.match(text) is not None, name, "begins with", text.split("\n")[0][:40])
            return
        begun = text.removeprefix(self._bos).lstrip() if self._bos else text
        self._refuse_if(bool(self._header) and begun.startswith(self._header), name, "begins with", self._header)
        self._refuse_if(self._turn.match(begun) is not None, name, "begins with", begun.split("\n")[0][:40])
        if begins := _BEGINS.match(text):
            raise Templated(_OTHERS, name, "begins with", begins[1])

    def _refuse_end(self, text: str) -> None:
        end = text.rstrip()
        self._refuse_if(end.endswith(self._ending), "a response", "ends with", self._ending)
        ends = _ENDS.search(end[-32:])
        if (ends or end.endswith(self._eos)) and not (end.endswith("</s>") and _HAS_TAG.search(text)):
            raise Templated(_OTHERS, "a response", "ends with", ends[1] if ends else self._eos)


def _texts(prompt: Sequence[Message], responses: Sequence[Response]) -> Iterator[tuple[str, str]]:
    for turn in prompt:
        if turn["role"] != "tool":
            yield ("a system turn" if turn["role"] == "system" else "a prompt"), turn["content"]
    for response in responses:
        yield from (("a response", turn["content"]) for turn in turns_of(response) if turn["role"] == "assistant")
