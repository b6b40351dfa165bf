"""Where a prompt's tokens end and a response's begin.

Generation starts from the prompt's ids and cannot merge backwards. So the prompt is encoded alone, and the response's
ids are what the tokenizer writes after them; where a token of the whole text straddles the boundary, the response is
encoded on its own side of it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dpo_ref.data.templates import TemplateRefuses


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
    for found in (alone.ids, anchored.ids[1:]):
        if decode([*before, *found]) == text:
            return found
    seen = len(decode(before))
    straddling = next(place for place in range(1, len(whole) + 1) if len(decode(whole[:place])) >= seen)
    missing = decode(whole[:straddling])[seen:]
    pieces = [piece for character in missing for piece in encode([anchor + character])[0].ids[1:]]
    found = [*pieces, *whole[straddling:]]
    if decode([*before, *found]) == text:
        return found
    raise TemplateRefuses("begins in the middle of a token of this tokenizer and cannot be written on from the prompt")
