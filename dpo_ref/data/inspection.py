"""What the data is like before anything is trained on it: what was left out, what would mislead, and single groups as
the model sees them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dpo_ref.data.groups import IDS, StoredGroups
from dpo_ref.data.tokenise import Tokenised
from dpo_ref.types import PreferenceData, PromptGroup, Reading, TokenGroup


@dataclass(frozen=True)
class Hygiene:
    """Counts are of training groups unless they say otherwise; lengths in tokens, one entry for each pair."""

    reading: Reading
    counts: dict[str, int]  # what tokenising did
    num_train: int
    num_eval: int
    duplicates: int  # groups that were there before
    contradictions: int  # groups whose responses another group orders differently
    leaked: int  # held-out groups whose prompt is trained on
    prompts: Int[np.ndarray, " G"]
    chosen: Int[np.ndarray, " B"]
    rejected: Int[np.ndarray, " B"]
    alone: Int[np.ndarray, " N"]  # lengths of responses that are in no pair

    @property
    def longer_chosen(self) -> float:
        """Share of pairs whose chosen response is the longer one, ties as halves; what a judge of length would get."""
        return float(np.mean((self.chosen > self.rejected) + 0.5 * (self.chosen == self.rejected)))


def ids_of(groups: Sequence[PromptGroup], name: str) -> list[Any]:
    """One of `IDS` of every group."""
    if isinstance(groups, StoredGroups):
        return groups.ids(name)
    return [IDS[name](group) for group in groups]


def summed_counts(reading: Reading, *counts: dict[str, int]) -> dict[str, int]:
    """What became of rows and groups, as one record for the run's summary."""
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    total.update({f"rows left out: {reason}": count for reason, count in reading.dropped.items()})
    return dict(total)


def inspect(data: PreferenceData, train: Tokenised, held_out: Tokenised) -> Hygiene:
    """Look at the data as it was read and as it will be trained on."""
    group_ids, set_ids = ids_of(data.train, "group_id"), ids_of(data.train, "set_id")
    orders: dict[Any, set[Any]] = {}
    for group_id, members in zip(group_ids, set_ids, strict=True):
        orders.setdefault(members, set()).add(group_id)
    trained_prompts = set(ids_of(data.train, "prompt_id"))
    prompts, chosen, rejected, alone = train.groups.lengths()
    return Hygiene(
        reading=data.reading,
        counts=summed_counts(Reading(), train.counts, held_out.counts),
        num_train=len(train.groups),
        num_eval=len(held_out.groups),
        duplicates=len(group_ids) - len(set(group_ids)),
        contradictions=sum(len(orders[members]) > 1 for members in set_ids),
        leaked=sum(prompt in trained_prompts for prompt in ids_of(data.eval, "prompt_id")),
        prompts=prompts,
        chosen=chosen,
        rejected=rejected,
        alone=alone,
    )


def concerns(hygiene: Hygiene) -> dict[str, int]:
    """What a careful reader asks about, with its count."""
    return {
        "duplicates (data.deduplicate=exact drops them)": hygiene.duplicates,
        "groups contradict another that has the same responses in another order": hygiene.contradictions,
        "held-out groups have a prompt that is trained on": hygiene.leaked,
    }


def score_margins(groups: Iterable[PromptGroup]) -> Float[np.ndarray, " B"]:
    """Differences of the scores of every pair's responses; empty where rows have no scores."""
    return np.array([g.rewards[a] - g.rewards[b] for g in groups if g.rewards is not None for a, b in g.pairs])


def quantiles(values: Int[np.ndarray, " G"]) -> str:
    """Median and 95th percentile."""
    return "-" if not len(values) else f"{np.median(values):.0f} (95 % up to {np.quantile(values, 0.95):.0f})"


def short_report(hygiene: Hygiene) -> list[str]:
    """What every run says about its data: a line of sizes, a line of lengths, and one for each thing to look at."""
    reading = hygiene.reading
    rows = f" from {reading.num_rows:,} rows ({', '.join(reading.formats)})" if reading.num_rows else ""
    lines = [f"data: {hygiene.num_train:,} groups to train on, {hygiene.num_eval:,} held out{rows}"]
    if len(hygiene.chosen):
        lines.append(
            f"  tokens, median: prompt {quantiles(hygiene.prompts)}, chosen {quantiles(hygiene.chosen)}, "
            f"rejected {quantiles(hygiene.rejected)}; the longer response is chosen in {hygiene.longer_chosen:.0%}"
        )
    else:
        lines.append(f"  tokens, median: prompt {quantiles(hygiene.prompts)}, response {quantiles(hygiene.alone)}")
    lines += [f"  {count:,} rows left out: {reason}" for reason, count in reading.dropped.items()]
    lines += [f"    such as {example}" for example in reading.examples[:3]]
    lines += [f"  {note}" for note in reading.notes]
    lines += [f"  {count:,} {event}" for event, count in hygiene.counts.items() if event != "groups"]
    return lines + [f"  {count:,} {concern}" for concern, count in concerns(hygiene).items() if count]


# --- a group as the model sees it: which text is only read, and which tokens count


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
        rows = [["prompt", self.prompt, "no"]]
        for name, pieces in self.responses.items():
            runs = groupby(pieces, key=lambda piece: piece.scored)
            rows += [[name, "".join(piece.text for piece in run), "yes" if scored else "no"] for scored, run in runs]
        return rows


def example_of(tokenizer: Any, group: TokenGroup) -> Example:
    """What a group's tokens say, special tokens included."""
    better = {index for index, _ in group.pairs}
    names = ["chosen" if index in better else "rejected" for index in range(len(group.response_ids))]
    if len(names) != 2 or not group.pairs:
        names = [f"response {index + 1}" for index in range(len(names))]
    masks = group.scored or [[True] * len(ids) for ids in group.response_ids]
    parts = zip(names, group.response_ids, masks, strict=True)
    return Example(
        decode_ids(tokenizer, group.prompt_ids),
        {name: _pieces(tokenizer, group.prompt_ids[-1:], ids, mask) for name, ids, mask in parts},
    )


def decode_ids(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _pieces(tokenizer: Any, before: list[int], ids: list[int], mask: list[bool]) -> list[Piece]:
    return [Piece(text, mask[stop - 1]) for text, _, stop in token_texts(tokenizer, before, ids)]


def token_texts(tokenizer: Any, before: list[int], ids: list[int]) -> list[tuple[str, int, int]]:
    """What every token of `ids`, written behind `before`, adds to the text, and which tokens [start, stop) that were:
    bytes of a character wait for the rest of it."""
    texts: list[tuple[str, int, int]] = []
    start = 0
    for stop in range(1, len(ids) + 1):
        prefix, longer = decode_ids(tokenizer, before), decode_ids(tokenizer, [*before, *ids[start:stop]])
        if longer.endswith("\N{REPLACEMENT CHARACTER}") and stop < len(ids):
            continue
        texts.append((longer[len(prefix) :], start, stop))
        before, start = ids[stop - 1 : stop], stop
    return texts
