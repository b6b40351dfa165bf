"""Hand-derived values and properties of the objectives."""

import math
from dataclasses import replace

import pytest
import torch

from dpo_ref.objectives.interface import bind
from dpo_ref.objectives.pairwise import dpo
from dpo_ref.objectives.unpaired import sft
from dpo_ref.types import PairLogps, ResponseLogps


def pairs(chosen, rejected, requires_grad=False):
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=requires_grad) for x in (chosen, rejected))
    return PairLogps(chosen, rejected, *(torch.full((len(chosen),), size) for size in (4, 7, 13, 22)))


def test_dpo_by_hand():
    """beta 0.5; log-ratios 2 and -1, margins 1.5 and 0: -log sigmoid(1.5) = log(1 + e^-1.5), and log 2."""
    policy, reference = pairs([-3.0, -9.0], [-6.0, -1.0]), pairs([-5.0, -9.0], [-5.0, -1.0])
    outcome = dpo(policy, reference, beta=0.5)
    expected = torch.tensor([math.log1p(math.exp(-1.5)), math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(outcome.losses, expected)
    assert outcome.chosen_rewards.tolist() == [1.0, 0.0]
    assert outcome.rejected_rewards.tolist() == [-0.5, 0.0]


def test_dpo_gradient_weight_is_beta_sigmoid_of_minus_margin():
    policy, reference = pairs([-3.0, 2.0], [-6.0, 5.0], requires_grad=True), pairs([-4.0, 1.0], [-5.0, 1.0])
    dpo(policy, reference, beta=0.3).losses.sum().backward()
    margins = 0.3 * torch.tensor([(-3 + 4) - (-6 + 5), (2 - 1) - (5 - 1)], dtype=torch.float64)
    torch.testing.assert_close(policy.chosen.grad, -0.3 * torch.sigmoid(-margins))
    torch.testing.assert_close(policy.rejected.grad, 0.3 * torch.sigmoid(-margins))


def test_dpo_invariances():
    policy, reference = pairs([-3.0, -9.0], [-6.0, -1.0]), pairs([-5.0, -8.0], [-5.5, -1.0])
    shift = torch.tensor([100.0, -7.0], dtype=torch.float64)
    shifted = replace(policy, chosen=policy.chosen + shift, rejected=policy.rejected + shift)
    torch.testing.assert_close(dpo(policy, reference, beta=0.1).losses, dpo(shifted, reference, beta=0.1).losses)
    swapped = [replace(x, chosen=x.rejected, rejected=x.chosen) for x in (policy, reference)]
    margin = torch.sub(*dpo(policy, reference, beta=0.1)[1:])
    torch.testing.assert_close(margin, -torch.sub(*dpo(*swapped, beta=0.1)[1:]))


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_dpo_is_finite_at_extreme_margins_in_float32(margin):
    policy = PairLogps(torch.tensor([margin], requires_grad=True), torch.zeros(1), *[torch.ones(1).long()] * 4)
    losses = dpo(policy, PairLogps(torch.zeros(1), torch.zeros(1), *[torch.ones(1).long()] * 4), beta=1.0).losses
    losses.sum().backward()
    assert losses.isfinite().all()
    assert policy.chosen.grad.isfinite().all()
    assert losses.item() == max(0.0, -margin)


def test_population_optimum_of_dpo():
    """Minimising DPO over Bradley-Terry pairs of a categorical policy gives pi_ref exp(r / beta) / Z."""
    num_actions, beta = 5, 0.7
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(num_actions, dtype=torch.float64, generator=generator)
    reference = torch.randn(num_actions, dtype=torch.float64, generator=generator).log_softmax(0)
    logits = reference.clone().requires_grad_()
    better, worse = (x.flatten() for x in torch.meshgrid(*[torch.arange(num_actions)] * 2, indexing="ij"))
    weight = torch.sigmoid(reward[better] - reward[worse]) * (better != worse)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    ones = torch.ones(len(better), dtype=torch.long)

    def loss():
        optimizer.zero_grad()
        logps = logits.log_softmax(0)
        policy_pairs = PairLogps(logps[better], logps[worse], *[ones] * 4)
        total = (
            weight * dpo(policy_pairs, PairLogps(reference[better], reference[worse], *[ones] * 4), beta=beta).losses
        ).sum()
        total.backward()
        return total

    optimizer.step(loss)
    optimum = (reference + reward / beta).log_softmax(0)
    kl = (optimum.exp() * (optimum - logits.detach().log_softmax(0))).sum()
    assert abs(float(kl)) < 1e-8


def test_sft_weighs_every_response_alike():
    sums, lengths = torch.tensor([-6.0, -2.0, -9.0], dtype=torch.float64), torch.tensor([3, 2, 9])
    outcome = sft(ResponseLogps(sums, lengths, lengths, None))
    assert outcome.losses.tolist() == [2.0, 1.0, 1.0]
    assert outcome.rewards.tolist() == [-2.0, -1.0, -1.0]


@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_bad_beta_is_refused_before_anything_is_loaded(beta):
    with pytest.raises(ValueError, match=r"beta=.* must be positive"):
        bind(dpo, beta=beta).check()


def test_kinds_are_read_from_signatures():
    assert (bind(dpo).pairwise, bind(dpo).uses_reference) == (True, True)
    assert (bind(sft).pairwise, bind(sft).uses_reference) == (False, False)
