"""From conversations to token ids: the prompt as in generation, the response exactly as the model would produce it."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from dpo_ref.data.encoding import Encoder
from dpo_ref.data.limits import POLICIES, Ids, Limits
from dpo_ref.data.templates import ChatText
from dpo_ref.data.token_groups import TokenGroups, gathered
from dpo_ref.progress import Progress, silent
from dpo_ref.types import Message, PromptGroup, TokenGroup

CHUNK = 1024  # groups handed to the tokenizer at once
UNLIMITED = 10**9  # transformers writes 10^30 where a tokenizer states no length


def length_limit(tokenizer: Any, max_length: int | None) -> int:
    """`data.max_length`, or what the tokenizer says its model takes, or 1,024 tokens where it says nothing."""
    stated = tokenizer.model_max_length
    return max_length or (stated if stated < UNLIMITED else 1024)


class Tokenised(NamedTuple):
    """Token groups in the order of their rows, and how often what happened to rows on the way."""

    groups: TokenGroups
    counts: dict[str, int]


def end_of_turn_ids(tokenizer: Any) -> set[int]:
    """Tokens that may end the assistant's turn: EOS and the special token that the template writes there."""
    return {tokenizer.eos_token_id, ChatText(tokenizer).end_id}


def encode_prompts(tokenizer: Any, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Prompts as token ids, up to where the assistant begins. Special tokens' strings in their texts are text."""
    groups = [PromptGroup(tuple(prompt), (), origin=f"prompt {place}") for place, prompt in enumerate(prompts)]
    return [ids.prompt for ids in Encoder(tokenizer).last_turns(groups)]


WRITERS = {"last": Encoder.last_turns, "all": Encoder.all_turns}


def _refuse_literals(encoder: Encoder, groups: Sequence[PromptGroup]) -> None:
    for group in groups:
        texts = " ".join((*(turn["content"] for turn in group.prompt), *group.responses))
        found = encoder.chat.special_tokens.search(texts)
        if found:
            raise ValueError(
                f"{group.origin} contains the special token {found.group()!r} in a text; "
                "data.special_tokens_in_text=text encodes it as the text it is"
            )


def _allow_literals(encoder: Encoder, groups: Sequence[PromptGroup]) -> None:
    """They are encoded as text."""


LITERALS = {"error": _refuse_literals, "text": _allow_literals}


def _token_group(number: int, group: PromptGroup, ids: Ids, score: str) -> TokenGroup:
    before = [turn["content"] for turn in group.prompt if turn["role"] == "assistant"] if score == "all" else []
    sizes = tuple(sum(len(text.encode()) for text in (*before, response)) for response in group.responses)
    scored = None if ids.scored is None else tuple(ids.scored)
    return TokenGroup(
        number, group.group_id, ids.prompt, tuple(ids.responses), sizes, group.pairs, scored, group.labels
    )


def tokenise(
    groups: Sequence[PromptGroup],
    tokenizer: Any,
    progress: Progress = silent,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
    over_length: Literal["drop", "truncate_prompt_start", "truncate_prompt_end", "truncate_response"] = "drop",
    score: Literal["last", "all"] = "last",
    special_tokens_in_text: Literal["text", "error"] = "text",
) -> Tokenised:
    """Token ids of every group under the tokenizer's chat template.

    Scored are the response's tokens and the token that ends the assistant's turn, nothing the template writes after
    it; with `score=all` those of every assistant turn, the prompt then ending before the first. Groups longer than
    `max_length` (prompt plus longest response, tokens; the tokenizer's `model_max_length` unless given), with a prompt
    longer than `max_prompt_length` or a response longer than `max_response_length` follow `over_length` (see
    `limits.py`), all responses alike; what it cannot cure is dropped. `special_tokens_in_text` says what becomes of
    special tokens' strings in users' texts: encoded as text,
    or an error. Raises ValueError for a tokenizer without EOS or chat template and for conversations that the template
    cannot write, naming the row.
    """
    encoder = Encoder(tokenizer)
    limits = Limits(
        length_limit(tokenizer, max_length), max_prompt_length, max_response_length, tokenizer.bos_token_id
    )
    fit = POLICIES[over_length](limits, encoder.counts, encoder.closing)

    def kept() -> Iterator[TokenGroup]:
        starts = range(0, len(groups), CHUNK)
        for start in progress(starts, "tokenising", len(starts)):
            chunk = [groups[place] for place in range(start, min(start + CHUNK, len(groups)))]
            LITERALS[special_tokens_in_text](encoder, chunk)
            for number, (group, ids) in enumerate(zip(chunk, WRITERS[score](encoder, chunk), strict=True), start):
                found = fit(group, ids)
                if found is not None:
                    yield _token_group(number, group, found, score)

    made = gathered(kept())
    return Tokenised(made, {"groups": len(made), **{name: count for name, count in encoder.counts.items() if count}})
