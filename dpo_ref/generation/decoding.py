"""The decoding loop: a batch of prompts goes in, each row leaves when it has ended.

A library's loop draws from one generator for the whole batch, so its samples change with the batch size. Here every
row has its own stream of random numbers (noise.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dpo_ref.generation.noise import gumbel
from dpo_ref.logps import head_of


@dataclass(frozen=True, slots=True)
class Rule:
    """How the next token is chosen: temperature 0 is greedy; `end_ids` end an answer; `never` are never chosen."""

    temperature: float
    top_p: float
    max_new_tokens: int
    end_ids: Int[Tensor, " E"]
    never: Int[Tensor, " B"]


@contextmanager
def decoding_mode(model: Any) -> Iterator[None]:
    """Evaluation mode and transformers' own attention, which knows KV caches and padding; restored afterwards."""
    training, attention = model.training, model.config._attn_implementation
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    plain = "sdpa" if getattr(model, "_supports_sdpa", True) and softcap is None else "eager"
    model.eval()
    model.set_attn_implementation(plain)
    # Layers compiled for training would be compiled again for a cache that grows by one position a step.
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
        model.set_attn_implementation(attention)
        model.train(training)


def _nucleus(logits: Float[Tensor, "S V"], top_p: float) -> Bool[Tensor, "S V"]:
    """The smallest set of likeliest tokens whose probabilities sum to at least `top_p` (Holtzman et al. 2020)."""
    probs, order = logits.double().softmax(dim=-1).sort(dim=-1, descending=True)
    kept = probs.cumsum(dim=-1) - probs < top_p
    return torch.zeros_like(kept).scatter(-1, order, kept)


def choose(logits: Float[Tensor, "S V"], streams: Int[Tensor, " S"], step: int, rule: Rule) -> Int[Tensor, " S"]:
    """The next token of each row."""
    logits = logits.index_fill(-1, rule.never, -torch.inf)
    if rule.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / rule.temperature
    if rule.top_p < 1:
        logits = logits.masked_fill(~_nucleus(logits, rule.top_p), -torch.inf)
    return (logits + gumbel(streams, step, logits.shape[-1])).argmax(dim=-1)


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask [S, longest]; what stands in the padding is masked and does not matter."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@torch.no_grad()
def decode(model: Any, prompts: Sequence[Sequence[int]], streams: Int[Tensor, " S"], rule: Rule) -> list[list[int]]:
    """The tokens that follow each of S prompts, the end token included if it was reached.

    `model` is in `decoding_mode`; `streams` (on the CPU) names each row's random numbers.
    """
    device, backbone, head = next(model.parameters()).device, model.base_model, head_of(model)
    ids, mask = _left_padded(prompts, device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    streams, rows = streams.to(device), torch.arange(len(prompts), device=device)
    drawn = torch.full((len(prompts), rule.max_new_tokens), -1, device=device)
    cache = None
    for step in range(rule.max_new_tokens):
        output = backbone(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        tokens = choose(head.logits(output[0][:, -1]), streams, step, rule)
        drawn[rows, step] = tokens
        going_on = torch.isin(tokens, rule.end_ids, invert=True).nonzero().flatten()
        if len(going_on) == 0:
            break
        if len(going_on) < len(rows):
            rows, streams, tokens, mask, positions = (
                x.index_select(0, going_on) for x in (rows, streams, tokens, mask, positions)
            )
            cache.batch_select_indices(going_on)
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return [[token for token in row if token >= 0] for row in drawn.tolist()]
