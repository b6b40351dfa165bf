"""Losses and gradients against TRL's own code, on responses of unequal lengths."""

import pytest
import torch
import torch.nn.functional as F

from dpo_ref.objectives.coupled import alphadpo
from dpo_ref.objectives.interface import BatchLogps, bind
from dpo_ref.objectives.mix import mix
from dpo_ref.objectives.pairwise import (
    alpha_divergence_dpo,
    apo_down,
    apo_zero,
    cal_dpo,
    cdpo,
    discopop,
    dpo,
    dpo_norm,
    dpo_shift,
    exo,
    forward_kl_dpo,
    hinge,
    ipo_mean,
    ipo_sum,
    js_dpo,
    nca,
    robust_dpo,
    sppo,
)
from dpo_ref.objectives.reference_free import cpo, orpo, simper, simpo
from dpo_ref.objectives.scored import odpo
from dpo_ref.types import PairScores
from tests.support.trl_losses import (
    LENGTHS,
    NUM_PAIRS,
    PROMPT,
    VOCABULARY,
    completion_mask,
    cpo_loss,
    dpo_loss,
    orpo_loss,
    pairs,
    token_logps,
    value_and_gradient,
)


def ours_and_trls(function, options, trls, dtype=torch.float64):
    leaf, ref_chosen, ref_rejected = token_logps(dtype)
    outcome = function(pairs(*leaf.sum(1).chunk(2)), pairs(ref_chosen, ref_rejected), **options)
    theirs = dpo_loss(leaf, LENGTHS, ref_chosen, ref_rejected, **trls)
    return value_and_gradient(outcome.losses.mean(), leaf), value_and_gradient(theirs, leaf)


def f_divergence(name, **options):
    return {"loss_type": "sigmoid", "beta": 0.3, "f_divergence_type": name} | options


EQUAL = {
    dpo: ({"beta": 0.3}, {"loss_type": "sigmoid", "beta": 0.3}),
    hinge: ({"beta": 0.3}, {"loss_type": "hinge", "beta": 0.3}),
    ipo_mean: ({"tau": 0.3}, {"loss_type": "ipo", "beta": 0.3}),
    robust_dpo: ({"beta": 0.3, "label_smoothing": 0.2}, {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.2}),
    exo: ({"beta": 0.3, "label_smoothing": 0.01}, {"loss_type": "exo_pair", "beta": 0.3, "label_smoothing": 0.01}),
    nca: ({"beta": 0.3}, {"loss_type": "nca_pair", "beta": 0.3}),
    sppo: ({"beta": 0.3}, {"loss_type": "sppo_hard", "beta": 0.3}),
    apo_zero: ({"beta": 0.3}, {"loss_type": "apo_zero", "beta": 0.3}),
    apo_down: ({"beta": 0.3}, {"loss_type": "apo_down", "beta": 0.3}),
    discopop: ({"beta": 0.3, "tau": 0.4}, {"loss_type": "discopop", "beta": 0.3, "discopop_tau": 0.4}),
    dpo_norm: ({"beta": 2.0}, {"loss_type": "sigmoid_norm", "beta": 2.0}),
    forward_kl_dpo: ({"beta": 0.3}, f_divergence("forward_kl")),
    js_dpo: ({"beta": 0.3}, f_divergence("js_divergence")),
}


@pytest.mark.parametrize("function", EQUAL, ids=lambda f: f.__name__)
def test_value_and_gradient_equal_dpo_trainers(function):
    ours, theirs = ours_and_trls(function, *EQUAL[function])
    tolerance = 1e-6 if function is exo else 1e-12  # TRL keeps exo's epsilon in float32
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_mixture_is_trls_list_of_losses():
    """Its "sft" is a mean over all chosen tokens, ours over pairs: equal where it is left out, or of one pair."""
    leaf, ref_chosen, ref_rejected = token_logps(torch.float64)
    parts = [bind(dpo, beta=0.3), bind(robust_dpo, beta=0.3, label_smoothing=0.2), bind(apo_zero, beta=0.3)]
    models = pairs(*leaf.sum(1).chunk(2)), pairs(ref_chosen, ref_rejected)
    losses = [part.function(*models).losses for part in parts]
    ours = mix(losses, weights=[0.8, 0.2, 1.3]).mean()
    trls = {"beta": 0.3, "label_smoothing": 0.2, "loss_weights": (0.8, 0.2, 1.3)}
    theirs = dpo_loss(leaf, LENGTHS, ref_chosen, ref_rejected, loss_type=["sigmoid", "robust", "apo_zero"], **trls)
    torch.testing.assert_close(value_and_gradient(ours, leaf), value_and_gradient(theirs, leaf))


def test_alpha_divergence_dpo_is_trls_with_one_minus_alpha():
    """TRL's (u^(a - 1) - 1) / (a - 1) is our (1 - u^-alpha) / alpha at a = 1 - alpha; it knows no float64 there."""
    trls = f_divergence("alpha_divergence", f_alpha_divergence_coef=0.7)
    ours, theirs = ours_and_trls(alpha_divergence_dpo, {"beta": 0.3, "alpha": 0.3}, trls, dtype=torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)


def test_sigmoid_ignores_label_smoothing_where_cdpo_does_not():
    trls = {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.2}
    ours, theirs = ours_and_trls(dpo, {"beta": 0.3}, trls)
    torch.testing.assert_close(ours, theirs)
    smoothed, theirs = ours_and_trls(cdpo, {"beta": 0.3, "label_smoothing": 0.2}, trls)
    assert not torch.allclose(smoothed[0], theirs[0], rtol=1e-3)


def test_cdpo_is_the_smoothed_aot_of_a_single_pair():
    """AOT sorts log-ratios over the batch; of one pair there is nothing to sort, and its smoothing is cDPO's."""
    leaf, ref_chosen, ref_rejected = token_logps(torch.float64)
    ours = cdpo(pairs(*leaf.sum(1).chunk(2)), pairs(ref_chosen, ref_rejected), beta=0.3, label_smoothing=0.2).losses
    for i in range(NUM_PAIRS):
        both = [i, i + NUM_PAIRS]
        single = (leaf[both], LENGTHS.new_tensor([9, 9]), ref_chosen[i : i + 1], ref_rejected[i : i + 1])
        theirs = dpo_loss(*single, loss_type="aot", beta=0.3, label_smoothing=0.2)
        torch.testing.assert_close(value_and_gradient(ours[i], leaf), value_and_gradient(theirs, leaf))


def test_ipo_sum_is_trls_ipo_at_length_one():
    """TRL divides each log-ratio by its response's length: with every length told to be 1, sums remain."""
    leaf, ref_chosen, ref_rejected = token_logps(torch.float64)
    sums = leaf.detach().sum(1, keepdim=True).requires_grad_()
    ours = ipo_sum(pairs(*sums[:, 0].chunk(2)), pairs(ref_chosen, ref_rejected), tau=0.3).losses.mean()
    theirs = dpo_loss(sums, torch.ones_like(LENGTHS), ref_chosen, ref_rejected, loss_type="ipo", beta=0.3)
    torch.testing.assert_close(value_and_gradient(ours, sums), value_and_gradient(theirs, sums))
    averaged, summed = (
        f(pairs(*sums[:, 0].chunk(2)), pairs(ref_chosen, ref_rejected), tau=0.3).losses for f in (ipo_mean, ipo_sum)
    )
    assert not torch.allclose(averaged, summed, rtol=1e-2)


def test_cal_dpo_is_trls_sigmoid_at_beta_1_and_sppo_hard():
    leaf, ref_chosen, ref_rejected = token_logps(torch.float64)
    ours = cal_dpo(pairs(*leaf.sum(1).chunk(2)), pairs(ref_chosen, ref_rejected), beta=0.3, calibration_weight=0.7)
    given = leaf, LENGTHS, ref_chosen, ref_rejected
    theirs = dpo_loss(*given, loss_type="sigmoid", beta=1.0) + 0.7 * dpo_loss(*given, loss_type="sppo_hard", beta=0.3)
    torch.testing.assert_close(value_and_gradient(ours.losses.mean(), leaf), value_and_gradient(theirs, leaf))


def test_dpo_shift_is_trls_sigmoid_on_rejected_log_probs_that_are_multiplied():
    leaf, ref_chosen, ref_rejected = token_logps(torch.float64)
    ours = dpo_shift(pairs(*leaf.sum(1).chunk(2)), pairs(ref_chosen, ref_rejected), beta=0.3, shift=0.6).losses.mean()
    shares = torch.tensor([1.0, 0.6], dtype=torch.float64).repeat_interleave(NUM_PAIRS)[:, None]
    theirs = dpo_loss(shares * leaf, LENGTHS, ref_chosen, 0.6 * ref_rejected, loss_type="sigmoid", beta=0.3)
    torch.testing.assert_close(value_and_gradient(ours, leaf), value_and_gradient(theirs, leaf))


def test_odpo_is_trls_sigmoid_under_a_reference_that_is_moved_by_the_offset():
    leaf, ref_chosen, ref_rejected = token_logps(torch.float64)
    leads = torch.linspace(0.2, 4, NUM_PAIRS, dtype=torch.float64)
    models = pairs(*leaf.sum(1).chunk(2)), pairs(ref_chosen, ref_rejected)
    ours = odpo(*models, PairScores(leads + 1, torch.ones_like(leads)), beta=0.3, alpha=0.7).losses.mean()
    moved = ref_chosen + 0.7 * leads.log() / 0.3
    theirs = dpo_loss(leaf, LENGTHS, moved, ref_rejected, loss_type="sigmoid", beta=0.3)
    torch.testing.assert_close(value_and_gradient(ours, leaf), value_and_gradient(theirs, leaf))


def test_discopop_is_finite_where_trls_is_not():
    leaf, ref_chosen, ref_rejected = token_logps(torch.float64)
    far = ref_chosen + 1e4
    theirs = dpo_loss(leaf, LENGTHS, far, ref_rejected, loss_type="discopop", beta=0.3)
    ours = discopop(pairs(*leaf.sum(1).chunk(2)), pairs(far, ref_rejected), beta=0.3).losses
    assert theirs.isnan()
    torch.testing.assert_close(ours, 0.3 * (far - ref_rejected - leaf.sum(1)[:NUM_PAIRS] + leaf.sum(1)[NUM_PAIRS:]))


def logits_and_pairs(dtype):
    """Random logits with gradient, the tokens they predict, and our view of them as pairs."""
    generator = torch.Generator().manual_seed(4)
    width = PROMPT + int(LENGTHS.max())
    tokens = torch.randint(1, VOCABULARY, (2 * NUM_PAIRS, width), generator=generator)
    logits = torch.randn(2 * NUM_PAIRS, width, VOCABULARY, generator=generator, dtype=dtype).requires_grad_()
    logps = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0] * completion_mask(LENGTHS)[:, 1:]
    return logits, tokens, pairs(*logps.sum(1).chunk(2))


def test_simpo_is_cpo_trainers_with_gamma_in_units_of_reward():
    logits, tokens, policy = logits_and_pairs(torch.float64)
    trls = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0}
    theirs = cpo_loss(logits, tokens, LENGTHS, **trls)
    ours = simpo(policy, beta=2.0, gamma=0.7).losses.mean()
    torch.testing.assert_close(value_and_gradient(ours, logits), value_and_gradient(theirs, logits))


def test_alphadpo_is_cpo_trainers_simpo_with_a_gamma_for_each_pair():
    """Their gamma is a constant, and as well a tensor."""
    logits, tokens, policy = logits_and_pairs(torch.float64)
    reference = pairs(*torch.linspace(-20, -1, 2 * NUM_PAIRS, dtype=torch.float64).chunk(2))
    usual = {name: torch.tensor(value, dtype=torch.float64) for name, value in (("mean_gap", -1.0), ("sd_gap", 2.0))}
    gaps = (policy.chosen - reference.chosen) / policy.chosen_lengths
    gaps = (gaps - (policy.rejected - reference.rejected) / policy.rejected_lengths).detach()
    targets = 0.7 + 2.0 * 0.9 * (gaps + 1) / 2
    theirs = cpo_loss(logits, tokens, LENGTHS, loss_type="simpo", beta=2.0, simpo_gamma=targets, cpo_alpha=0.0)
    seen = pairs(policy.chosen.detach(), policy.rejected.detach())
    whole = BatchLogps(seen, reference, None, slice(0, NUM_PAIRS))
    ours = alphadpo(policy, reference, whole, usual, beta=2.0, gamma=0.7, alpha=0.9).losses.mean()
    torch.testing.assert_close(value_and_gradient(ours, logits), value_and_gradient(theirs, logits))


def test_simper_is_the_logit_of_cpo_trainers_alpha_po_at_minus_one():
    """AlphaPO's reward (1 - p^-alpha) / alpha of p = exp(mean log-prob) is p - 1 there; its "ipo" squares logits."""
    logits, tokens, policy = logits_and_pairs(torch.float64)
    theirs = cpo_loss(logits, tokens, LENGTHS, loss_type="ipo", beta=0.3, alpha=-1.0, cpo_alpha=0.0)
    ours = ((-simper(policy).losses - 1 / 0.6) ** 2).mean()
    torch.testing.assert_close(value_and_gradient(ours, logits), value_and_gradient(theirs, logits))


def test_cpo_is_cpo_trainers_but_for_the_weights_in_the_likelihood():
    """TRL's likelihood is a mean over all chosen tokens of the batch, ours over each response, then over pairs."""
    logits, tokens, policy = logits_and_pairs(torch.float64)
    theirs = cpo_loss(logits, tokens, LENGTHS, loss_type="sigmoid", beta=0.3, cpo_alpha=0.8)
    per_token = -policy.chosen.sum() / policy.chosen_lengths.sum()
    per_pair = -(policy.chosen / policy.chosen_lengths).mean()
    ours = cpo(policy, beta=0.3, alpha=0.8).losses.mean() + 0.8 * (per_token - per_pair)
    assert (per_token - per_pair).detach().abs() > 1e-3
    torch.testing.assert_close(value_and_gradient(ours, logits), value_and_gradient(theirs, logits))


def test_orpo_is_orpo_trainers_but_for_the_likelihood_of_the_prompt():
    """TRL's likelihood is a mean over all tokens of prompt and response; its odds ratio is in float32."""
    logits, tokens, policy = logits_and_pairs(torch.float64)
    theirs = orpo_loss(logits, tokens, LENGTHS, beta=0.3)
    seen = torch.arange(tokens.shape[1]) < PROMPT + LENGTHS[:NUM_PAIRS, None]
    labels = tokens[:NUM_PAIRS].masked_fill(~seen, -100)[:, 1:]
    whole = F.cross_entropy(logits[:NUM_PAIRS, :-1].reshape(-1, VOCABULARY), labels.reshape(-1))
    per_pair = -(policy.chosen / policy.chosen_lengths).mean()
    ours = orpo(policy, weight=0.3).losses.mean() + whole - per_pair
    (loss, gradient), expected = value_and_gradient(ours, logits), value_and_gradient(theirs, logits)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-6, atol=1e-6)
