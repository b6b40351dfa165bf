"""Tensors that several ranks hold together: gathered, and saved and restored. Each rank writes what it holds, while
training goes on, and any number of ranks reads what each of them holds then; torch.distributed.checkpoint does it, in
safetensors.
"""

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from dpo_ref.distributed import ranks

# --- weights of which a rank holds a part


def whole(weight: Tensor) -> Tensor:
    """A weight as all ranks hold it together, differentiable: gradients are summed over ranks into each one's part.
    One that is not sharded is as it is. All ranks ask for it together."""
    return weight.full_tensor(grad_placements=[Partial()]) if isinstance(weight, DTensor) else weight


def held(weight: Tensor) -> Tensor:
    """What this rank holds of a weight, in the same memory."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def held_of(model: nn.Module) -> dict[str, Tensor]:
    """What this rank holds of a model's weights, by name."""
    return {name: held(weight) for name, weight in model.named_parameters()}


def gathered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as all ranks hold them together, in main memory of the first one; nothing on the others."""
    if not any(isinstance(value, DTensor) for value in state.values()):
        return dict(state)
    kept = {}
    for name, value in state.items():
        complete = whole(value).detach()
        if ranks().is_first:
            kept[name] = complete.cpu()
    return kept


# --- saved and restored


def like(value: Tensor, weight: Tensor) -> Tensor:
    """A tensor of an optimiser's as the weight it belongs to is sharded, where it has its shape."""
    if not isinstance(weight, DTensor) or value.shape != weight.to_local().shape:
        return value
    return DTensor.from_local(
        value, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
    )  # fmt: skip


def write(folder: Path, tensors: Mapping[str, Tensor]) -> "Future[Any]":
    """Write the tensors of all ranks into a folder that is there. When this returns they have been copied; the future
    is done when every rank has written its part. Raises OSError, from the future too, on all ranks if one of them
    could not."""
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    saved: Any = dcp.async_save(dict(tensors), storage_writer=writer, process_group=ranks().background)
    return saved


def written(saved: "Future[Any]") -> None:
    """Wait for what `write` has begun. Raises OSError if a rank could not write its part."""
    try:
        saved.result()
    except CheckpointException as failure:
        index, (error, _) = next(iter(failure.failures.items()))
        raise OSError(getattr(error, "errno", None), f"rank {index} could not write its part: {error}") from failure


def read(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors, in place, with what was written under their names, however many ranks wrote it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(dict(into), storage_reader=reader, no_dist=not dist.is_initialized())


class Stored(NamedTuple):
    """A tensor that was written."""

    shape: torch.Size
    dtype: torch.dtype


def stored(folder: Path) -> dict[str, Stored]:
    """What was written, by name."""
    described: Any = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: Stored(tensor.size, tensor.properties.dtype) for name, tensor in described.items()}


def empty_beside(weight: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros for a tensor of an optimiser's, where the weight is, sharded as that is where they have its shape."""
    if not isinstance(weight, DTensor) or shape != weight.shape:
        return torch.zeros(shape, dtype=dtype, device=weight.device)
    return like(torch.zeros_like(weight.to_local(), dtype=dtype), weight)


def fill(weight: Tensor, value: Tensor) -> None:
    """Give a weight, or this rank's part of it, the values of a whole tensor."""
    if isinstance(weight, DTensor):
        value = distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
    weight.copy_(value)


Part = Callable[[nn.Parameter], nn.Parameter]  # of a weight, what an optimiser steps of it
