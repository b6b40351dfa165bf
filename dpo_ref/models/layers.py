"""How a model's decoder layers are run: compiled, or with activations recomputed in the backward pass."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn


def compile_layers(model: Any) -> None:
    """Compile every decoder layer for packs of any length, of which all layers share the graphs.

    Where this torch has it, what the compiler fuses only from some length on is left out (two orders of reduction, of
    RMSNorm's gradient): every other range of lengths would compile again.
    """
    from torch._inductor import config

    by_length = "triton.mix_order_reduction"
    options = {by_length: False} if by_length in config.get_config_copy() else {}
    for layer in decoder_layers(model):
        layer.compile(dynamic=True, options=options)


def graphs_compiled() -> int:
    """Graphs that torch.compile has made so far in this process; constant after the first steps of a run."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The model's decoder layers. Raises ValueError where they are not one list."""
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"model.compile: {type(model).__name__} has no list of {count} layers to compile")


def _full_checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _selective_checkpointing(model: Any) -> None:
    """Keep the results of matrix products and attention, recompute norms, activations and rotations."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        name = str(operator)
        keep = any(part in name for part in ("aten.mm", "aten.addmm", "aten.bmm", "attention", "attn", "low_rank"))
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts})


def _no_checkpointing(model: Any) -> None:
    """Every activation is kept."""


CHECKPOINTING = {"off": _no_checkpointing, "selective": _selective_checkpointing, "full": _full_checkpointing}
