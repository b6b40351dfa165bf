"""Which tokens of a group are which turn: the ids are the truth, the chat template says where its turns end.

A turn ends where the template's text of the conversation up to it ends, if the whole goes on from there; a template
that writes a turn differently once others follow is asked for the turn's words instead. What cannot be told apart is
one block. Of groups that were cut, the tokens that are left keep their turns.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from dpo_ref.data.encoding import Encoder, attempted
from dpo_ref.data.groups import TokenGroups
from dpo_ref.data.render_check import TemplateRefuses, has_words
from dpo_ref.types import Message, PromptGroup, TokenGroup, conversation

TEMPLATE, TEXT = "template", "text"  # what the template says by itself; plain text, which has no turns


class Block(NamedTuple):
    """Tokens [start, stop) of a prompt with a response behind it, and who says them: the roles of one turn, or of
    several that cannot be told apart."""

    role: str
    start: int
    stop: int


class _Ends(NamedTuple):
    """A conversation as the template writes it, and how many of its characters end with each role."""

    text: str
    ends: list[tuple[str, int]]


def blocks_of(tokenizer: Any, groups: TokenGroups) -> list[list[list[Block]]]:
    """By group and response: what the tokens of the prompt with the response are, from the first to the last."""
    writer = _Writer(Encoder(tokenizer))
    texts = [groups.text(index) for index in range(len(groups))]
    found = writer.all_ends(texts)
    return [
        [_blocks(writer, text, ends, group.prompt_ids + ids) for ends, ids in zip(of_all, group.response_ids, strict=True)]
        for text, of_all, group in zip(texts, found, groups, strict=True)
    ]
