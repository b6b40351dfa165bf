"""Losses on tokens, single responses and whole batches against TRL's own code."""

import pytest
import torch

from dpo_ref.objectives.coupled import aot, beta_dpo
from dpo_ref.objectives.interface import BatchLogps, Mismatched, TokenPairLogps
from dpo_ref.objectives.pairwise import dpo, ld_dpo, wpo
from dpo_ref.objectives.unpaired import bco, kto
from dpo_ref.types import ResponseLogps
from tests.support.trl_losses import (
    LENGTHS,
    NUM_PAIRS,
    PROMPT,
    completion_mask,
    dpo_loss,
    dpo_loss_with_reference_tokens,
    kto_loss,
    pairs,
    token_logps,
    value_and_gradient,
)


def drawn(seed, *shape):
    return -3 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def responses(sums):
    return ResponseLogps(sums, torch.ones(len(sums)).long(), torch.ones(len(sums)).long(), None)


def token_pairs(padded):
    """[2B, longest] as flat values."""
    starts = (LENGTHS.cumsum(0) - LENGTHS).chunk(2)
    flat = padded[completion_mask(LENGTHS)[:, PROMPT:].bool()]
    sizes = [*LENGTHS.chunk(2), *LENGTHS.chunk(2)]
    return TokenPairLogps(*padded.sum(1).chunk(2), *sizes, flat, *starts)


def test_ld_dpo_is_trls_with_policy_and_reference_both_shortened():
    leaf, *_ = token_logps(torch.float64)
    there = completion_mask(LENGTHS)[:, PROMPT:]  # TRL's sums run over padding, where all is 0
    policy, reference = leaf * there, drawn(8, *leaf.shape) * there
    ours = ld_dpo(token_pairs(policy), token_pairs(reference), beta=0.3, alpha=0.4).losses.mean()
    theirs = dpo_loss_with_reference_tokens(policy, reference, LENGTHS, loss_type="sigmoid", beta=0.3, ld_alpha=0.4)
    torch.testing.assert_close(value_and_gradient(ours, leaf), value_and_gradient(theirs, leaf))


def test_wpo_is_trls_weighting():
    leaf, ref_chosen, ref_rejected = token_logps(torch.float64)
    collisions = drawn(9, *leaf.shape) * completion_mask(LENGTHS)[:, PROMPT:]
    ours = wpo(
        pairs(*leaf.sum(1).chunk(2)), pairs(ref_chosen, ref_rejected), pairs(*collisions.sum(1).chunk(2)), beta=0.3
    ).losses.mean()
    theirs = dpo_loss(leaf, LENGTHS, ref_chosen, ref_rejected, "sigmoid", collisions, beta=0.3, use_weighting=True)
    torch.testing.assert_close(value_and_gradient(ours, leaf), value_and_gradient(theirs, leaf))


def test_aot_of_a_whole_batch_is_trls_of_a_batch():
    leaf, ref_chosen, ref_rejected = token_logps(torch.float64)
    ref_chosen = ref_chosen.flip(0)  # another order than the policy's
    policy, reference = pairs(*leaf.sum(1).chunk(2)), pairs(ref_chosen, ref_rejected)
    whole = BatchLogps(pairs(*leaf.detach().sum(1).chunk(2)), reference, None, slice(0, NUM_PAIRS))
    ours = aot(policy, reference, whole, beta=0.3).losses.mean()
    theirs = dpo_loss(leaf, LENGTHS, ref_chosen, ref_rejected, loss_type="aot", beta=0.3)
    torch.testing.assert_close(value_and_gradient(ours, leaf), value_and_gradient(theirs, leaf))
    assert not torch.allclose(ours, dpo(policy, reference, beta=0.3).losses.mean(), rtol=1e-3)


@pytest.mark.parametrize("shift", [1.5, -1.5], ids=["positive KL", "negative KL"])
def test_kto_is_kto_trainers_on_the_same_mismatched_responses(shift):
    labels = torch.tensor([True, False, True, True, False])
    leaf, reference = drawn(1, 5).requires_grad_(), drawn(2, 5)
    mismatched = Mismatched(drawn(3, 5) + shift, drawn(4, 5))
    options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    ours = kto(responses(leaf), responses(reference), labels, mismatched, **options).losses.mean()
    theirs = kto_loss(leaf, reference, labels, *mismatched, **options)
    torch.testing.assert_close(value_and_gradient(ours, leaf), value_and_gradient(theirs, leaf))


def test_bco_without_shift_is_trls_bco_pair():
    """Pairs split into two responses each, in a batch whose rewards balance: delta is 0."""
    leaf, ref_chosen, ref_rejected = token_logps(torch.float64)
    policy, reference = leaf.sum(1), torch.cat([ref_chosen, ref_rejected])
    labels = torch.arange(2 * NUM_PAIRS) < NUM_PAIRS
    gaps = (policy - reference).detach()
    seen = responses(torch.cat([gaps, -gaps])), responses(torch.zeros(4 * NUM_PAIRS).double())
    balanced = BatchLogps(*seen, torch.cat([labels, labels]), slice(0, 2 * NUM_PAIRS))
    ours = bco(responses(policy), responses(reference), labels, balanced, beta=0.3).losses.sum() / NUM_PAIRS
    theirs = dpo_loss(leaf, LENGTHS, ref_chosen, ref_rejected, loss_type="bco_pair", beta=0.3)
    torch.testing.assert_close(value_and_gradient(ours, leaf), value_and_gradient(theirs, leaf))


def test_beta_dpo_is_dpo_where_the_batch_is_as_usual():
    leaf, ref_chosen, ref_rejected = token_logps(torch.float64)
    policy, reference = pairs(*leaf.sum(1).chunk(2)), pairs(ref_chosen, ref_rejected)
    whole = BatchLogps(pairs(*leaf.detach().sum(1).chunk(2)), reference, None, slice(0, NUM_PAIRS))
    ratios = policy.chosen - ref_chosen - policy.rejected + ref_rejected
    running = {"mean_margin": 0.3 * ratios.detach().mean()}
    ours = beta_dpo(policy, reference, whole, running, beta=0.3).losses.mean()
    theirs = dpo_loss(leaf, LENGTHS, ref_chosen, ref_rejected, loss_type="sigmoid", beta=0.3)
    torch.testing.assert_close(value_and_gradient(ours, leaf), value_and_gradient(theirs, leaf))
