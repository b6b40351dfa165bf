"""The group `parallel`: how the ranks of a run hold the model and bring its gradients together.

Losses are means over the items of the whole optimiser batch, so gradients are summed over ranks, never averaged.
`ddp` holds the model once a rank and sums gradients while the last pass of a step goes backward
(torch.nn.parallel.DistributedDataParallel). `fsdp` holds a part of every weight, gradient and moment (FSDP2,
torch.distributed.fsdp.fully_shard): a layer is gathered when it is asked, the head once a pass (`whole`).
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakSet

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dpo_ref.component import RunPlan, component
from dpo_ref.distributed import best_device, num_beside, on_cuda, ranks
from dpo_ref.models.adapters import copy_of_trained
from dpo_ref.models.attention import REGISTERED
from dpo_ref.models.layers import decoder_layers
from dpo_ref.models.logps import reach
from dpo_ref.models.lora import QUANTISED
from dpo_ref.models.shards import held, whole

# --- what an optimiser steps


class Parts:
    """What this rank holds of the weights that an optimiser steps, in whose groups they take the place of these:
    optimisers then know nothing of sharding. A weight that is not sharded is its own part."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._parts: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by the weight's id: it, and its part
        for group in optimizer.param_groups:
            group["params"] = [self._taken(weight) for weight in group["params"]]

    def _taken(self, weight: nn.Parameter) -> nn.Parameter:
        own = nn.Parameter(held(weight.detach())) if isinstance(weight, DTensor) else weight
        self._parts[id(weight)] = weight, own
        return own

    def of(self, weight: nn.Parameter) -> nn.Parameter:
        """The part of one of the weights."""
        return self._parts.get(id(weight), (weight, weight))[1]

    def take_gradients(self) -> None:
        """Hand the gradients of sharded weights to their parts."""
        for weight, own in self._parts.values():
            if own is not weight:
                own.grad, weight.grad = None if weight.grad is None else held(weight.grad), None


@contextmanager
def asked_whole(model: Any) -> Iterator[None]:
    """Within, every rank has all of a sharded model's weights, so that each can ask it about what it likes, in any
    order; where they are not sharded nothing changes. No gradient is taken. All ranks enter and leave together."""
    modules: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    trunk = model.base_model
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
        _WHOLE.add(module)
    try:
        yield
    finally:
        for module in modules:
            _WHOLE.discard(module)
            module.reshard()
            module.set_reshard_after_forward(module is not trunk, recurse=False)


_WHOLE: "WeakSet[nn.Module]" = WeakSet()  # modules of which every rank has all weights for now


# --- how a model is trained on all ranks


class Holding:
    """A model that one rank holds and trains."""

    sharded: bool = False  # whether asking the model takes all ranks

    def through(self, work: Callable[[], Any]) -> Any:
        """What `work`, a forward pass whose gradient is taken, returns."""
        return work()

    def pass_of(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward pass of a pack; `last` is the last one of an optimiser step."""
        return nullcontext()

    def copy(self, model: nn.Module) -> Any:
        """A copy of the model that has weights of its own where they are trained."""
        return copy_of_trained(model)

    def spread(self, model: nn.Module) -> Any:
        """A further model, which is asked and not trained, held as this one is."""
        return model

    def take_in(self, head: nn.Module) -> None:
        """Train a head, which was put on the model meanwhile, as the rest."""

    def as_saved(self, model: nn.Module) -> Any:
        """The model as transformers knows it, which it can save with weights that it is handed."""
        return model


class _Run(nn.Module):
    """What DistributedDataParallel wraps: the weights that are trained, and any work with them. Buffers, which nobody
    changes, would be sent at every pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weight for weight in model.parameters() if weight.requires_grad)

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def _sum(sent: list[int], bucket: dist.GradBucket):  # torch takes its own word alone for what is returned
    """The gradients of a bucket, summed over ranks."""
    sent[0] += bucket.buffer().nbytes
    reduced: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return reduced.get_future().then(lambda done: done.value()[0])


class Replicated(Holding):
    """A model that every rank holds. Gradients are summed in buckets, each on its way while the backward pass goes on,
    once a step: passes before the last add to them on their rank alone."""

    def __init__(self, model: nn.Module, bucket_mib: float) -> None:
        self._model, self._bucket_mib = model, bucket_mib
        self._replicated: Any = None
        self.bytes_reduced = [0]  # of gradients, so far

    def _wrapped(self) -> Any:
        """Made at the first pass: an optimiser may have changed the weights' dtype before."""
        if self._replicated is None:
            self._replicated = nn.parallel.DistributedDataParallel(
                _Run(self._model), bucket_cap_mb=self._bucket_mib, gradient_as_bucket_view=True
            )
            self._replicated.register_comm_hook(self.bytes_reduced, _sum)
        return self._replicated

    def through(self, work: Callable[[], Any]) -> Any:
        """The work, whose gradients are summed over ranks."""
        return self._wrapped()(work)

    def pass_of(self, last: bool) -> AbstractContextManager[None]:
        """Ranks are not waited for before the last."""
        return nullcontext() if last else self._wrapped().no_sync()


@dataclass(frozen=True)
class Sharded(Holding):
    """A model of which every rank holds a part of each weight."""

    model: Any
    plan: "Sharding"
    skeleton: Any = field(repr=False)  # the model without its weights, as it was before

    sharded = True

    @contextmanager
    def pass_of(self, last: bool) -> Iterator[None]:
        """Each pass sums gradients into the parts, unless whole ones are kept to the last (`reduce`)."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last or self.plan.reduce == "every_pass", recurse=False)
        yield

    def spread(self, model: nn.Module) -> Any:
        """Every rank holds a part of it too. Raises ValueError for one that cannot be sharded (`check_in_step`)."""
        check_in_step(model, f"a {type(model).__name__} that is asked at every step")
        self.plan.shard(model)
        return model

    def take_in(self, head: nn.Module) -> None:
        """Every rank holds a part of it too."""
        self.plan.shard_alone(head)

    def as_saved(self, model: nn.Module) -> Any:
        """What it was before it was sharded, without its weights."""
        self.skeleton.set_attn_implementation(self.model.config._attn_implementation)
        return self.skeleton

    @torch.no_grad()
    def copy(self, model: nn.Module) -> Any:
        """A copy with parts of its own of all weights: FSDP shares none."""
        bare = copy.deepcopy(self.as_saved(model))
        self.plan.shard(bare)
        make_room(bare)
        for own, weight in zip(bare.parameters(), model.parameters(), strict=True):
            held(own).copy_(held(weight))
        return bare


# --- the group


class Parallel:
    """`parallel=none`: one process trains."""

    in_parts: bool = False  # whether no rank holds a whole model

    def holding(self, model: nn.Module, compute_dtype: torch.dtype) -> Holding:
        """The model, made ready to be trained on all ranks."""
        return Holding()


ALONE = Parallel()


@dataclass(frozen=True, slots=True)
class Replication(Parallel):
    """`parallel=ddp`."""

    bucket_mib: float

    def holding(self, model: nn.Module, compute_dtype: torch.dtype) -> Holding:
        """Every rank holds the model."""
        return Replicated(model, self.bucket_mib)


@dataclass(slots=True)
class Sharding(Parallel):
    """`parallel=fsdp`."""

    offload: bool
    reduce: str
    _options: dict[str, Any] = field(default_factory=dict)
    in_parts = True

    def holding(self, model: nn.Module, compute_dtype: torch.dtype) -> Holding:
        """Every rank keeps its part of each weight and lets go of the rest."""
        half = compute_dtype is torch.bfloat16
        precision = MixedPrecisionPolicy(
            param_dtype=compute_dtype if half else None,
            reduce_dtype=torch.float32 if half else None,
            cast_forward_inputs=False,
        )
        mesh = dist.device_mesh.init_device_mesh(best_device().type, (dist.get_world_size(),))
        self._options = {"mesh": mesh, "mp_policy": precision}
        bare = skeleton(model)
        self.shard(model)
        return Sharded(model, self, bare)

    def shard(self, model: Any) -> None:
        """Shard a model in place: every decoder layer by itself, the rest of its trunk, its head."""
        trunk = model.base_model
        tied = _tied(model)
        # Heads and embeddings are asked outside of FSDP's own calls (`whole`), where the batch is.
        offload = CPUOffloadPolicy() if self.offload else OffloadPolicy()
        for layer in decoder_layers(model):
            fully_shard(layer, **self._options, offload_policy=offload)
        # What is left of the trunk is gathered once, for forward and backward pass.
        fully_shard(trunk, **self._options, reshard_after_forward=False)
        trunk.register_forward_hook(_let_go)
        if tied:
            model.set_output_embeddings(Tied(model.get_input_embeddings()))
        for module in model.children():
            if module is not trunk and any(not isinstance(weight, DTensor) for weight in module.parameters()):
                fully_shard(module, **self._options).register_forward_hook(_let_go)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                _sum_gradients(module)

    def shard_alone(self, module: nn.Module) -> None:
        """Shard a module in place, apart from the model that it belongs to."""
        _sum_gradients(fully_shard(module, **self._options))


def check_in_step(model: Any, title: str) -> None:
    """Raise ValueError for a model that is asked about one response at a time, of which ranks have different numbers
    (a sharded one answers for all ranks at once), and for weights whose parts mean nothing."""
    if model.config._attn_implementation not in REGISTERED.values():
        raise ValueError(f"{title} cannot be sharded: it runs one response at a time, unpacked; use parallel=ddp")
    if reach(model.config.get_text_config()) is not None:
        raise ValueError(f"{title} cannot be sharded: its positions depend on lengths; use parallel=ddp")
    if any(not weight.is_floating_point() for weight in model.parameters()):
        raise ValueError(f"{title} cannot be sharded: its weights are quantised; use parallel=ddp")


def _sum_gradients(module: Any) -> None:
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def _let_go(module: Any, _: Any, __: Any) -> None:
    """Where no backward pass follows nothing would let go of what was gathered, and what follows would not see that
    weights have changed since."""
    if not torch.is_grad_enabled() and module not in _WHOLE:
        module.reshard()


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self._of = [embedding]  # in a list: it is the trunk's module, not this one's

    @property
    def weight(self) -> Tensor:
        """The embedding's."""
        weight: Any = self._of[0].weight
        return weight

    @property
    def bias(self) -> None:
        """None."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def forward(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... V"]:
        return nn.functional.linear(hidden, whole(self.weight))


def make_room(bare: nn.Module) -> None:
    """Give weights that take no memory some, of no particular values, on the device; sharded ones that of their
    parts."""
    device = best_device()
    bare._apply(lambda value: torch.empty_like(value, device=device) if value.is_meta else value.to(device))


@contextmanager
def without_weights() -> Iterator[None]:
    """Within, models are made whose weights take no memory; what is no weight is there."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            kept: Any = self._parameters
            kept[name] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@contextmanager
def one_after_another(several: bool) -> Iterator[None]:
    """Within, one of the processes of a machine is at a time, where `several` says so: each holds a whole model until
    it has taken its part."""
    here = int(os.environ.get("LOCAL_RANK", "0"))
    turns = range(max(ranks().gather(num_beside()))) if several else ()
    for _ in (turn for turn in turns if turn < here):
        ranks().wait()
    yield
    for _ in (turn for turn in turns if turn >= here):
        ranks().wait()


def _tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def skeleton(model: nn.Module) -> Any:
    """A copy of a model without its weights, which takes no memory; what is no weight is there."""
    bare = {
        id(weight): nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, dict(bare))


def none() -> Parallel:
    """One process, one device."""
    return Parallel()


def ddp(*, bucket_mib: float = 25.0) -> Parallel:
    """Every rank holds the whole model, its gradients and its moments, and takes its share of each optimiser batch;
    gradients are summed in buckets of so many MiB, each while the backward pass goes on, once an optimiser step."""
    return Replication(bucket_mib)


def _check_parts(_: Any, plan: RunPlan) -> None:
    """Refuse an optimiser that looks at whole weights, and weights that are quantised."""
    optim = plan.components["optim"]
    if optim.hooks.of_whole is not None:
        raise ValueError(
            f"optim={optim.name} {optim.hooks.of_whole}, and parallel=fsdp gives a rank parts of them; use "
            "parallel=ddp, or optim=adamw"
        )
    if (weights := plan.components["model"].options.get("weights")) in QUANTISED:
        raise ValueError(
            f"model.weights={weights} is quantised, and parallel=fsdp gives a rank parts of weights; use "
            "model.weights=bfloat16, which takes 2 bytes a weight over all ranks, or parallel=ddp"
        )


@component(check_run=_check_parts)
def fsdp(*, offload: bool = False, reduce: Literal["every_pass", "last_pass"] = "every_pass") -> Parallel:
    """Every rank holds a part of each weight, gradient and moment (FSDP2), and takes its share of each optimiser
    batch. `offload` keeps those of the decoder layers in main memory and brings them to the card when they are needed;
    `reduce` says when gradients are summed into the parts: in every pass, or in the last of a step, for which the
    whole gradients stay in memory."""
    if offload and not on_cuda():
        raise ValueError("parallel.offload=true has no effect on a CPU, whose memory is the main memory; leave it out")
    return Sharding(offload, reduce)
