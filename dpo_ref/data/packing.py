"""Optimiser batches of groups, and packs of at most `tokens_per_batch` tokens inside each of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch

from dpo_ref.component import LEFT_OPEN
from dpo_ref.distributed import ranks
from dpo_ref.types import PackedBatch, TokenGroup


def epoch_order(num_groups: int, seed: int, epoch: int) -> list[int]:
    """The order in which `epoch` visits the groups: a permutation that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(num_groups).tolist()


def optimiser_batches(
    groups: Sequence[TokenGroup], batch_size: int, seed: int, first_step: int = 0
) -> Iterator[tuple[int, list[TokenGroup]]]:
    """(epoch, groups) of every optimiser step from `first_step` (0-based) on, without end.

    Every group occurs once per epoch; the last batch of an epoch may be smaller. Raises ValueError without groups.
    """
    if not groups:
        raise ValueError("there is nothing to train on: every row was dropped; see data.max_length and the log above")
    per_epoch = steps_per_epoch(len(groups), batch_size)
    epoch, skip = divmod(first_step, per_epoch)
    while True:
        order = epoch_order(len(groups), seed, epoch)
        for start in range(skip * batch_size, len(order), batch_size):
            yield epoch, [groups[i] for i in order[start : start + batch_size]]
        epoch, skip = epoch + 1, 0


def steps_per_epoch(num_groups: int, batch_size: int) -> int:
    """Optimiser steps that visit every group once."""
    return -(-num_groups // batch_size)


def _best_fit(groups: Sequence[TokenGroup], tokens_per_batch: int) -> list[list[TokenGroup]]:
    packs: list[list[TokenGroup]] = []
    room: list[int] = []
    for group in sorted(groups, key=lambda group: -group.num_tokens):
        fits = [i for i, free in enumerate(room) if free >= group.num_tokens]
        if fits:
            best = min(fits, key=room.__getitem__)
            packs[best].append(group)
            room[best] -= group.num_tokens
        else:
            packs.append([group])
            room.append(tokens_per_batch - group.num_tokens)
    return packs


def _one_group(groups: Sequence[TokenGroup], tokens_per_batch: int) -> list[list[TokenGroup]]:
    return [[group] for group in groups]


Pack = Callable[[Sequence[TokenGroup]], list[list[TokenGroup]]]  # `pack` with its options
PACKINGS = {"best_fit": _best_fit, "one_group": _one_group}


def pack(
    groups: Sequence[TokenGroup],
    *,
    tokens_per_batch: Annotated[int, LEFT_OPEN] = 8192,
    packing: Literal["best_fit", "one_group"] = "best_fit",
) -> list[list[TokenGroup]]:
    """Groups as micro-batches: every group in one pack, each pack at most `tokens_per_batch` tokens (a longer group
    alone). `best_fit` is best-fit decreasing; `one_group` puts every group into a pack of its own. The packs and their
    order are a function of the groups alone. Raises ValueError for a budget that is not positive.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"data.tokens_per_batch={tokens_per_batch} must be at least 1 token")
    return PACKINGS[packing](groups, tokens_per_batch)


# --- what a rank does of it


class Pass(NamedTuple):
    """A pack that the model is asked about; one that does not count keeps this rank in step with the others, whose
    sharded weights no rank can ask alone."""

    groups: list[TokenGroup]
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank does of groups that all ranks have: as many passes as every other, at least one."""

    groups: Sequence[TokenGroup]  # of all ranks
    passes: list[Pass]
    num_packs: int  # that count, on all ranks
    imbalance: float  # tokens of the rank that has most of them, over their mean


def share_of(groups: Sequence[TokenGroup], pack: Pack) -> Share:
    """This rank's share of the groups, which every rank is asked for with the same. Groups go to ranks by their
    tokens, the longest first to who has least."""
    everyone = ranks()
    if everyone.size == 1:
        packs = pack(groups)
        return Share(groups, [Pass(some) for some in packs], len(packs), 1.0)
    if not groups:
        return Share(groups, [], 0, 1.0)
    parts = _balanced(groups, everyone.size)
    packs = [pack(part) if part else [] for part in parts]
    most, idle = max(map(len, packs)), Pass([min(groups, key=lambda group: group.num_tokens)], counts=False)
    own = [Pass(some) for some in packs[everyone.index]]
    loads = [sum(group.num_tokens for group in part) for part in parts]
    imbalance = max(loads) * len(loads) / max(1, sum(loads))
    return Share(groups, own + (most - len(own)) * [idle], sum(map(len, packs)), imbalance)


def _balanced(groups: Sequence[TokenGroup], count: int) -> list[list[TokenGroup]]:
    parts: list[list[TokenGroup]] = [[] for _ in range(count)]
    loads = [0] * count
    for group in sorted(groups, key=lambda group: -group.num_tokens):
        least = min(range(count), key=loads.__getitem__)
        parts[least].append(group)
        loads[least] += group.num_tokens
    return parts


def in_step(packs: list[list[TokenGroup]]) -> list[Pass]:
    """Packs of this rank as passes, of which every rank has as many. Each has at least one pack."""
    most = max(ranks().gather(len(packs)))
    return [Pass(some) for some in packs] + (most - len(packs)) * [Pass(packs[0], counts=False)]


WINDOW = 256  # groups


@dataclass(frozen=True, slots=True)
class WindowedPacks:
    """The passes of this rank over any number of groups, made of `WINDOW` of them at a time whenever they are gone
    through: however many groups there are, no more stand in memory."""

    groups: Sequence[TokenGroup]
    pack: Pack

    def __iter__(self) -> Iterator[Pass]:
        for start in range(0, len(self.groups), WINDOW):
            yield from share_of(self.groups[start : start + WINDOW], self.pack).passes


def collate(groups: Sequence[TokenGroup]) -> PackedBatch:
    """One pack as tensors."""
    ids, positions, heads, targets, owners = [], [], [], [], []
    lengths, chosen, rejected = [], [], []
    for group in groups:
        start, prompt_size = len(ids), len(group.prompt_ids)
        ids.extend(group.prompt_ids)
        positions.extend(range(prompt_size))
        chosen.extend(len(lengths) + better for better, _ in group.pairs)
        rejected.extend(len(lengths) + worse for _, worse in group.pairs)
        masks = group.scored or [None] * len(group.response_ids)
        for response, mask in zip(group.response_ids, masks, strict=True):
            first, size = len(ids), len(response)
            before = [start + prompt_size - 1, *range(first, first + size - 1)]
            heads.extend(before if mask is None else compress(before, mask))
            targets.extend(response if mask is None else compress(response, mask))
            ids.extend(response)
            positions.extend(range(prompt_size, prompt_size + size))
            lengths.append(size if mask is None else sum(mask))
            owners.extend([len(lengths) - 1] * lengths[-1])
    return PackedBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        layout=tuple((len(group.prompt_ids), tuple(map(len, group.response_ids))) for group in groups),
        head_index=torch.tensor(heads),
        target_ids=torch.tensor(targets),
        response_index=torch.tensor(owners),
        lengths=torch.tensor(lengths),
        num_bytes=torch.tensor([size for group in groups for size in group.num_bytes]),
        scored_per_group=tuple(group.num_scored for group in groups),
        group_index=tuple(group.group_index for group in groups),
        pairs_per_group=tuple(len(group.pairs) for group in groups),
        chosen=torch.tensor(chosen, dtype=torch.long),
        rejected=torch.tensor(rejected, dtype=torch.long),
        labels=_of_responses([group.labels for group in groups], torch.bool),
        advantages=_of_responses([group.advantages for group in groups], torch.float64),
        rewards=_of_responses([group.rewards for group in groups], torch.float64),
        weights=_of_responses([group.weights for group in groups], torch.float64),
    )


def _of_responses(
    values: Sequence[tuple[bool, ...] | tuple[float, ...] | None], dtype: torch.dtype
) -> torch.Tensor | None:
    """What the groups say of their responses, if all of them do."""
    present = [value for value in values if value is not None]
    return torch.tensor(list(chain(*present)), dtype=dtype) if len(present) == len(values) else None
