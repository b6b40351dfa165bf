"""What the group `parallel` costs a rank: bytes that it holds at the peak of an optimiser step, and bytes that it
sends in one, by the formulas of docs/scale.md.
"""

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from torch import nn

from dpo_ref.models.layers import decoder_layers
from dpo_ref.models.memory import GRADIENTS, MOMENTS, WEIGHTS
from dpo_ref.models.sharding import Parallel, Replication, Sharding

GATHERED = "gathered of other ranks"
FLOAT32 = 4  # bytes


class Sizes(NamedTuple):
    """Numbers of weights of a part of a model: all of them, and those that are trained."""

    all: int
    trained: int

    @classmethod
    def of(cls, *modules: nn.Module) -> "Sizes":
        """Of all modules together, each weight once."""
        weights = {id(weight): weight for module in modules for weight in module.parameters()}.values()
        return cls(sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.requires_grad))


class ModelSizes(NamedTuple):
    """Of a model as it is sharded: its decoder layers, the largest of them, the rest of its trunk, a head of its own
    (one that is the embedding has none); and how many bytes a weight takes where it is kept, and where it is computed
    with."""

    layers: Sizes
    largest: Sizes
    rest: Sizes
    head: Sizes
    stored: int
    computed: int

    @classmethod
    def of(cls, model: Any, compute_dtype: torch.dtype) -> "ModelSizes":
        """The model's weights may be anywhere, and missing."""
        layers = _layers(model)
        whole, trunk, inner = Sizes.of(model), Sizes.of(model.base_model), Sizes.of(*layers)
        largest = max(map(Sizes.of, layers), key=lambda size: size.all, default=Sizes(0, 0))
        stored = max(weight.itemsize for weight in model.parameters())
        computed = min(stored, compute_dtype.itemsize)
        return cls(inner, largest, _difference(trunk, inner), _difference(whole, trunk), stored, computed)

    @property
    def whole(self) -> Sizes:
        """All parts together."""
        return Sizes(*map(sum, zip(self.layers, self.rest, self.head, strict=True)))


def _layers(model: Any) -> Sequence[nn.Module]:
    """None where they are not one list: such a model is never sharded."""
    try:
        return decoder_layers(model)
    except ValueError:
        return ()


def _difference(all_of: Sizes, part: Sizes) -> Sizes:
    return Sizes(all_of.all - part.all, all_of.trained - part.trained)


@singledispatch
def held_by_rank(parallel: Parallel, parts: Mapping[str, int], sizes: ModelSizes, num_ranks: int) -> dict[str, int]:
    """Bytes by part that a rank of so many holds at the peak of a step, of which one process's are `parts`."""
    return dict(parts)


@held_by_rank.register
def _all(parallel: Replication, parts: Mapping[str, int], sizes: ModelSizes, num_ranks: int) -> dict[str, int]:
    """Gradients have a place in the buckets whether there are any or not."""
    return {**parts, GRADIENTS: max(parts[GRADIENTS], FLOAT32 * sizes.whole.trained)}


@held_by_rank.register
def _part(parallel: Sharding, parts: Mapping[str, int], sizes: ModelSizes, num_ranks: int) -> dict[str, int]:
    """Two layers are gathered, one of which has gradients as they were computed and in float32; what is left of the
    trunk is gathered; the head in float32, with its gradient."""
    every, gradients = sizes.whole, FLOAT32 * sizes.whole.trained
    own = {WEIGHTS: sizes.stored * every.all, GRADIENTS: gradients, MOMENTS: 2 * gradients}
    split = {name: -(-size // num_ranks) for name, size in own.items()}
    if parallel.reduce == "last_pass":
        split[GRADIENTS] = gradients
    gathered = 2 * sizes.computed * sizes.largest.all + (sizes.computed + FLOAT32) * sizes.largest.trained
    gathered += sizes.computed * sizes.rest.all + sizes.stored * sizes.head.all + FLOAT32 * sizes.head.trained
    return {**parts, **split, GATHERED: gathered}


@singledispatch
def sent_by_rank(parallel: Parallel, sizes: ModelSizes, num_ranks: int, num_passes: int) -> float:
    """Bytes that a rank of so many sends in a step of so many passes."""
    return 0.0


@sent_by_rank.register
def _once(parallel: Replication, sizes: ModelSizes, num_ranks: int, num_passes: int) -> float:
    """A ring's sum of the gradients, in the last pass."""
    return 2 * (num_ranks - 1) / num_ranks * FLOAT32 * sizes.whole.trained


@sent_by_rank.register
def _every_pass(parallel: Sharding, sizes: ModelSizes, num_ranks: int, num_passes: int) -> float:
    """Layers are gathered forward and backward, the rest once; their gradients go in float32 as often as `reduce`
    says, the head and its gradient in every pass."""
    gathered = sizes.computed * (2 * sizes.layers.all + sizes.rest.all) + sizes.stored * sizes.head.all
    reduced = FLOAT32 * (sizes.layers.trained + sizes.rest.trained)
    times = num_passes if parallel.reduce == "every_pass" else 1
    in_passes = num_passes * (gathered + FLOAT32 * sizes.head.trained)
    return (num_ranks - 1) / num_ranks * (in_passes + times * reduced)
