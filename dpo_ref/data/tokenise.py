"""From conversations to token ids: the prompt as in generation, the response exactly as the model would produce it.

What becomes of groups that are too long is one policy for all responses of a group alike, everything counted.
Tokenised groups are kept between runs, named by the texts, the tokenizer with its template, and the options.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo_ref.data.chat_templates import ChatText, written_date
from dpo_ref.data.encoding import Encoder, Ids, texts_of
from dpo_ref.data.groups import StoredGroups, TokenGroups, from_groups, whole_id
from dpo_ref.data.limits import POLICIES, Fit, Limits
from dpo_ref.data.render_check import TemplateRefuses
from dpo_ref.data.scoring import scoring
from dpo_ref.files.cache import in_use, is_kept, made_by_one
from dpo_ref.types import Asked, Progress, PromptGroup, TokenGroup, asked, digest, silent, words_of

# --- tokenising


CHUNK = 1024  # groups handed to the tokenizer at once
UNLIMITED = 10**9  # transformers writes 10^30 where a tokenizer states no length


def length_limit(tokenizer: Any, max_length: int | None, positions: int | None = None) -> int:
    """`data.max_length`, or what the tokenizer says its model takes, or 1,024 tokens where it says nothing; never more
    than the model's positions, where those are known."""
    stated_length = tokenizer.model_max_length
    wanted = max_length or (stated_length if stated_length < UNLIMITED else 1024)
    return wanted if positions is None else min(wanted, positions)


class Tokenised(NamedTuple):
    """Token groups in the order of their rows, and how often what happened to rows on the way."""

    groups: TokenGroups
    counts: dict[str, int]


def end_of_turn_ids(tokenizer: Any) -> set[int]:
    """Tokens that may end the assistant's turn: EOS and the special tokens that the template writes there."""
    return {tokenizer.eos_token_id, *ChatText(tokenizer).end_ids}


def encode_prompts(tokenizer: Any, prompts: Sequence[Asked]) -> list[list[int]]:
    """Prompts as token ids, up to where the assistant begins. Special tokens' strings in their texts are text."""
    groups = [asked(prompt, f"prompt {index}") for index, prompt in enumerate(prompts)]
    return [ids.prompt for ids in Encoder(tokenizer).last_turns(groups)]


def _refuse_literals(encoder: Encoder, groups: Sequence[PromptGroup]) -> None:
    for group in groups:
        match = encoder.chat.special_tokens.search(" ".join(texts_of(group)))
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
    sizes = tuple(sum(len(text.encode()) for text in (*before, words_of(said))) for said in group.responses)
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
    over_length: Literal[
        "drop",
        "truncate_turns",
        "truncate_tool_results",
        "truncate_prompt_start",
        "truncate_prompt_end",
        "truncate_response",
    ] = "drop",
    score: Literal["last", "all"] = "last",
    score_thinking: Literal["all", "answer", "thought"] = "all",
    special_tokens_in_text: Literal["text", "error"] = "text",
    on_bad_row: Literal["error", "skip"] = "error",
    max_bad_share: float = 0.1,
) -> Tokenised:
    """Token ids of every group under the tokenizer's chat template.

    Scored are the tokens of the response's turns of the assistant and the tokens that end them, nothing that a tool or
    a user says in between or the template writes after; with `score=all` those of every assistant turn, the prompt
    then ending before the first. `score_thinking` says which part of each: all, the answer behind the thought, or the
    thought. Groups longer than `max_length` (prompt plus longest response, tokens; the tokenizer's `model_max_length`
    unless given), with a prompt longer than `max_prompt_length` or a response longer than `max_response_length` follow
    `over_length` (see `POLICIES`), all responses alike; what it cannot cure is dropped, and so are pairs whose sides
    are the same tokens. `special_tokens_in_text` says what becomes of special tokens' strings in users' texts: encoded
    as text, or an error. A group that the template cannot write, or not without losing words, is a bad row: it stops
    the run or is counted and skipped (`on_bad_row`), as long as no more than `max_bad_share` are. Raises ValueError
    for a tokenizer without EOS or chat template.
    """
    encoder = Encoder(tokenizer)
    limits = Limits(
        length_limit(tokenizer, max_length), max_prompt_length, max_response_length, tokenizer.bos_token_id
    )
    what = scoring(score=score, score_thinking=score_thinking)
    fit = POLICIES[over_length](limits, encoder, what)
    refused = REFUSALS[on_bad_row](encoder.counts)

    def fitting_groups() -> Iterator[TokenGroup]:
        starts = range(0, len(groups), CHUNK)
        for start in progress(starts, "tokenising", len(starts)):
            chunk = [groups[index] for index in range(start, min(start + CHUNK, len(groups)))]
            LITERALS[special_tokens_in_text](encoder, chunk)
            outcomes = encoder.outcomes(chunk, what)
            for index, (group, whole) in enumerate(zip(chunk, outcomes, strict=True), start):
                if isinstance(whole, TemplateRefuses):
                    refused(group, whole)
                elif made := _fitting(index, group, whole, fit, encoder.counts, score):
                    yield made

    token_groups = from_groups(fitting_groups(), groups)
    counts = {name: count for name, count in encoder.counts.items() if count}
    _judge(counts, len(groups), max_bad_share)
    return Tokenised(token_groups, {"groups": len(token_groups), **counts})


def _fitting(
    index: int, group: PromptGroup, whole: Ids, fit: Fit, counts: Counter[str], score: str
) -> TokenGroup | None:
    """The group within the limits, with the pairs that its tokens tell apart; None if there is nothing left."""
    ids = fit(group, whole)
    if ids is None:
        return None
    if ids.scored is not None and not all(map(any, ids.scored)):
        counts["dropped: no token of a response is scored"] += 1
        return None
    alike = [pair for pair in group.pairs if ids.alike(*pair)]
    for pair in alike:
        counts[_ALIKE[whole.alike(*pair)]] += 1
    if not alike:
        return _token_group(index, group, ids, score)
    pairs = tuple(pair for pair in group.pairs if pair not in alike)
    return _token_group(index, replace(group, pairs=pairs), ids, score) if pairs else None


_ALIKE = {  # by whether the sides were alike before they were cut
    True: "pairs dropped: both sides are the same tokens (the tokenizer or its template tells them not apart)",
    False: "pairs dropped: both sides are the same tokens once they are cut",
}


def within(tokenise: "partial[Tokenised]", tokenizer: Any, positions: int | None) -> "partial[Tokenised]":
    """A configured `tokenise` whose `max_length` is at most the model's positions."""
    return partial(tokenise, max_length=length_limit(tokenizer, tokenise.keywords["max_length"], positions))


# --- groups that the template cannot write


BAD = "dropped, bad rows: "  # begins the names of counts
Refused = Callable[[PromptGroup, TemplateRefuses], None]


def _stop(counts: Counter[str]) -> Refused:
    """The first is an error."""

    def refused(group: PromptGroup, reason: TemplateRefuses) -> None:
        raise ValueError(f"{group.origin} {reason}. data.on_bad_row=skip leaves such rows out") from reason

    return refused


def _skip(counts: Counter[str]) -> Refused:
    """They are counted by what they have in common."""

    def refused(group: PromptGroup, reason: TemplateRefuses) -> None:
        counts[BAD + reason.cause] += 1

    return refused


REFUSALS = {"error": _stop, "skip": _skip}


def _judge(counts: dict[str, int], total: int, max_share: float) -> None:
    """Raise ValueError where too many groups could not be written."""
    bad = {name: count for name, count in counts.items() if name.startswith(BAD)}
    num_bad = sum(bad.values())
    if num_bad > max_share * total + 1e-9:
        reasons = ", ".join(f"{count} because {name.removeprefix(BAD)}" for name, count in bad.items())
        raise ValueError(
            f"{num_bad} of {total} groups cannot be used, more than data.max_bad_share={max_share:g}: {reasons}"
        )


# --- kept between runs


VERSION = 2  # of what is kept; a change of meaning makes it 3
# Options that came later, at what was meant before: such tables keep their names.
_YOUNG = {"score_thinking": "all", "on_bad_row": "error", "max_bad_share": 0.1}


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
    options = {name: value for name, value in tokenise.keywords.items() if _YOUNG.get(name, ...) != value}
    options["max_length"] = length_limit(tokenizer, tokenise.keywords["max_length"])
    date = list(filter(None, [written_date(tokenizer)]))
    folder = cache / "tokens" / digest([VERSION, content_of(groups), text_identity, options, *date])
    again = "its groups are tokenised again"
    if not is_kept(folder, again):
        with made_by_one(folder):
            if not is_kept(folder, again):
                tokenised = tokenise(groups, tokenizer, progress)
                tokenised.groups.save(folder, {"counts.json": json.dumps(tokenised.counts)})
                in_use(folder)
                return tokenised
    return Tokenised(TokenGroups.load(folder, groups), json.loads((folder / "counts.json").read_text()))
