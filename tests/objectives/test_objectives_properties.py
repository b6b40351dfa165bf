"""What must hold of the objectives for every input: rewards, invariances, minimisers, extreme margins, bad options."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from dpo_ref.cli import schemas
from dpo_ref.objectives.interface import bind
from dpo_ref.objectives.pairwise import (
    alpha_divergence_dpo,
    cal_dpo,
    cdpo,
    chi_po,
    discopop,
    dpo,
    dpo_norm,
    dpo_per_byte,
    dpo_positive,
    dpo_shift,
    exo,
    forward_kl_dpo,
    hinge,
    hypo,
    ipo_mean,
    ipo_sum,
    js_dpo,
    nca,
    r_dpo,
    robust_dpo,
    sppo,
)
from dpo_ref.objectives.reference_free import cpo, orpo, simper, simpo, unlikelihood
from dpo_ref.types import PairLogps

EVERY = {path.stem: schemas.locate(target) for path, target in schemas.groups()["objective"].items()}
PAIRWISE = {  # on sums of the pair alone
    name: function
    for name, function in EVERY.items()
    if set(bind(function).inputs) <= {"policy", "reference"} and bind(function).inputs["policy"] is PairLogps
}


def logistic(margin):
    return -F.logsigmoid(margin)


MARGIN_LOSSES = {  # loss as a function of the margin alone
    dpo: ({"beta": 0.3}, logistic),
    cdpo: ({"beta": 0.3, "label_smoothing": 0.2}, lambda m: 0.8 * logistic(m) + 0.2 * logistic(-m)),
    robust_dpo: ({"beta": 0.3, "label_smoothing": 0.2}, lambda m: (0.8 * logistic(m) - 0.2 * logistic(-m)) / 0.6),
    hypo: ({"beta": 0.3}, logistic),
    hinge: ({"beta": 0.3}, lambda m: torch.maximum(torch.zeros_like(m), 1 - m)),
    exo: (
        {"beta": 0.3, "label_smoothing": 0.2},
        lambda m: F.kl_div(
            torch.tensor([0.8, 0.2], dtype=torch.float64).log().expand(len(m), 2),
            torch.stack([m.sigmoid(), (-m).sigmoid()], 1),
            reduction="none",
        ).sum(1),
    ),
    discopop: (
        {"beta": 0.3, "tau": 0.5},
        lambda m: logistic(m) * (1 - torch.sigmoid(m / 0.5)) + torch.exp(-m) * torch.sigmoid(m / 0.5),
    ),
    ipo_sum: ({"tau": 0.3}, lambda m: (m / 0.3 - 1 / 0.6) ** 2),
    ipo_mean: ({"tau": 0.3}, lambda m: (m / 0.3 - 1 / 0.6) ** 2),
    dpo_norm: ({}, logistic),
    dpo_per_byte: ({}, logistic),
    r_dpo: ({"alpha": 0.2}, logistic),
    forward_kl_dpo: ({}, logistic),
    js_dpo: ({}, logistic),
    alpha_divergence_dpo: ({"alpha": 0.3}, logistic),
    chi_po: ({"beta": 0.3}, logistic),
    dpo_positive: ({"penalty": 3.0}, logistic),
    dpo_shift: ({"beta": 0.3, "shift": 0.6}, logistic),
    simpo: ({"gamma": 0.7}, lambda m: logistic(m - 0.7)),
    simper: ({}, lambda m: -m),
}
SHIFT_INVARIANT = [dpo, hypo, cdpo, robust_dpo, hinge, exo, discopop, ipo_sum, r_dpo]
SHIFT_SENSITIVE = [
    ipo_mean,
    dpo_norm,
    dpo_per_byte,
    forward_kl_dpo,
    js_dpo,
    alpha_divergence_dpo,
    chi_po,
    dpo_positive,
    dpo_shift,
    simpo,
    simper,
    nca,
    sppo,
    cal_dpo,
]
ANTISYMMETRIC = [f for f in MARGIN_LOSSES if f not in (dpo_positive, dpo_shift, hypo)]


def drawn(seed, num_pairs=50, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = -spread * torch.rand(2, num_pairs, dtype=torch.float64, generator=generator)
    return PairLogps(chosen, rejected, *torch.randint(1, 30, (4, num_pairs), generator=generator))


def called(function, policy, reference, **options):
    return function(policy, *([reference] if bind(function).uses_reference else []), **options)


def margins_of(outcome):
    return outcome.chosen_rewards - outcome.rejected_rewards


@pytest.mark.parametrize("function", MARGIN_LOSSES, ids=lambda f: f.__name__)
def test_loss_is_a_function_of_the_margin_of_the_rewards(function):
    options, of_margin = MARGIN_LOSSES[function]
    outcome = called(function, drawn(0), drawn(1), **options)
    torch.testing.assert_close(outcome.losses, of_margin(margins_of(outcome)), rtol=1e-12, atol=1e-12)


def test_every_other_pairwise_objective_says_that_it_is_none_of_the_margin():
    others = {name for name, function in PAIRWISE.items() if function not in MARGIN_LOSSES}
    assert others == {"sppo", "cal_dpo", "nca", "apo_zero", "apo_down", "cpo", "orpo", "unlikelihood"}
    for name in others:
        assert "function of the" in EVERY[name].__doc__ or "function of their" in EVERY[name].__doc__


@pytest.mark.parametrize("function", SHIFT_INVARIANT + SHIFT_SENSITIVE, ids=lambda f: f.__name__)
def test_a_constant_of_the_prompt_cancels_only_where_log_ratios_are_summed(function):
    policy, shift = drawn(0), torch.linspace(0.5, 5, 50, dtype=torch.float64)
    shifted = replace(policy, chosen=policy.chosen + shift, rejected=policy.rejected + shift)
    usual, moved = (called(function, model, drawn(1)).losses for model in (policy, shifted))
    assert torch.allclose(usual, moved, rtol=1e-9) == (function in SHIFT_INVARIANT)


@pytest.mark.parametrize("name", [n for n, f in PAIRWISE.items() if bind(f).uses_reference and f is not hypo])
def test_only_log_ratios_count_under_a_reference(name):
    policy, reference = drawn(0), drawn(1)
    both = [replace(x, chosen=x.chosen - 7, rejected=x.rejected + 2) for x in (policy, reference)]
    torch.testing.assert_close(PAIRWISE[name](policy, reference).losses, PAIRWISE[name](*both).losses)


@pytest.mark.parametrize("function", ANTISYMMETRIC, ids=lambda f: f.__name__)
def test_swapping_the_responses_negates_the_margin(function):
    def swapped(x):
        return PairLogps(x.rejected, x.chosen, x.rejected_lengths, x.chosen_lengths, x.rejected_bytes, x.chosen_bytes)

    policy, reference = drawn(0), drawn(1)
    usual = margins_of(called(function, policy, reference))
    torch.testing.assert_close(usual, -margins_of(called(function, swapped(policy), swapped(reference))))


LN2 = [dpo, cdpo, robust_dpo, dpo_norm, dpo_per_byte, forward_kl_dpo, js_dpo, alpha_divergence_dpo, chi_po]
LN2 += [dpo_positive, dpo_shift]


@pytest.mark.parametrize("function", LN2, ids=lambda f: f.__name__)
def test_log_2_where_policy_and_reference_agree(function):
    torch.testing.assert_close(function(drawn(0), drawn(0)).losses, torch.full((50,), math.log(2)).double())


def minimiser(loss, start=0.1):
    point = torch.tensor([start, start], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [point], max_iter=300, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(*point)
        value.backward()
        return value

    optimizer.step(closure)
    return point.detach()


@pytest.mark.parametrize(
    ("function", "options", "quantity", "expected"),
    [
        (ipo_sum, {"tau": 0.4}, lambda w, r: w - r, 1 / 0.8),
        (ipo_mean, {"tau": 0.4}, lambda w, r: w / 5 - r / 8, 1 / 0.8),
        (cdpo, {"beta": 0.3, "label_smoothing": 0.2}, lambda w, r: w - r, math.log(0.8 / 0.2) / 0.3),
        (exo, {"beta": 0.3, "label_smoothing": 0.2}, lambda w, r: w - r, math.log(0.8 / 0.2) / 0.3),
        (sppo, {"beta": 0.4}, lambda w, r: w, 1 / 0.8),
        (sppo, {"beta": 0.4}, lambda w, r: -r, 1 / 0.8),
        (nca, {"beta": 0.5}, lambda w, r: w, math.log(2) / 0.5),
        (cal_dpo, {"beta": 0.5, "calibration_weight": 0.5}, lambda w, r: w - 1 - 1 / (1 + math.exp(2 * w)), 0.0),
        (cal_dpo, {"beta": 0.5, "calibration_weight": 0.5}, lambda w, r: w + r, 0.0),
    ],
    ids=[
        "ipo_sum",
        "ipo_mean",
        "cdpo",
        "exo",
        "sppo chosen",
        "sppo rejected",
        "nca",
        "cal_dpo chosen",
        "cal_dpo both",
    ],
)
def test_minimisers(function, options, quantity, expected):
    """Cal-DPO: by symmetry -r is w, and there 2 weight (w - 1 / (2 beta)) is sigmoid(-2 w), the logistic's slope."""
    sizes = [torch.tensor([n]) for n in (5, 8, 20, 30)]
    zeros = PairLogps(torch.zeros(1).double(), torch.zeros(1).double(), *sizes)
    point = minimiser(lambda w, r: function(PairLogps(w[None], r[None], *sizes), zeros, **options).losses.sum())
    assert float(quantity(*point)) == pytest.approx(expected, abs=1e-5)


def test_robust_dpo_is_dpo_in_the_mean_over_flipped_labels():
    policy, reference = drawn(0), drawn(1)
    flipped = [replace(x, chosen=x.rejected, rejected=x.chosen) for x in (policy, reference)]
    robust, wrong = (robust_dpo(*x, beta=0.3, label_smoothing=0.2).losses for x in ((policy, reference), flipped))
    torch.testing.assert_close(0.8 * robust + 0.2 * wrong, dpo(policy, reference, beta=0.3).losses)


@pytest.mark.parametrize(
    ("function", "options", "f"),
    [
        (forward_kl_dpo, {}, lambda u: -u.log()),
        (js_dpo, {}, lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log()),
        (alpha_divergence_dpo, {"alpha": 0.3}, lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * -0.7)),
        (chi_po, {}, lambda u: u**2 / 2 + u * u.log()),
    ],
    ids=["forward_kl", "js", "alpha", "chi"],
)
def test_rewards_are_the_derivative_of_the_divergence(function, options, f):
    """beta (f'(u) - f'(1)), f' by differentiation."""
    policy, reference = drawn(0), drawn(1)
    ratio = (policy.chosen - reference.chosen).exp().requires_grad_()
    (slope,) = torch.autograd.grad(f(ratio).sum(), ratio)
    one = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (at_one,) = torch.autograd.grad(f(one).sum(), one)
    rewards = function(policy, reference, beta=0.4, **options).chosen_rewards
    torch.testing.assert_close(rewards, 0.4 * (slope - at_one))


def test_limits_of_cal_dpo_and_dpo_shift():
    """Cal-DPO's weight to 0 leaves dpo at beta 1, its weight alone is sppo; a shift to 1 leaves dpo."""
    models = drawn(0), drawn(1)
    plain = dpo(*models, beta=1.0).losses
    torch.testing.assert_close(cal_dpo(*models, beta=0.3, calibration_weight=1e-12).losses, plain)
    calibrated = cal_dpo(*models, beta=0.3, calibration_weight=0.7).losses
    torch.testing.assert_close(calibrated - plain, 0.7 * sppo(*models, beta=0.3).losses)
    torch.testing.assert_close(dpo_shift(*models, beta=0.3, shift=1 - 1e-12).losses, dpo(*models, beta=0.3).losses)


def test_simper_is_the_difference_of_inverse_perplexities_and_each_its_own_slope():
    policy = replace(drawn(0), chosen=drawn(0).chosen.requires_grad_())
    losses = simper(policy).losses
    losses.sum().backward()
    perplexities = (-policy.chosen.detach() / policy.chosen_lengths).exp()
    torch.testing.assert_close(policy.chosen.grad, -1 / perplexities / policy.chosen_lengths)
    assert (losses.abs() < 1).all()


def test_alpha_divergence_dpo_lies_between_dpo_and_forward_kl_dpo():
    models = drawn(0), drawn(1)
    torch.testing.assert_close(alpha_divergence_dpo(*models, alpha=1e-9).losses, dpo(*models).losses)
    torch.testing.assert_close(alpha_divergence_dpo(*models, alpha=1 - 1e-9).losses, forward_kl_dpo(*models).losses)


@pytest.mark.parametrize("name", PAIRWISE)
def test_finite_at_extreme_log_ratios_in_float32(name):
    """Of a policy without a reference log-probs, which are never positive."""
    values = torch.tensor(list(product([-1e4, -100.0, 0.0, 100.0, 1e4], repeat=2))).T
    if not bind(PAIRWISE[name]).uses_reference:
        values = values - 1e4
    policy = PairLogps(*(x.clone().requires_grad_() for x in values), *[torch.ones(25).long()] * 4)
    zeros = PairLogps(torch.zeros(25), torch.zeros(25), *[torch.ones(25).long()] * 4)
    outcome = called(PAIRWISE[name], policy, zeros)
    outcome.losses.sum().backward()
    assert not outcome.chosen_rewards.requires_grad
    assert not outcome.rejected_rewards.requires_grad
    for tensor in (*outcome, policy.chosen.grad, policy.rejected.grad):
        assert tensor is None or tensor.isfinite().all()


def test_a_response_that_the_policy_excludes_still_pulls():
    """The tangent beyond 40 nats: forward KL's gradient neither vanishes nor overflows."""
    policy = PairLogps(torch.tensor([-500.0], requires_grad=True), torch.zeros(1), *[torch.ones(1).long()] * 4)
    zeros = PairLogps(torch.zeros(1), torch.zeros(1), *[torch.ones(1).long()] * 4)
    forward_kl_dpo(policy, zeros, beta=1.0).losses.sum().backward()
    assert policy.chosen.grad.item() == pytest.approx(-math.exp(40), rel=1e-5)


REFUSED = [
    (
        cdpo,
        {"label_smoothing": 0.0},
        "label_smoothing=0.0 must lie strictly between 0 and 0.5; label_smoothing=0 is objective=dpo",
    ),
    (robust_dpo, {"label_smoothing": 0.5}, "label_smoothing=0.5 must lie strictly between 0 and 0.5"),
    (exo, {"label_smoothing": 0.0}, "label_smoothing=0.0 must lie strictly between 0 and 0.5"),
    (discopop, {"tau": 1.5}, "tau=1.5 must be at most 1"),
    (alpha_divergence_dpo, {"alpha": 1.0}, "1 is objective=forward_kl_dpo"),
    (r_dpo, {"alpha": 0.0}, "alpha=0 is objective=dpo"),
    (dpo_positive, {"penalty": 0.0}, "penalty=0 is objective=dpo"),
    (dpo_shift, {"shift": 1.0}, "shift=1.0 must lie strictly between 0 and 1; shift=1 is objective=dpo"),
    (cal_dpo, {"calibration_weight": 0.0}, "0 is objective=dpo beta=1"),
    (simpo, {"gamma": 0.0}, "0 is objective=dpo_norm reference=none"),
    (cpo, {"alpha": 0.0}, "alpha=0 is objective=dpo reference=none"),
    (orpo, {"weight": 0.0}, "weight=0.0 must be positive"),
    (unlikelihood, {"alpha": 1.5}, r"alpha=1.5 must lie in (0, 1]"),
    *[(f, {"tau": 0.0}, "tau=0.0 must be positive") for f in (ipo_sum, ipo_mean)],
    *[
        (f, {"beta": 0.0}, "beta=0.0 must be positive")
        for f in (sppo, nca, dpo_norm, dpo_per_byte, js_dpo, hinge, chi_po)
    ],
]


@pytest.mark.parametrize(("function", "options", "message"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_options_without_effect_or_sense_are_refused(function, options, message):
    with pytest.raises(ValueError) as error:
        bind(function, **options).check()
    assert message in str(error.value)
