"""Bradley–Terry strengths by hand, against the written-out likelihood, and where there are none."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from dpo_ref.evaluation.statistics.bradley_terry import bradley_terry
from dpo_ref.evaluation.statistics.estimates import RIDGE


def values(fit):
    return {strength.model: strength.value for strength in fit.strengths}


def test_two_models_have_the_log_odds_of_the_win_rate():
    """A wins 3, ties 2, loses 1 of 6: 4 of 6, log-odds log 2."""
    shares = np.array([1.0, 1.0, 1.0, 0.5, 0.5, 0.0])
    fit = bradley_terry(["A"] * 6, ["B"] * 6, shares, range(6), seed=0)
    strengths = values(fit)
    assert strengths["A"] == pytest.approx(math.log(2) / 2, abs=0.01)  # the ridge
    assert strengths["A"] == pytest.approx(-strengths["B"])
    anchored = bradley_terry(["A"] * 6, ["B"] * 6, shares, range(6), seed=0, anchor="B")
    assert values(anchored) == {"A": pytest.approx(math.log(2), abs=0.02), "B": 0.0}
    assert anchored.finite
    (top, bottom) = anchored.strengths
    assert (top.model, top.low < top.value < top.high, bottom.low, bottom.high) == ("A", True, 0.0, 0.0)


def test_against_one_baseline_each_strength_is_the_log_odds_of_its_win_rate():
    generator = np.random.default_rng(0)
    first = [model for model in "ABC" for _ in range(400)]
    shares = np.concatenate([generator.beta(a, 2, size=400) for a in (1, 2, 4)])
    strengths = values(bradley_terry(first, ["base"] * 1200, shares, list(range(400)) * 3, seed=0, anchor="base"))
    for index, model in enumerate("ABC"):
        rate = shares[400 * index : 400 * index + 400].mean()
        assert strengths[model] == pytest.approx(math.log(rate / (1 - rate)), abs=1e-3)


def test_strengths_maximise_the_written_out_likelihood():
    """Four models, weighted soft preferences in both orders, missing ones left out; by scipy from the definition."""
    generator = np.random.default_rng(3)
    names, size = ["w", "x", "y", "z"], 120
    first = generator.integers(4, size=size)
    second = (first + generator.integers(1, 4, size=size)) % 4
    shares, weights = generator.uniform(size=size), generator.integers(1, 4, size=size).astype(float)
    shares[::11] = np.nan

    def loss(s):
        total = RIDGE / 2 * s @ s
        for a, b, share, weight in zip(first, second, shares, weights, strict=True):
            if not math.isnan(share):
                total += weight * (share * math.log1p(math.exp(s[b] - s[a])))
                total += weight * ((1 - share) * math.log1p(math.exp(s[a] - s[b])))
        return total

    expected = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
    expected -= expected.mean()  # a shift of all costs the ridge alone, too little for scipy to notice
    words = ([names[i] for i in side] for side in (first, second))
    fit = bradley_terry(*words, shares, range(size), seed=0, weights=weights)
    assert [values(fit)[name] for name in names] == pytest.approx(expected.tolist(), abs=1e-6)
    assert sum(values(fit).values()) == pytest.approx(0, abs=1e-9)
    assert [strength.value for strength in fit.strengths] == sorted(values(fit).values(), reverse=True)


def test_a_model_that_always_wins_is_named_and_stays_finite():
    first, second = ["A"] * 20 + ["B"] * 20, ["B"] * 20 + ["C"] * 20
    fit = bradley_terry(first, second, np.array([1.0] * 20 + [1.0, 0.0] * 10), list(range(20)) * 2, seed=0)
    assert not fit.finite
    assert [sorted(group) for group in fit.groups] == [["A"], ["B", "C"]]
    strength = values(fit)
    assert 20 / (1 + math.exp(strength["A"] - strength["B"])) == pytest.approx(RIDGE * strength["A"], rel=1e-6)
    tied = bradley_terry(first, second, np.array([1.0] * 19 + [0.5] + [1.0, 0.0] * 10), list(range(20)) * 2, seed=0)
    assert tied.finite  # half a win for B binds the two


def test_a_circle_of_wins_has_equal_strengths():
    fit = bradley_terry(["A", "B", "C"], ["B", "C", "A"], np.ones(3), range(3), seed=0)
    assert fit.finite
    assert list(values(fit).values()) == pytest.approx([0, 0, 0], abs=1e-9)


BAD = {
    "unconnected": (["A", "C"], ["B", "D"], None, r"these are not: A, B; C, D"),
    "itself": (["A", "B"], ["B", "B"], None, r"B is compared with itself"),
    "anchor": (["A", "A"], ["B", "B"], "Z", r"the anchor Z is none of the models A, B"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_has_no_strengths_is_refused(case):
    first, second, anchor, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        bradley_terry(first, second, np.array([1.0, 0.0]), range(2), seed=0, anchor=anchor)
    with pytest.raises(ValueError, match="fewer than two"):
        bradley_terry(["A"], ["B"], np.array([float("nan")]), range(1), seed=0)


def test_intervals_cover_as_often_as_they_say():
    """Two models of strengths 0.5 and -0.3 against a baseline, 80 prompts of unequal difficulty that both answer."""
    generator, covered = np.random.default_rng(4), 0
    for repetition in range(100):
        prompts = generator.normal(scale=0.3, size=80)
        chances = [1 / (1 + np.exp(-(strength + prompts))) for strength in (0.5, -0.3)]
        wins = np.concatenate([(generator.uniform(size=80) < chance).astype(float) for chance in chances])
        fit = bradley_terry(["A"] * 80 + ["B"] * 80, ["base"] * 160, wins, [*range(80)] * 2, repetition, anchor="B")
        ours = next(strength for strength in fit.strengths if strength.model == "A")
        covered += ours.low <= 0.8 * (1 - 0.3**2 / 8) <= ours.high  # averaging over prompts pulls log-odds in a little
    assert covered >= 89
