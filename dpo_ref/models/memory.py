"""How much memory optimiser steps take, by part, found by making them with tensors that have shapes and no values
(torch's fake tensors): nothing is allocated, and what an architecture, an adapter or checkpointing keeps is kept.

On a CPU the C library adds to it. glibc (seen with 2.36) does not give a freed block to an aligned one of its size, so
what a forward pass frees between blocks that stay is lost until these go, and a little of the backward pass.
"""

import copy
import platform
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_ref.data.packing import collate
from dpo_ref.models.attention import register
from dpo_ref.models.folders import TEXT_FILES, opened
from dpo_ref.models.loading import TrainedModel, locate
from dpo_ref.models.logps import CHUNK_LOGITS, ON_CUDA, rows_alive
from dpo_ref.types import ResponseLogps, ResponseScores, TokenGroup

WEIGHTS, GRADIENTS, ACTIVATIONS, REST = "weights", "gradients", "activations", "log-prob chunk and the like"
MOMENTS, LIBRARY = "moments", "kept by the C library"
CHUNK = "chunk"  # of the rest
# What glibc takes besides, of what a forward pass frees and a backward pass asks for. Fitted to runs of SmolLM2-135M
# on pairs of many lengths, whole and by LoRA; packs that are all alike take up to a quarter more.
OF_FORWARD, OF_BACKWARD = 0.65, 0.06
MOST_LOST = 2  # times the activations: where few blocks stay, as with checkpointing, what lies between them is reused


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes at the peak of an optimiser step, by part, with packs of so many tokens."""

    parts: dict[str, int]
    num_tokens: int
    chunk: int  # of logits, at the peak: where activations are computed again it is gone by then

    @property
    def peak(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def by_token(self) -> float:
        """What grows with a pack, for each of its tokens: also what a layer's activations take while they are computed
        again."""
        growing = self.parts[ACTIVATIONS] + self.parts.get(LIBRARY, 0) + self.parts[REST] - self.chunk
        return growing / self.num_tokens

    def tokens_within(self, available: int) -> int:
        """How many tokens a pack may have that fits into so many bytes; 0 where none fits."""
        fixed = self.peak - self.by_token * self.num_tokens
        return max(0, int((available - fixed) / self.by_token))


class _LiveBytes(TorchDispatchMode):
    """What is alive of the tensors that are made on the device, by kind, and all that was asked for."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self._chunk = chunk  # bytes of logits
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.asked = 0
        self._sizes: dict[int, int] = {}
        self._kinds: dict[int, str] = {}

    def note(self, tensor: Tensor, kind: str) -> None:
        """A tensor is there."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        kind = CHUNK if (kind, size) == (REST, self._chunk) else kind
        self._sizes[key], self._kinds[key] = size, kind
        self.live[kind] += size
        self.asked += size
        weakref.finalize(storage, self._free, key)
        if sum(self.live.values()) > sum(self.at_peak.values()):
            self.at_peak = Counter(self.live)

    def mark(self, tensor: Tensor, kind: str) -> None:
        """A tensor that was there turns out to be of a kind."""
        key = tensor.untyped_storage()._cdata
        before = self._kinds.get(key, kind)
        if before == REST or (before, kind) == (ACTIVATIONS, GRADIENTS):  # a head's gradient waits in its node
            self.live[before] -= self._sizes[key]
            self.live[kind] += self._sizes[key]
            self._kinds[key] = kind

    def saved(self, tensor: Tensor) -> Tensor:
        """A tensor that a backward pass will need."""
        self.mark(tensor, ACTIVATIONS)
        return tensor

    def _free(self, key: int) -> None:
        self.live[self._kinds.pop(key)] -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and func is not torch.ops.dpo_ref.to_main_memory.default:
                self.note(tensor, REST)
        return out


def meta_model(path: str, revision: str | None = None) -> Any:
    """The causal language model at `path` without its weights, as a policy is loaded: float32, packed. Raises
    ValueError for what is no model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with opened(locate(path), "model.path", revision, TEXT_FILES, "no model could be loaded") as folder:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.set_attn_implementation(register("sdpa"))
    return model


def step_memory(
    policy: TrainedModel, groups: Sequence[TokenGroup], num_packs: int, device: torch.device
) -> StepMemory:
    """Of steps on packs like these groups; with several packs in a step gradients are there from the second on. The
    moments are two for each trained weight, of its size. The policy's weights are not looked at and may be on the meta
    device."""
    chunk = _chunk_bytes(policy.model, groups)
    live, asked = _LiveBytes(chunk), []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = _without_values(policy.model)
        fake = replace(policy, load=lambda: model)
        trained = [p for p in model.parameters() if p.requires_grad]
        for tensor in (*model.parameters(), *model.buffers()):
            live.note(tensor, WEIGHTS)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: live.mark(p.grad, GRADIENTS))
        model.train()
        with live, fake.precision():
            for _ in range(min(num_packs, 2)):
                live.at_peak, live.asked = Counter(), 0
                batch = collate(groups)
                with torch.autograd.graph.saved_tensors_hooks(live.saved, lambda tensor: tensor):
                    loss, outputs = fake.loss(batch, lambda part, span: _total(part))
                forward, live.asked = live.asked, 0
                del outputs
                loss.backward()
                del loss
                asked = [forward, live.asked]
    del mode
    parts = {name: live.at_peak[name] for name in (WEIGHTS, GRADIENTS, ACTIVATIONS, REST)}
    parts[MOMENTS] = 2 * sum(p.numel() * p.element_size() for p in trained)
    at_peak = live.at_peak[CHUNK]
    if device.type == "cuda":
        at_peak += max(0, _chunk_bytes(policy.model, groups, ON_CUDA, torch.bfloat16.itemsize) - chunk)
    parts[REST] += at_peak
    if device.type != "cuda" and platform.libc_ver()[0] == "glibc":
        freed = max(0, asked[0] - parts[ACTIVATIONS])
        parts[LIBRARY] = round(min(OF_FORWARD * freed, MOST_LOST * parts[ACTIVATIONS]) + OF_BACKWARD * asked[1])
    return StepMemory(parts, sum(group.num_tokens for group in groups), at_peak)


@singledispatch
def _total(outputs: Any) -> Tensor:
    """Something that depends on all that a model says of responses."""
    raise TypeError(f"{type(outputs).__name__} is nothing that an objective is handed")


@_total.register(ResponseLogps)
def _of_logps(outputs: ResponseLogps) -> Tensor:
    return outputs.sums.sum()


@_total.register(ResponseScores)
def _of_scores(outputs: ResponseScores) -> Tensor:
    return outputs.scores.sum()


def _without_values(model: nn.Module) -> Any:
    """The model with fake tensors in place of its own, in main memory."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    memo: dict[int, Any] = {}
    for key, tensor in tensors.items():
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        memo[key] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(model, memo)


def _chunk_bytes(model: Any, groups: Sequence[TokenGroup], times: int = 1, itemsize: int = 4) -> int:
    """What the logits take that are alive at once in a loss, of so many times those of a CPU; 0 without a head."""
    head = model.get_output_embeddings()
    if head is None:
        return 0
    vocab = len(head.weight)
    return rows_alive(collate(groups), max(1, times * CHUNK_LOGITS // vocab)) * vocab * itemsize
