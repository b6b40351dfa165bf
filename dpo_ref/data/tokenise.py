"""From conversations to token ids: the prompt as in generation, the response exactly as the model would produce it.

What becomes of groups that are too long is one policy for all responses of a group alike, everything counted.
Tokenised groups are kept between runs, named by the texts, the tokenizer with its template, and the options.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo_ref.data.chat_templates import ChatText
from dpo_ref.data.encoding import Encoder, Ids
from dpo_ref.data.groups import StoredGroups, TokenGroups, from_groups, whole_id
from dpo_ref.files.cache import in_use, is_kept
from dpo_ref.types import Message, Progress, PromptGroup, TokenGroup, digest, silent

# --- tokenising


CHUNK = 1024  # groups handed to the tokenizer at once
UNLIMITED = 10**9  # transformers writes 10^30 where a tokenizer states no length


def length_limit(tokenizer: Any, max_length: int | None) -> int:
    """`data.max_length`, or what the tokenizer says its model takes, or 1,024 tokens where it says nothing."""
    stated_length = tokenizer.model_max_length
    return max_length or (stated_length if stated_length < UNLIMITED else 1024)


class Tokenised(NamedTuple):
    """Token groups in the order of their rows, and how often what happened to rows on the way."""

    groups: TokenGroups
    counts: dict[str, int]


def end_of_turn_ids(tokenizer: Any) -> set[int]:
    """Tokens that may end the assistant's turn: EOS and the special token that the template writes there."""
    return {tokenizer.eos_token_id, ChatText(tokenizer).end_id}


def encode_prompts(tokenizer: Any, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Prompts as token ids, up to where the assistant begins. Special tokens' strings in their texts are text."""
    groups = [PromptGroup(tuple(prompt), (), origin=f"prompt {index}") for index, prompt in enumerate(prompts)]
    return [ids.prompt for ids in Encoder(tokenizer).last_turns(groups)]


WRITERS = {"last": Encoder.last_turns, "all": Encoder.all_turns}


def _refuse_literals(encoder: Encoder, groups: Sequence[PromptGroup]) -> None:
    for group in groups:
        texts = " ".join((*(turn["content"] for turn in group.prompt), *group.responses))
        match = encoder.chat.special_tokens.search(texts)
        if match:
            raise ValueError(
                f"{group.origin} contains the special token {match.group()!r} in a text; "
                "data.special_tokens_in_text=text encodes it as the text it is"
            )


def _allow_literals(encoder: Encoder, groups: Sequence[PromptGroup]) -> None:
    """They are encoded as text."""


LITERALS = {"error": _refuse_literals, "text": _allow_literals}


def _token_group(index: int, group: PromptGroup, ids: Ids, score: str) -> TokenGroup:
    before = [turn["content"] for turn in group.prompt if turn["role"] == "assistant"] if score == "all" else []
    sizes = tuple(sum(len(text.encode()) for text in (*before, response)) for response in group.responses)
    scored = None if ids.scored is None else tuple(ids.scored)
    return TokenGroup(
        index, group.group_id, ids.prompt, tuple(ids.responses), sizes, group.pairs, scored, group.labels
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
    `POLICIES`), all responses alike; what it cannot cure is dropped. `special_tokens_in_text` says what becomes of
    special tokens' strings in users' texts: encoded as text,
    or an error. Raises ValueError for a tokenizer without EOS or chat template and for conversations that the template
    cannot write, naming the row.
    """
    encoder = Encoder(tokenizer)
    limits = Limits(
        length_limit(tokenizer, max_length), max_prompt_length, max_response_length, tokenizer.bos_token_id
    )
    fit = POLICIES[over_length](limits, encoder.counts, encoder.closing)

    def fitting_groups() -> Iterator[TokenGroup]:
        starts = range(0, len(groups), CHUNK)
        for start in progress(starts, "tokenising", len(starts)):
            chunk = [groups[index] for index in range(start, min(start + CHUNK, len(groups)))]
            LITERALS[special_tokens_in_text](encoder, chunk)
            for index, (group, whole) in enumerate(zip(chunk, WRITERS[score](encoder, chunk), strict=True), start):
                ids = fit(group, whole)
                if ids is not None:
                    yield _token_group(index, group, ids, score)

    token_groups = from_groups(fitting_groups(), groups)
    return Tokenised(
        token_groups, {"groups": len(token_groups), **{name: count for name, count in encoder.counts.items() if count}}
    )


# --- groups that are too long


_SHORTEST_PROMPT = 2  # tokens that a cut leaves at least


class Limits:
    """Limits in tokens. Raises ValueError for one that is not positive."""

    def __init__(self, total: int, prompt: int | None, response: int | None, bos: int | None) -> None:
        for name, value in (("max_length", total), ("max_prompt_length", prompt), ("max_response_length", response)):
            if value is not None and value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1 token")
        self.total, self.bos = total, bos
        self.prompt = total if prompt is None else prompt
        self.response = total if response is None else response

    def hold(self, ids: Ids) -> bool:
        """Whether the group is within all limits."""
        short = len(ids.prompt) <= self.prompt and ids.longest <= self.response
        return short and len(ids.prompt) + ids.longest <= self.total


Fit = Callable[[PromptGroup, Ids], Ids | None]


def _drop(limits: Limits, counts: Counter[str], closing: Callable[[PromptGroup], list[int]]) -> Fit:
    """Groups over a limit are left out."""

    def fit(group: PromptGroup, ids: Ids) -> Ids | None:
        if limits.hold(ids):
            return ids
        counts["dropped: too long"] += 1
        return None

    return fit


def _cut_prompts(cut: Callable[[PromptGroup, list[int], int], list[int] | None]) -> Any:
    """The policy that cuts prompts with `cut(group, prompt, room)`, which gives None where it cannot."""

    def policy(limits: Limits, counts: Counter[str], closing: Callable[[PromptGroup], list[int]]) -> Fit:
        def fit(group: PromptGroup, ids: Ids) -> Ids | None:
            if limits.hold(ids):
                return ids
            room = min(limits.prompt, limits.total - ids.longest)
            if ids.longest > limits.response or room < _SHORTEST_PROMPT:
                counts["dropped: response too long"] += 1
                return None
            prompt = cut(group, ids.prompt, room)
            if prompt is None:
                counts["dropped: too little of the prompt would be left"] += 1
                return None
            counts["prompts cut"] += 1
            return ids._replace(prompt=prompt)

        return fit

    return policy


def _prompt_start(limits: Limits, counts: Counter[str], closing: Callable[[PromptGroup], list[int]]) -> Fit:
    """The prompt's beginning is cut; a leading BOS stays."""

    def cut(group: PromptGroup, ids: list[int], room: int) -> list[int] | None:
        bos = ids[:1] if ids[0] == limits.bos else []
        return [*bos, *ids[len(ids) - room + len(bos) :]]

    return _cut_prompts(cut)(limits, counts, closing)


def _prompt_end(limits: Limits, counts: Counter[str], closing: Callable[[PromptGroup], list[int]]) -> Fit:
    """The end of the prompt's last turn is cut; what the template writes behind it stays."""

    def cut(group: PromptGroup, ids: list[int], room: int) -> list[int] | None:
        after = closing(group)
        if ids[len(ids) - len(after) :] != after or room - len(after) < _SHORTEST_PROMPT:
            return None
        return [*ids[: room - len(after)], *after]

    return _cut_prompts(cut)(limits, counts, closing)


def _response(limits: Limits, counts: Counter[str], closing: Callable[[PromptGroup], list[int]]) -> Fit:
    """All responses are cut to the same room; a cut one gets no end token."""

    def fit(group: PromptGroup, ids: Ids) -> Ids | None:
        room = min(limits.response, limits.total - len(ids.prompt))
        if len(ids.prompt) > limits.prompt or room < 1:
            counts["dropped: prompt too long"] += 1
            return None
        counts["responses cut"] += sum(len(response) > room for response in ids.responses)
        masks = None if ids.scored is None else [mask[:room] for mask in ids.scored]
        return Ids(ids.prompt, [response[:room] for response in ids.responses], masks)

    return fit


POLICIES = {
    "drop": _drop,
    "truncate_prompt_start": _prompt_start,
    "truncate_prompt_end": _prompt_end,
    "truncate_response": _response,
}


# --- kept between runs


VERSION = 2  # of what is kept; a change of meaning makes it 3


def content_of(groups: Sequence[PromptGroup]) -> str:
    """Digest of groups in their order."""
    return groups.content if isinstance(groups, StoredGroups) else digest(list(map(whole_id, groups)))


def tokenised_once(
    groups: Sequence[PromptGroup],
    tokenizer: Any,
    tokenise: "partial[Tokenised]",
    text_identity: str,
    cache: Path,
    progress: Progress,
) -> Tokenised:
    """What `tokenise` gives, computed now or by an earlier run. Options that do not matter here are not in the key."""
    options = {**tokenise.keywords, "max_length": length_limit(tokenizer, tokenise.keywords["max_length"])}
    folder = cache / "tokens" / digest([VERSION, content_of(groups), text_identity, options])
    if not is_kept(folder, "its groups are tokenised again"):
        tokenised = tokenise(groups, tokenizer, progress)
        tokenised.groups.save(folder, {"counts.json": json.dumps(tokenised.counts)})
        in_use(folder)
        return tokenised
    return Tokenised(TokenGroups.load(folder, groups), json.loads((folder / "counts.json").read_text()))
