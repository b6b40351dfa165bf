"""Attention over packs in which the responses of a group share one copy of their prompt.

A group lies in the pack as [prompt | y1 | ... | yk]; response yj sees the prompt and itself, never another response.
Every backend computes exactly that and differs only in how:

`sdpa`        any device. Piece by piece: [prompt | y1] causal, y2.. against prompt + themselves; on a CPU short groups
              in one call each, under a mask, and long responses in two, without one: memory grows with tokens, not
              with their square.
`varlen`      CUDA, the FlashAttention kernel inside torch. One launch: queries are the pieces, the keys of y2.. are
              gathered as prompt + themselves, and the causal mask is aligned at the bottom right. What the kernel does
              not take (float32, heads whose size is no multiple of 8 or above 256) goes piece by piece.
`flash_attn`  the same layout on the flash-attn package.
`eager`       the formula written out in matmuls, for architectures with soft-capping or sinks, and for tests.

They reach the model through transformers' attention interface. The layout takes the place of the mask (`laid_out`),
which every architecture hands to its attention layers, whatever else it leaves out.
"""

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dpo_ref.distributed import on_cuda

# Our names in transformers' registry. It searches names for "sdpa" and "flash" and then applies rules of its own.
REGISTERED = {
    "flash_attn": "packed_by_package",
    "varlen": "packed_varlen",
    "sdpa": "packed_dense",
    "eager": "packed_formula",
}

KERNELS = ("flash_attn", "varlen")
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_HEADS = range(8, 257, 8)  # head sizes

SHORT = 96  # tokens; on a CPU one call for a whole group is faster up to here (benchmarks/small_models.py)
LARGEST_MASK = 2**18  # entries; a kernel keeps one for its backward pass, in the queries' dtype, in every layer

Group = tuple[int, tuple[int, ...]]  # the lengths of its prompt and of its responses
Layout = tuple[Group, ...]
# Of q, k, v, mask (None: causal, aligned at the bottom right) and scaling.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def _pieces_of(group: Group) -> list[int]:
    prompt, responses = group
    return [prompt + responses[0], *responses[1:]]


class PackedLayout:
    """What attention needs to know about one pack; built once per forward pass and shared by all layers."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self.pieces = [size for group in layout for size in _pieces_of(group)]
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def note(self, attention_mask: "PackedMask", window: int | None, head_sizes: tuple[int, int]) -> None:
        """Called once per layer; `packable` listens here."""

    def is_short(self, group: Group) -> bool:
        """Whether one call computes its attention, under a mask, and not one for every piece."""
        prompt, responses = group
        return self.device.type == "cpu" and len(responses) > 1 and prompt + sum(responses) <= SHORT

    @cached_property
    def runs(self) -> list[int]:
        """How many tokens one call takes after the other: short groups, and pieces of all others."""
        short = ((group, self.is_short(group)) for group in self.layout)
        return [size for group, whole in short for size in ([sum(_pieces_of(group))] if whole else _pieces_of(group))]

    def group_mask(self, group: Group, window: int | None) -> Bool[Tensor, "t t"]:
        """Which tokens of a group see which: a response the prompt and itself, causal and windowed by position."""
        if (group, window) not in self._masks:
            prompt, responses = group
            size = prompt + sum(responses)
            mask = torch.ones(size, size, dtype=torch.bool, device=self.device).tril_()
            for begin, length in zip(accumulate(responses, initial=prompt), responses, strict=False):
                mask[begin + length :, begin : begin + length] = False
            if window is not None:
                runs = [torch.arange(prompt), *(torch.arange(prompt, prompt + length) for length in responses)]
                positions = torch.cat(runs).to(self.device)
                mask &= positions[:, None] - positions < window
            self._masks[group, window] = mask
        return self._masks[group, window]

    def causal_mask(self, num_queries: int, num_keys: int, window: int | None) -> Bool[Tensor, "q k"] | None:
        """Which of the last `num_queries` positions see which keys: causal, aligned at the bottom right, windowed.
        None where no window hides any, and the mask would be square or, on a CPU, large."""
        large = self.device.type == "cpu" and num_queries * num_keys > LARGEST_MASK
        if window is None and (num_queries == num_keys or large):
            return None
        key = (num_queries, num_keys, window)
        if key not in self._masks:
            keys = torch.arange(num_keys, device=self.device)
            distance = keys[num_keys - num_queries :, None] - keys[None, :]
            self._masks[key] = (distance >= 0) & (distance < (window or num_keys))
        return self._masks[key]

    @cached_property
    def varlen(self) -> tuple[Int[Tensor, " S"], Int[Tensor, " K"], Int[Tensor, " S"], int, int]:
        """Cumulative query lengths, the keys' indices in the pack, cumulative key lengths, longest query and key run.

        Every piece is a query run; its keys are its group's prompt followed by itself (the first piece contains the
        prompt already).
        """
        key_runs, start = [], 0
        for prompt, responses in self.layout:
            key_runs.append(torch.arange(start, start + prompt + responses[0]))
            begin = start + prompt + responses[0]
            for size in responses[1:]:
                key_runs.append(torch.cat([torch.arange(start, start + prompt), torch.arange(begin, begin + size)]))
                begin += size
            start = begin
        key_sizes = [len(run) for run in key_runs]
        cumulative = (
            torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=self.device)
            for sizes in (self.pieces, key_sizes)
        )
        cu_q, cu_k = cumulative
        return cu_q, torch.cat(key_runs).to(self.device), cu_k, max(self.pieces), max(key_sizes)


class _AfterPrompt(torch.autograd.Function):
    """Attention of a response's tokens to a prompt, all of it, and to themselves, causally: torch's kernel for CPUs
    once for each, joined by the log-normalisers. No mask is made, memory is linear in both lengths."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k_prompt: Tensor, v_prompt: Tensor, k: Tensor, v: Tensor, scaling: float
    ) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        of_prompt, log_prompt = kernel(q, k_prompt, v_prompt, is_causal=False, scale=scaling)
        out, log_own = kernel(q, k, v, is_causal=True, scale=scaling)
        log_all = torch.logaddexp(log_prompt, log_own)
        out = torch.lerp(out, of_prompt, (log_prompt - log_all).exp()[..., None].to(out.dtype))
        ctx.save_for_backward(q, k_prompt, v_prompt, k, v, out, log_all)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Handed the output and the normalisers of both, the kernel gives each one's part of the gradient."""
        q, k_prompt, v_prompt, k, v, out, log_all = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        rest = (out, log_all, 0.0)
        d_q, d_k_prompt, d_v_prompt = kernel(grads[0], q, k_prompt, v_prompt, *rest, False, scale=ctx.scaling)
        d_q_own, d_k, d_v = kernel(grads[0], q, k, v, *rest, True, scale=ctx.scaling)
        return d_q + d_q_own, d_k_prompt, d_v_prompt, d_k, d_v, None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    before = k.shape[2] - q.shape[2]
    if mask is None and before and q.shape[3] == v.shape[3]:
        (k_prompt, k_own), (v_prompt, v_own) = (x.tensor_split((before,), dim=2) for x in (k, v))
        return _AfterPrompt.apply(q, k_prompt, v_prompt, k_own, v_own, scaling)  # pyright: ignore
    if mask is None and before:
        mask = _lower_right(q, k)
    grouped = q.shape[1] != k.shape[1]
    causal = mask is None  # the kernel then leaves out what lies above the diagonal
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scaling, enable_gqa=grouped)


def _lower_right(q: Tensor, k: Tensor) -> Bool[Tensor, "q k"]:
    """The causal mask."""
    return q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril_(k.shape[2] - q.shape[2])


def _formula(softcap: float | None, sinks: Tensor | None) -> Attend:
    """Attention written out in matmuls, with Gemma's soft-capping and GPT-OSS's sinks."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        mask = _lower_right(q, k) if mask is None else mask
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        scores = (q @ k.transpose(-1, -2)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if sinks is None:
            return scores.softmax(dim=-1) @ v
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1] @ v

    return attend


def _dense(attend: Attend, q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, window: int | None, scaling: float):
    """Run `attend` on every short group and on the pieces of all others. Split, not sliced: the backward pass of a
    slice allocates a zero tensor as long as the whole pack."""
    q_runs, k_runs, v_runs = (x.split(packed.runs, dim=2) for x in (q, k, v))
    runs = zip(q_runs, k_runs, v_runs, strict=True)
    outputs: list[Tensor] = []
    for group in packed.layout:
        whole = packed.is_short(group)
        parts = [(*next(runs), packed.group_mask(group, window))] if whole else _pieces(group, runs, packed, window)
        outputs += [attend(*part, scaling) for part in parts]
    return torch.cat(outputs, dim=2)


def _pieces(
    group: Group, runs: Iterator[tuple[Tensor, Tensor, Tensor]], packed: PackedLayout, window: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Queries, keys, values and mask of [prompt | y1], then of y2.. against prompt + themselves."""
    prompt, responses = group
    q, k, v = next(runs)
    yield from _blocks(q, k, v, packed, window)
    for q_own, k_own, v_own in islice(runs, len(responses) - 1):
        keys, values = (torch.cat([x[:, :, :prompt], own], dim=2) for x, own in ((k, k_own), (v, v_own)))
        yield from _blocks(q_own, keys, values, packed, window)


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, window: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """A piece with its mask. Where a window would make that large, as many queries at a time as the window has tokens,
    against the keys that they see: their masks have the window's size, whatever the piece's."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    if window is None or num_queries * num_keys <= LARGEST_MASK:
        yield q, k, v, packed.causal_mask(num_queries, num_keys, window)
        return
    end = num_keys - num_queries
    for block in q.split(window, dim=2):
        first, end = max(0, end + 1 - window), end + block.shape[2]
        mask = packed.causal_mask(block.shape[2], end - first, window)
        yield block, k[:, :, first:end], v[:, :, first:end], mask


def _varlen_kernel() -> Callable[..., Tensor]:
    """torch's own FlashAttention; its keywords changed between torch 2.11 and 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, scaling: float, window: int | None) -> Tensor:
        options: dict[str, Any] = {"scale": scaling}
        if "window_size" in parameters:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        elif window is None:
            options["is_causal"] = True
        else:
            raise ValueError("model.attention=varlen: this torch has no sliding window in varlen; use sdpa")
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = varlen_attn(q.to(v.dtype), k.to(v.dtype), v, cu_q, cu_k, max_q, max_k, **options)
        assert isinstance(out, Tensor)  # a tuple only when the log-normaliser is asked for
        return out

    return kernel


def _flash_attn_kernel() -> Callable[..., Tensor]:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, scaling: float, window: int | None) -> Tensor:
        size = (-1 if window is None else window - 1, 0)
        options = {"softmax_scale": scaling, "causal": True, "window_size": size}
        return flash_attn_varlen_func(q.to(v.dtype), k.to(v.dtype), v, cu_q, cu_k, max_q, max_k, **options)

    return kernel


def run_varlen(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, window: int | None, scaling):
    """Run a variable-length kernel on the pack: (1, H, T, D) in, (1, H, T, D) out."""
    cu_q, keys, cu_k, max_q, max_k = packed.varlen
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    out = kernel(q, k.index_select(0, keys), v.index_select(0, keys), cu_q, cu_k, max_q, max_k, scaling, window)
    return out.transpose(0, 1)[None]


def _interface(backend: str) -> Callable[..., tuple[Tensor, None]]:
    """The function transformers calls once per layer. Raises rather than ignore an argument it does not implement."""
    kernel = {"varlen": _varlen_kernel, "flash_attn": _flash_attn_kernel}.get(backend, lambda: None)()

    def attention(
        module: nn.Module,
        query: Float[Tensor, "1 Hq T D"],
        key: Float[Tensor, "1 Hkv T D"],
        value: Float[Tensor, "1 Hkv T Dv"],
        attention_mask: object,
        scaling: float,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        if not isinstance(attention_mask, PackedMask) or dropout != 0.0:
            raise ValueError(f"{type(module).__name__} lost the pack's layout or uses attention dropout: not packable")
        packed, head_sizes = attention_mask.packed, (query.shape[-1], value.shape[-1])
        packed.note(attention_mask, sliding_window, head_sizes)
        special = softcap is not None or s_aux is not None
        if kernel is not None and not special and value.dtype in KERNEL_DTYPES and kernels_take(head_sizes):
            out = run_varlen(kernel, query, key, value, packed, sliding_window, scaling)
        else:
            attend = _formula(softcap, s_aux) if backend == "eager" or special else _sdpa
            out = _dense(attend, query, key, value, packed, sliding_window, scaling)
        return out.transpose(1, 2).contiguous(), None

    return attention


def kernels_take(head_sizes: tuple[int, int]) -> bool:
    """Whether the FlashAttention kernels know heads of these sizes, of queries and of values."""
    of_queries, of_values = head_sizes
    return of_queries == of_values and of_values in KERNEL_HEADS


def available(backend: str) -> bool:
    """Whether `backend` can run here: the kernels need CUDA, flash_attn also its package."""
    if backend == "flash_attn":
        return on_cuda() and importlib.util.find_spec("flash_attn") is not None
    if backend == "varlen":
        has_varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
        return has_varlen and on_cuda()
    return True


def resolve_backend(requested: str) -> str:
    """`auto` becomes the fastest backend there is; a named one that cannot run here is an error."""
    if requested == "auto":
        return next(name for name in REGISTERED if available(name))
    if requested not in REGISTERED:
        raise ValueError(f"model.attention={requested} is none of auto, {', '.join(REGISTERED)}")
    if not available(requested):
        how = "a CUDA device and `make flash` (pip install -r requirements-flash.txt)"
        need = how if requested == "flash_attn" else "a CUDA device and torch >= 2.11"
        raise ValueError(f"model.attention={requested} needs {need}; model.attention=auto takes what is here")
    return requested


@cache
def register(backend: str) -> str:
    """Make `backend` known to transformers and return the name to give to `set_attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    name = REGISTERED[backend]
    # Lengths of pieces are Python numbers: compiled, attention would specialise on every pack.
    attention: Any = torch.compiler.disable(_interface(backend))
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _packed_mask)
    return name


@dataclass(frozen=True)
class PackedMask:
    """What attention layers are handed as their mask: the layout is the mask; the rule by which transformers would
    have made one travels along for `packable` to ask."""

    packed: PackedLayout
    rule: Callable[..., Any] | None


_LAYOUT: ContextVar[PackedLayout] = ContextVar("the layout of the pack under way")


@contextmanager
def laid_out(packed: PackedLayout) -> Iterator[None]:
    """Within, a model with packed attention is called on a pack of this layout."""
    token = _LAYOUT.set(packed)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def layout_under_way() -> PackedLayout:
    """The layout of the pack that a model is being called on."""
    return _LAYOUT.get()


def _packed_mask(*args: Any, mask_function: Callable[..., Any] | None = None, **kwargs: Any) -> PackedMask:
    """Called once per forward pass and kind of layer, where transformers makes its masks."""
    return PackedMask(layout_under_way(), mask_function)
