"""What the data is like before anything is trained on it: what was left out, what would mislead, and single groups as
the model sees them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, repeat
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dpo_ref.data.groups import IDS, Groups, StoredGroups, TokenGroups
from dpo_ref.data.tokenise import BAD, Tokenised
from dpo_ref.data.turns import Block, blocks_of
from dpo_ref.types import PreferenceData, PromptGroup, Reading, TokenGroup, conversation


@dataclass(frozen=True)
class Hygiene:
    """Counts are of training groups unless they say otherwise; lengths in tokens, one entry for each pair."""

    reading: Reading
    counts: dict[str, int]  # what tokenising did
    num_train: int
    num_eval: int
    num_written: int  # of both, by the chat template without losing a word
    duplicates: int  # groups that were there before
    contradictions: int  # groups whose responses another group orders differently
    leaked: int  # held-out groups whose prompt is trained on
    lopsided: int  # pairs one side of which is much longer
    empty: int  # responses without a word
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
    counts = summed_counts(Reading(), train.counts, held_out.counts)
    return Hygiene(
        reading=data.reading,
        counts=counts,
        num_train=len(train.groups),
        num_eval=len(held_out.groups),
        num_written=len(data.train) + len(data.eval) - sum(n for name, n in counts.items() if name.startswith(BAD)),
        duplicates=len(group_ids) - len(set(group_ids)),
        contradictions=sum(len(orders[members]) > 1 for members in set_ids),
        leaked=sum(prompt in trained_prompts for prompt in ids_of(data.eval, "prompt_id")),
        lopsided=int(are_lopsided(chosen, rejected).sum()),
        empty=int((train.groups.arrays.num_bytes == 0).sum()),
        prompts=prompts,
        chosen=chosen,
        rejected=rejected,
        alone=alone,
    )


TIMES, LONG = 10, 200  # a side is much longer that is so many times the other, and more than so many tokens


def are_lopsided(first: Int[np.ndarray, " B"], second: Int[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
    """Which pairs of lengths, in tokens, have one that is much longer."""
    longer = np.maximum(first, second)
    return (longer > LONG) & (longer > TIMES * np.minimum(first, second))


def concerns(hygiene: Hygiene) -> dict[str, int]:
    """What a careful reader asks about, with its count."""
    return {
        "duplicates (data.deduplicate=exact drops them)": hygiene.duplicates,
        "groups contradict another that has the same responses in another order": hygiene.contradictions,
        "held-out groups have a prompt that is trained on": hygiene.leaked,
        f"pairs have a side more than {TIMES} times as long as the other": hygiene.lopsided,
        "responses are empty": hygiene.empty,
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


# --- a group as the model sees it: whose each token is, which text is only read, and which tokens count


class Piece(NamedTuple):
    """A token's text, or several tokens' where one holds only part of a character, and whether it is scored."""

    text: str
    scored: bool


class Turn(NamedTuple):
    """What one role says (or several that cannot be told apart), and how many tokens of it are read and scored."""

    role: str
    pieces: list[Piece]
    num_read: int
    num_scored: int

    @property
    def text(self) -> str:
        """Its words, and what the template writes around them."""
        return "".join(piece.text for piece in self.pieces)


class Example(NamedTuple):
    """The prompt's turns and, by name, those of each response; `tools` are the names of the functions on offer."""

    prompt: list[Turn]
    responses: dict[str, list[Turn]]
    tools: tuple[str, ...] = ()

    def rows(self) -> list[list[str]]:
        """For a table: part, text, whether it is scored; consecutive tokens alike joined. Parts are the responses'
        names where the assistant speaks, and roles elsewhere."""
        rows = [[turn.role, turn.text, "no"] for turn in self.prompt]
        for name, turns in self.responses.items():
            rows += [row for turn in turns for row in _rows(name if "assistant" in turn.role else turn.role, turn)]
        return rows

    def short_rows(self) -> list[list[str]]:
        """The same for a terminal: of many turns the first and the last, and no line for a line's end that is read."""
        whole = [self._replace(responses={})]
        whole += [Example([], {name: turns}) for name, turns in self.responses.items()]
        rows = [row for part in whole for row in _without_middle(part.rows())]
        ended = [[part, text if scored == "yes" else text.removesuffix("\n"), scored] for part, text, scored in rows]
        return [row for row in ended if row[1]]


def _rows(part: str, turn: Turn) -> list[list[str]]:
    runs = groupby(turn.pieces, key=lambda piece: piece.scored)
    return [[part, "".join(piece.text for piece in run), "yes" if scored else "no"] for scored, run in runs]


_FIRST, _LAST = 2, 4  # rows of many that are shown


def _without_middle(rows: list[list[str]]) -> list[list[str]]:
    between = len(rows) - _FIRST - _LAST
    return rows if between < 2 else [*rows[:_FIRST], ["...", f"{between} more", "no"], *rows[-_LAST:]]


def examples_of(tokenizer: Any, groups: Groups) -> list[Example]:
    """What the groups' tokens say, special tokens included."""
    parts = enumerate(zip(groups, blocks_of(tokenizer, groups), strict=True))
    return [_example(tokenizer, group, groups.text(index).tools or (), blocks) for index, (group, blocks) in parts]


def _example(tokenizer: Any, group: TokenGroup, tools: Iterable[Any], blocks: list[list[Block]]) -> Example:
    better = {index for index, _ in group.pairs}
    names = ["chosen" if index in better else "rejected" for index in range(len(group.response_ids))]
    if len(names) != 2 or not group.pairs:
        names = [f"response {index + 1}" for index in range(len(names))]
    responses = {
        name: _of_response(tokenizer, group.prompt_ids, ids, mask, of_response)
        for name, ids, mask, of_response in zip(names, group.response_ids, _masks(group), blocks, strict=True)
    }
    names_of_tools = tuple(str(tool.get("function", tool).get("name")) for tool in tools)
    return Example(_of_prompt(tokenizer, group.prompt_ids, blocks[0] if blocks else []), responses, names_of_tools)


def _masks(group: TokenGroup) -> Sequence[list[bool]]:
    return group.scored or [[True] * len(ids) for ids in group.response_ids]


def _of_prompt(tokenizer: Any, ids: list[int], blocks: Sequence[Block]) -> list[Turn]:
    turns = []
    for role, start, stop in blocks:
        before = ids[max(start - 1, 0) : start]  # a blank may depend on it
        text = decode_ids(tokenizer, [*before, *ids[start:stop]])[len(decode_ids(tokenizer, before)) :]
        if start < len(ids):
            turns.append(Turn(role, [Piece(text, False)], min(stop, len(ids)) - start, 0))
    return turns


def _of_response(
    tokenizer: Any, prompt: list[int], ids: list[int], mask: list[bool], blocks: Sequence[Block]
) -> list[Turn]:
    pieces = token_texts(tokenizer, prompt[-1:], ids)
    turns = []
    for role, start, stop in blocks:
        first, last = max(start - len(prompt), 0), stop - len(prompt)
        if last > 0:
            said = [Piece(text, mask[end - 1]) for text, begin, end in pieces if first <= begin < last]
            num_scored = sum(mask[first:last])
            turns.append(Turn(role, said, last - first - num_scored, num_scored))
    return turns


class Tokens(NamedTuple):
    """How many tokens are read only, and how many are scored."""

    read: int
    scored: int


def tokens_by_role(tokenizer: Any, groups: Groups) -> dict[str, Tokens]:
    """What the tokens of groups are, a prompt counted once; the roles in the order of their appearance."""
    read: Counter[str] = Counter()
    scored: Counter[str] = Counter()
    for group, blocks in zip(groups, blocks_of(tokenizer, groups), strict=True):
        size = len(group.prompt_ids)
        for first, mask, of_response in zip(chain([0], repeat(size)), _masks(group), blocks, strict=False):
            counted = [False] * size + mask
            for role, start, stop in of_response:
                part = counted[max(start, first) : stop]
                scored[role] += sum(part)
                read[role] += len(part) - sum(part)
    return {role: Tokens(read[role], scored[role]) for role in read}


_MOST_WRITTEN = 4_000_000  # tokens: where a turn ends is seen in the conversation up to there, written once more


def drawn(groups: TokenGroups, count: int, seed: int) -> TokenGroups:
    """So many groups at random, or fewer where conversations are long, in the order of the data."""
    order = np.random.default_rng(seed).permutation(len(groups))[:count].tolist()
    written = accumulate(_written(groups[index], groups.text(index)) for index in order)
    within = sum(total <= _MOST_WRITTEN for total in written)
    chosen = np.zeros(len(groups), dtype=bool)
    chosen[order[: max(within, 1)]] = True
    return groups.where(chosen)


def _written(group: TokenGroup, text: PromptGroup) -> int:
    return group.num_tokens * sum(len(conversation(text.prompt, response)) for response in text.responses)


def decode_ids(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


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
