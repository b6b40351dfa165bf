"""The gradient made in the forward pass is the gradient: full logits in float64, any head, any chunking."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ref.data.packing import collate
from dpo_ref.models import logps
from dpo_ref.models.logps import Head, sum_by_response
from dpo_ref.objectives.interface import ObjectiveInputs, bind
from dpo_ref.objectives.pairwise import dpo
from dpo_ref.objectives.unpaired import sft
from dpo_ref.types import ResponseLogps
from tests.support.tiny import random_groups

HIDDEN, VOCAB = 7, 29
LAYOUTS = st.lists(
    st.tuples(st.integers(1, 4), st.tuples(st.integers(1, 9), st.integers(1, 9))), min_size=1, max_size=6
)
HEADS = [(False, 1.0, None), (True, 0.5, None), (True, 2.0, 3.0)]


def leaves(num_tokens, bias):
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(num_tokens, HIDDEN), (VOCAB, HIDDEN), *([(VOCAB,)] if bias else [])]
    return [torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("bias", "scale", "softcap"), HEADS)
@pytest.mark.parametrize("objective", [bind(dpo, beta=0.7), bind(sft)], ids=["dpo", "sft"])
@settings(max_examples=25, deadline=None)
@given(layout=LAYOUTS, tokens_per_chunk=st.integers(1, 30))
def test_fused_equals_full_logits(objective, bias, scale, softcap, layout, tokens_per_chunk):
    batch = collate(random_groups(layout, vocab=VOCAB))
    generator = torch.Generator().manual_seed(0)
    reference_tokens = torch.randn(len(batch.target_ids), dtype=torch.float64, generator=generator)
    reference = ResponseLogps(
        sum_by_response(reference_tokens, batch), batch.lengths, batch.num_bytes, reference_tokens
    )
    hidden, weight, *rest = inputs = leaves(len(batch.target_ids), bias)
    head = Head(weight, rest[0] if bias else None, scale, softcap)

    full = torch.nn.functional.linear(hidden, weight, head.bias) * scale
    full = full if softcap is None else softcap * torch.tanh(full / softcap)
    tokens = full.log_softmax(-1).gather(1, batch.target_ids[:, None]).squeeze(1)
    want_policy = ResponseLogps(sum_by_response(tokens, batch), batch.lengths, batch.num_bytes, tokens)
    want = objective(want_policy, ObjectiveInputs(batch, reference)).losses.sum()
    want_gradients = torch.autograd.grad(0.3 * want, inputs)

    def loss_of(policy, span):
        return objective(policy, ObjectiveInputs(batch, reference).part(span)).losses.sum()

    before, logps.CHUNK_LOGITS = logps.CHUNK_LOGITS, tokens_per_chunk * VOCAB
    try:
        got, token_logps = logps.FusedLoss.apply(hidden, head.weight, head.bias, head, batch, loss_of)
    finally:
        logps.CHUNK_LOGITS = before
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(token_logps, tokens, atol=1e-10, rtol=1e-10)
    for ours, theirs in zip(torch.autograd.grad(0.3 * got, inputs), want_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
