"""How a model's decoder layers are run: compiled, or with activations recomputed in the backward pass from what the
device keeps, or main memory."""

import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# --- compiled


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


# --- inputs of layers in main memory


@torch.library.custom_op("dpo_ref::to_main_memory", mutates_args=())
def to_main_memory(x: Tensor) -> Tensor:
    """A copy in main memory, in pages that a card can read and write by itself where `x` is on one. An operator of its
    own, so that who counts what a device keeps can tell it from that."""
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return copy.copy_(x, non_blocking=True)


@to_main_memory.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


@cache
def _beside(device: torch.device) -> Any:
    """The stream that copies while another computes."""
    return torch.get_device_module(device).Stream()


class _Parked:
    """The input of a layer: copied to main memory while the layer computes, gone from the device when the next one
    begins, and on its way back one layer before the backward pass needs it.

    Memory of the device belongs to the stream that computes. It is copied from and to behind all that this stream was
    asked for until then, and given back only when it waits for the copy: nothing else is written there before, and
    however far the host is ahead, memory is free again in the order of the computation.
    """

    def __init__(self, x: Float[Tensor, "... H"], before: "_Parked | None") -> None:
        self._before = None if before is None else weakref.ref(before)  # else a pass would keep all those before it
        self._here: Tensor | None = None
        self._device, self._module = x.device, torch.get_device_module(x.device)
        self._there = self._copy(lambda: to_main_memory(x))
        self._here = x

    def _copy(self, copy: Callable[[], Tensor]) -> Tensor:
        """What `copy` makes, on the stream beside the one that computes."""
        stream = _beside(self._device)
        stream.wait_stream(self._module.current_stream())
        with self._module.stream(stream):
            copied = copy()
        self._done = stream.record_event()
        return copied

    def leave(self) -> None:
        """Be on the device no more."""
        if self._here is not None:
            self._module.current_stream().wait_event(self._done)
            self._here = None

    __del__ = leave

    def come_back(self) -> None:
        """Begin to be on the device again."""
        if self._here is None:
            self._here = here = torch.empty_like(self._there, device=self._device)
            self._copy(lambda: here.copy_(self._there, non_blocking=True))

    def taken(self) -> Float[Tensor, "... H"]:
        """It, for the backward pass; that of the layer before sets out."""
        self.come_back()
        here: Any = self._here
        done, before = self._done, None if self._before is None else self._before()
        if before is not None:
            before.come_back()
        self._module.current_stream().wait_event(done)
        self._here = None
        return here


class _Offload:
    """Runs checkpointed layers, one after the other, with their inputs in main memory."""

    def __init__(self) -> None:
        self._last: Callable[[], _Parked | None] = lambda: None

    def run(self, checkpoint: Callable[..., Any], layer: Callable[..., Any], *inputs: Any) -> Any:
        """What the layer makes of its inputs, which checkpointing saves in front of all that it does inside."""
        with saved_tensors_hooks(self._park, _Parked.taken):
            return checkpoint(layer, *inputs)

    def _park(self, x: Tensor) -> _Parked:
        last = self._last()
        if last is not None:
            last.leave()
        parked = _Parked(x.detach(), last)
        self._last = weakref.ref(parked)
        return parked


# --- recomputed


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


def _offloaded_checkpointing(model: Any) -> None:
    """As full, with what is kept, the layers' inputs, in main memory."""
    _full_checkpointing(model)
    offload = _Offload()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = partial(offload.run, module._gradient_checkpointing_func)


def _no_checkpointing(model: Any) -> None:
    """Every activation is kept."""


CHECKPOINTING = {
    "off": _no_checkpointing,
    "selective": _selective_checkpointing,
    "full": _full_checkpointing,
    "offload": _offloaded_checkpointing,
}


def check_checkpointing(how: str, device: torch.device) -> None:
    """Raise ValueError for a way of keeping activations that changes nothing on a device."""
    if how == "offload" and device.type == "cpu":
        raise ValueError(
            "model.gradient_checkpointing=offload has no effect on a CPU, whose memory is the main memory; use "
            "model.gradient_checkpointing=full"
        )
