"""Random numbers that depend on what they are for and on nothing else.

Each sampled sequence has a stream of its own, named by (seed, prompt, sample). The number used for vocabulary entry v
at step t is a function of (stream, t, v), a counter put through the finaliser of SplitMix64 (Steele, Lea, Flood 2014,
OOPSLA). So batch size, batch order and device change nothing.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo_ref.types import Message, digest

WEYL, MIX_1, MIX_2 = (
    value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # as signed 64-bit integers; torch wraps around on overflow


def stream_name(seed: int, prompt: Sequence[Message], occurrence: int, sample_index: int) -> int:
    """A signed 64-bit name for one sequence's stream; `occurrence` counts equal prompts before this one."""
    return int(digest([seed, list(prompt), occurrence, sample_index])[:16], 16) - 2**63


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (bits >> places).bitwise_and_((1 << (64 - places)) - 1)


def random_bits(streams: Int[Tensor, " S"], step: int, size: int) -> Int[Tensor, "S size"]:
    """64 random bits for each stream and each of `size` entries at `step`."""
    counters = torch.arange(1, size + 1, device=streams.device) + step * size
    bits = streams[:, None] + (counters * WEYL)[None, :]
    bits = bits.bitwise_xor_(_shifted(bits, 30)).mul_(MIX_1)
    bits = bits.bitwise_xor_(_shifted(bits, 27)).mul_(MIX_2)
    return bits.bitwise_xor_(_shifted(bits, 31))


def gumbel(streams: Int[Tensor, " S"], step: int, size: int) -> Float[Tensor, "S size"]:
    """Standard Gumbel noise: argmax(logits + noise) is a draw from softmax(logits) (Maddison et al. 2014, NeurIPS).

    It is -log(E) with E exponential. E = -log1p(-u) keeps its relative precision where it matters, for small u, so
    float32 suffices; u is at least 2^-54.
    """
    uniform = _shifted(random_bits(streams, step, size), 11).float().add_(0.5).mul_(2.0**-53)
    return uniform.neg_().log1p_().neg_().log_().neg_()
