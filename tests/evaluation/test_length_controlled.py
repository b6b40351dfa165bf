"""AlpacaEval's length-controlled win rate: the same digits as alpaca_eval gives, and the likelihood it maximises."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from dpo_ref.evaluation.statistics.comparisons import from_alpaca
from dpo_ref.evaluation.statistics.length_control import (
    Gamed,
    LengthControlled,
    length_controlled,
    predict,
    refit_interval,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "support" / "golden" / "alpaca_eval_winrates.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["length_controlled"]}


def inputs(case):
    gamed = Gamed(
        *(np.array(case["gamed"][name]) for name in ("preference", "std_delta_len", "instruction_difficulty"))
    )
    lengths = (np.array(case[f"{who}_lengths"]) for who in ("policy", "baseline"))
    return from_alpaca(case["preferences"]), *lengths, np.array(case["difficulties"]), gamed


@pytest.mark.parametrize("name", CASES)
def test_the_same_digits_as_alpaca_eval(name):
    """What alpaca_eval 0.6.6 returned for these rows (tests/support/golden/make_alpaca_eval.py)."""
    case = CASES[name]
    fit, expected = length_controlled(*inputs(case)), case["expected"]
    assert 100 * fit.win_rate == pytest.approx(expected["length_controlled_winrate"], abs=1e-9)
    assert 100 * fit.standard_error == pytest.approx(expected["lc_standard_error"], abs=1e-9)
    for coefficient in ("theta", "phi", "psi"):
        assert getattr(fit, coefficient) == pytest.approx(expected[coefficient], abs=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_the_rate_against_another_model_as_alpaca_eval_predicts_it(name):
    case = CASES[name]
    other = case["predicted_against"]
    theirs = LengthControlled(0.5, 0.0, other["theta"], other["phi"], other["psi"], 1.0)
    ours = length_controlled(*inputs(case))
    difficulties = np.array(case["difficulties"])
    assert predict(ours, theirs, difficulties) == pytest.approx(other["win_rate"], abs=1e-9)
    assert predict(theirs, ours, difficulties) == pytest.approx(1 - other["win_rate"], abs=1e-9)
    assert predict(ours, ours, difficulties) == 0.5


@pytest.mark.parametrize("name", CASES)
def test_the_coefficients_minimise_the_penalised_likelihood_written_out(name):
    """Brute force: |c|_1 + C x weighted cross entropy of gamed rows (a tenth each, no theta) and the model's own."""
    case = CASES[name]
    preferences, policy, baseline, difficulties, gamed = inputs(case)
    fit = length_controlled(preferences, policy, baseline, difficulties, gamed)
    scaled = (baseline - policy) / np.std(baseline - policy, ddof=1)

    def loss(c):
        phi, psi, theta = c
        total = 0.0
        for share, z, gamma in zip(preferences, scaled, difficulties, strict=True):
            if not np.isnan(share):
                p = 1 / (1 + np.exp(-(theta + phi * np.tanh(z) + psi * gamma)))
                total -= share * np.log(p) + (1 - share) * np.log(1 - p)
        for share, z, gamma in zip(gamed.preferences, gamed.scaled_differences, gamed.difficulties, strict=True):
            p = 1 / (1 + np.exp(-(phi * np.tanh(z) + psi * gamma)))
            total -= 0.1 * (share * np.log(p) + (1 - share) * np.log(1 - p))
        return np.abs(c).sum() + fit.inverse_penalty * total

    best = minimize(loss, [fit.phi + 0.1, fit.psi - 0.1, fit.theta + 0.1], method="Nelder-Mead", tol=1e-9)
    assert [fit.phi, fit.psi, fit.theta] == pytest.approx(best.x, abs=2e-2)
    assert loss(np.array([fit.phi, fit.psi, fit.theta])) <= best.fun * (1 + 1e-4)


def test_the_refitted_interval_holds_the_rate_and_is_wider_than_alpaca_evals():
    case = inputs(CASES["hard labels"])
    fit = length_controlled(*case)
    low, high = refit_interval(fit, *case, seed=0, num_refits=60)
    assert low < fit.win_rate < high
    assert high - low > 2 * 2 * 1.96 * fit.standard_error
    assert (low, high) == refit_interval(fit, *case, seed=0, num_refits=60)


def test_lengths_that_say_nothing_are_refused():
    preferences, policy, _, difficulties, gamed = inputs(CASES["soft"])
    with pytest.raises(ValueError, match="length cannot be told apart"):
        length_controlled(preferences, policy, policy + 3, difficulties, gamed)
