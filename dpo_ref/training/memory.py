"""What a training step needs before anything is loaded: bytes by part at its peak, and floating-point operations.

The step itself is run, by the code that trains, on tensors with shapes and no storage (torch's fake tensors): what
the forward pass keeps for the backward pass is what the model at hand keeps, with its adapter, checkpointing and
attention, and no formula has to know it. Counted is what is alive, as `torch.cuda.max_memory_allocated` counts it.
What an allocator holds beside that is not in it. glibc's heap never shrinks here (`distributed.keep_memory`), and a
block that was freed is too small for an aligned one of the same size: the resident memory of a full run of
SmolLM2-135M was 1.19 times, that of one with an adapter 1.8 times as large.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_ref.data.packing import collate
from dpo_ref.models.attention import Layout
from dpo_ref.models.loading import Policy
from dpo_ref.training.optim import Optimisation
from dpo_ref.training.trainer import update
from dpo_ref.types import ResponseLogps, Span, TokenGroup

PARTS = ("weights", "gradients", "moments", "activations", "temporaries")
WEIGHTS, GRADIENTS, MOMENTS, ACTIVATIONS, TEMPORARIES = PARTS


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes alive at the peak of a run's steps, by part, and the peak of each phase: the pass that the reference table
    takes, forward, backward, update."""

    weights: int
    gradients: int
    moments: int  # of the optimiser
    activations: int  # kept for the backward pass
    temporaries: int  # a chunk of logits with its gradient, the head's gradient, results on their way
    phases: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return self.weights + self.gradients + self.moments + self.activations + self.temporaries


def step_memory(
    model: nn.Module,
    optimise: Callable[[nn.Module], Optimisation],
    packs: Sequence[Layout],
    compute_dtype: torch.dtype = torch.float32,
) -> Memory:
    """The memory of optimiser steps over `packs`, each the lengths of its groups' prompts and responses.

    `model` is a causal language model on the meta device as it is trained: dtype, adapter (what requires a gradient is
    trained), checkpointing, attention; it is used up. `optimise` makes its optimiser, as `optim.optimisation` does.
    Two steps are run, the first of which makes the moments; seconds a pack, so of many give the largest twice. Of a
    CPU: on CUDA chunks of logits are larger (`logps.ON_CUDA`) and half as wide. Held against real steps of all weights
    and of an adapter (within a tenth, tested); with checkpointing a small model took a third more than is said here.
    """
    optim = optimise(model)
    counted = _Alive()
    with FakeTensorMode():
        twins = _without_storage(model)
        for group in optim.optimizer.param_groups:
            group["params"] = [twins[parameter] for parameter in group["params"]]
        policy = Policy(lambda: model, None, compute_dtype)
        _watch_weights(counted, model)
        with counted, policy.precision():
            _reference_pass(policy, packs, counted)
            for step in range(2):
                _step(policy, optim, packs, step, counted)
    return Memory(**counted.at_peak, phases=counted.phases)


def _without_storage(model: nn.Module) -> dict[Tensor, nn.Parameter]:
    """Put fake tensors in the place of the model's weights and buffers; the weights, by those that they replace."""
    twins: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight not in twins:
                empty = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
                twins[weight] = nn.Parameter(empty, requires_grad=weight.requires_grad)
            module._parameters[name] = twins[weight]
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return twins


def _groups(layout: Layout) -> list[TokenGroup]:
    return [
        TokenGroup(index, "", [0] * prompt, tuple([0] * n for n in sizes), tuple(1 for _ in sizes), ((0, 1),))
        for index, (prompt, sizes) in enumerate(layout)
    ]


def _any_loss(outputs: ResponseLogps, span: Span) -> Float[Tensor, ""]:
    """An objective's own tensors are of one number a response, and count for nothing."""
    return outputs.sums.sum()


def _reference_pass(policy: Policy, packs: Sequence[Layout], counted: "_Alive") -> None:
    policy.model.eval()
    with torch.no_grad(), counted.phase("reference"):
        for layout in packs:
            policy.outputs(collate(_groups(layout)))


def _step(policy: Policy, optim: Optimisation, packs: Sequence[Layout], step: int, counted: "_Alive") -> None:
    policy.model.train()
    for layout in packs:
        batch = collate(_groups(layout))
        with counted.phase("forward"), torch.autograd.graph.saved_tensors_hooks(counted.kept, lambda kept: kept):
            loss, outputs = policy.loss(batch, _any_loss)
        with counted.phase("backward"):
            loss.backward()
            del loss, outputs
    with counted.phase("update"):
        update(policy, optim, step, torch.ones((), dtype=torch.bool))
    for state in optim.optimizer.state.values():
        for moment in state.values():
            counted.is_part(moment, MOMENTS)


def _watch_weights(counted: "_Alive", model: nn.Module) -> None:
    for weight in [*model.parameters(), *model.buffers()]:
        counted.note(weight)
        counted.is_part(weight, WEIGHTS)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(counted.gradient_of)


class _Alive(TorchDispatchMode):
    """Counts the storages that operations make, by what they are for, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self._stored: dict[int, tuple[str, int]] = {}  # part and bytes of every storage that is alive
        self._alive: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
        self._phase = "reference"
        self.phases: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is made within counts towards this phase's peak."""
        self._phase = name
        self._look()
        yield

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default:
            return 1  # there is no number to read; sizes do not depend on it
        results = operation(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self.note(result)
        return results

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage once, from here until nothing holds it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._stored:
            return
        self._stored[key] = (TEMPORARIES, storage.nbytes())
        self._alive[TEMPORARIES] += storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self._look()

    def is_part(self, tensor: Tensor | None, part: str) -> None:
        """Say what a storage is for; one that has become a weight's gradient or a moment stays that."""
        key = None if tensor is None else tensor.untyped_storage()._cdata
        known, size = self._stored.get(key, ("", 0)) if key is not None else ("", 0)
        if key is not None and known != part and known in (TEMPORARIES, ACTIVATIONS):  # two may keep the same one
            self._stored[key] = (part, size)
            self._alive.update({known: -size, part: size})

    def kept(self, tensor: Tensor) -> Tensor:
        """A hook of saved tensors."""
        self.is_part(tensor, ACTIVATIONS)
        return tensor

    def gradient_of(self, weight: Tensor) -> None:
        """A hook of a weight whose gradient has been added to."""
        self.is_part(weight.grad, GRADIENTS)

    def _forget(self, key: int) -> None:
        part, size = self._stored.pop(key)
        self._alive[part] -= size

    def _look(self) -> None:
        alive = self._alive.total()
        self.phases[self._phase] = max(alive, self.phases.get(self._phase, 0))
        if alive > sum(self.at_peak.values()):
            self.at_peak = dict(self._alive)


# --- operations


def useful_flops(packs: Sequence[Layout], body: int, head: int, layers: int, width: int) -> float:
    """Floating-point operations of a step with the gradient of all weights, without recomputation and reference:

        3 Σ [ 2 body (P + ΣC) + 2 head ΣC + 4 layers width Σ(causal context lengths) ]

    over groups of a prompt of P tokens and responses of C. `body` are the parameters of the layers' matrices, `head`
    those of the language-model head, `width` is heads times head size: attention's two products for every query.
    """
    total = 0.0
    for prompt, sizes in (group for layout in packs for group in layout):
        context = prompt * (prompt + 1) / 2 + sum(prompt * size + size * (size + 1) / 2 for size in sizes)
        scored = sum(sizes)
        total += 2 * body * (prompt + scored) + 2 * head * scored + 4 * layers * width * context
    return 3 * total
