"""A group as the model sees it: which text is only read, and which tokens count."""

from itertools import groupby
from typing import Any, NamedTuple

from dpo_ref.types import TokenGroup


class Piece(NamedTuple):
    """A token's text, or several tokens' where one holds only part of a character, and whether it is scored."""

    text: str
    scored: bool


class Example(NamedTuple):
    """The prompt's text and, by name, the pieces of each response."""

    prompt: str
    responses: dict[str, list[Piece]]

    def rows(self) -> list[list[str]]:
        """For a table: part, text, whether it is scored; consecutive tokens alike joined."""
        found = [["prompt", self.prompt, "no"]]
        for name, pieces in self.responses.items():
            runs = groupby(pieces, key=lambda piece: piece.scored)
            found += [[name, "".join(piece.text for piece in run), "yes" if scored else "no"] for scored, run in runs]
        return found


def example_of(tokenizer: Any, group: TokenGroup) -> Example:
    """What a group's tokens say, special tokens included."""
    better = {place for place, _ in group.pairs}
    names = ["chosen" if place in better else "rejected" for place in range(len(group.response_ids))]
    if len(names) != 2 or not group.pairs:
        names = [f"response {place + 1}" for place in range(len(names))]
    masks = group.scored or [[True] * len(ids) for ids in group.response_ids]
    parts = zip(names, group.response_ids, masks, strict=True)
    return Example(
        _text(tokenizer, group.prompt_ids),
        {name: _pieces(tokenizer, group.prompt_ids[-1:], ids, mask) for name, ids, mask in parts},
    )


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _pieces(tokenizer: Any, before: list[int], ids: list[int], mask: list[bool]) -> list[Piece]:
    """What every token adds to the text; bytes of a character wait for the rest of it."""
    pieces: list[Piece] = []
    held, start = before, 0
    for place, scored in enumerate(mask):
        shown, longer = _text(tokenizer, held), _text(tokenizer, [*before, *ids[start : place + 1]])
        if longer.endswith("\N{REPLACEMENT CHARACTER}") and place + 1 < len(ids):
            continue
        pieces.append(Piece(longer[len(shown) :], scored))
        before = held = ids[place : place + 1]
        start = place + 1
    return pieces
