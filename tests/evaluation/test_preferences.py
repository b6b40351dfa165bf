"""Win rates by hand, against AlpacaEval's published figures, and intervals against their own promise."""

import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from dpo_ref.evaluation.statistics.comparisons import (
    alpaca_win_rate,
    cluster_interval,
    from_alpaca,
    length_adjusted,
    paired_difference,
    preference_metrics,
)
from dpo_ref.evaluation.statistics.estimates import RIDGE, fit_logistic, resampled_counts

DATA = Path(os.environ.get("DPO_REF_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "alpaca_eval"
GOLDEN = json.loads((Path(__file__).parents[1] / "support" / "golden" / "alpaca_eval_winrates.json").read_text())
NAN = float("nan")


def test_win_rate_by_hand():
    rate = alpaca_win_rate(np.array([0.9, 0.2, 0.5, NAN, 1.0]))
    assert (rate.n_wins, rate.n_wins_base, rate.n_draws, rate.n_total, rate.n_missing) == (2, 1, 1, 4, 1)
    assert rate.win_rate == pytest.approx(2.6 / 4)
    assert rate.discrete_win_rate == 2.5 / 4
    squares = (0.9 - 0.65) ** 2 + (0.2 - 0.65) ** 2 + (0.5 - 0.65) ** 2 + (1 - 0.65) ** 2
    assert rate.standard_error == pytest.approx(math.sqrt(squares / 3 / 4))


def test_nothing_compared_is_nan_and_one_pair_has_no_error():
    rate_of_none = alpaca_win_rate(np.array([NAN, NAN]))
    assert (rate_of_none.n_total, rate_of_none.n_missing) == (0, 2)
    assert math.isnan(rate_of_none.win_rate)
    assert math.isnan(rate_of_none.discrete_win_rate)
    rate_of_one = alpaca_win_rate(np.array([0.75]))
    assert (rate_of_one.win_rate, rate_of_one.discrete_win_rate) == (0.75, 1.0)
    assert math.isnan(rate_of_one.standard_error)


def test_alpaca_preferences_are_read_at_the_border():
    preferences = from_alpaca([1.0, 2.0, 1.5, 0, None, NAN, 1.75])
    np.testing.assert_array_equal(preferences, [0.0, 1.0, 0.5, 0.5, NAN, NAN, 0.75])
    with pytest.raises(ValueError, match=r"preference=0\.7 is not in 1\.\.2"):
        from_alpaca([1.0, 0.7])
    with pytest.raises(ValueError, match=r"row 1: preference=1.5 is not in \[0, 1\]"):
        alpaca_win_rate(np.array([1.5]))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_the_same_as_alpaca_eval_says(case):
    """What alpaca_eval 0.6.6 itself returned for these preferences (tests/support/golden/make_alpaca_eval.py)."""
    rate = alpaca_win_rate(from_alpaca(case["preferences"]))
    rates = [100 * rate.win_rate, 100 * rate.standard_error, 100 * rate.discrete_win_rate]
    expected = case["expected"]
    assert rates == pytest.approx(
        [expected[name] for name in ("win_rate", "standard_error", "discrete_win_rate")], abs=1e-9
    )
    for name in ("n_wins", "n_wins_base", "n_draws", "n_total"):
        assert getattr(rate, name) == expected[name]


def published():
    if not DATA.is_dir():
        return []
    return sorted(DATA.glob("*.json.gz"))


@pytest.mark.skipif(not published(), reason="AlpacaEval's per-prompt preferences are not here: set DPO_REF_TEST_DATA")
def test_published_figures_of_29_models_are_recomputed():
    for path in published():
        content = json.loads(gzip.decompress(path.read_bytes()))
        rows, expected = content["rows"], content["published"]
        rate = alpaca_win_rate(from_alpaca([row[3] for row in rows]))
        assert 100 * rate.win_rate == pytest.approx(float(expected["win_rate"]), abs=1e-6), path
        assert 100 * rate.standard_error == pytest.approx(float(expected["standard_error"]), abs=1e-6), path
        assert 100 * rate.discrete_win_rate == pytest.approx(float(expected["discrete_win_rate"]), abs=1e-6), path
        for name in ("n_wins", "n_wins_base", "n_draws", "n_total"):
            assert getattr(rate, name) == int(expected[name]), path
        if len(rows) == 805:  # the published length is that of all answers, judged or not
            assert int(np.mean([row[2] for row in rows])) == int(expected["avg_length"]), path


def test_draws_take_whole_clusters_and_do_not_depend_on_chunks():
    whole = np.concatenate(list(resampled_counts(7, seed=3, num_resamples=50)))
    parts = np.concatenate(list(resampled_counts(7, seed=3, num_resamples=50, width=2**17)))
    np.testing.assert_array_equal(whole, parts)
    assert (whole.sum(axis=1) == 7).all()
    values = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    assert cluster_interval(values, ["a"] * 3 + ["b"] * 3, seed=0) == (0.0, 1.0)  # two clusters: all or nothing
    low, high = cluster_interval(values, range(6), seed=0)
    assert 0.0 < low < 0.5 < high < 1.0


def test_cluster_interval_covers_as_often_as_it_says():
    """Preferences of 60 prompts with 1 to 4 samples each, which agree within a prompt: beta(2, 3) plus noise."""
    generator = np.random.default_rng(5)
    covered = naive = 0
    for repetition in range(150):
        sizes = generator.integers(1, 5, size=60)
        clusters = np.repeat(np.arange(60), sizes)
        values = np.clip(generator.beta(2, 3, size=60)[clusters] + generator.uniform(-0.05, 0.05, len(clusters)), 0, 1)
        low, high = cluster_interval(values, clusters.tolist(), repetition)
        covered += low <= 0.4 <= high
        low, high = cluster_interval(values, range(len(values)), repetition)
        naive += low <= 0.4 <= high
    assert 0.89 < covered / 150 < 0.99
    assert naive < covered - 15  # samples of one prompt taken as independent promise too much


def test_a_paired_difference_by_hand_and_sharper_than_two_intervals():
    difference = paired_difference(np.array([0.9, 0.5, NAN, 0.3]), np.array([0.4, 0.4, 0.2, NAN]), range(4), seed=0)
    assert difference.mean == pytest.approx(0.3)
    assert difference.se == pytest.approx(0.2)  # gaps 0.5 and 0.1: half of their distance
    assert (difference.low, difference.high, difference.num_compared) == (pytest.approx(0.1), pytest.approx(0.5), 2)
    generator = np.random.default_rng(0)
    hard = generator.uniform(0, 0.8, size=200)
    ours, theirs = (hard + generator.uniform(0, shift, size=200) for shift in (0.2, 0.1))
    difference = paired_difference(ours, theirs, range(200), seed=0)
    apart = math.hypot(alpaca_win_rate(ours).standard_error, alpaca_win_rate(theirs).standard_error)
    assert difference.se < apart / 3
    back = paired_difference(theirs, ours, range(200), seed=0)
    assert (difference.mean, difference.low) == (pytest.approx(-back.mean), pytest.approx(-back.high))


def by_scipy(features, shares, weights):
    """The same likelihood written out, maximised by another method."""

    def loss(c):
        p = 1 / (1 + np.exp(-features @ c))
        return -(weights * (shares * np.log(p) + (1 - shares) * np.log(1 - p))).sum() + RIDGE / 2 * c @ c

    return minimize(loss, np.zeros(features.shape[1]), method="BFGS", options={"gtol": 1e-9}).x


def test_logistic_regression_maximises_the_written_out_likelihood_in_every_weighting():
    generator = np.random.default_rng(1)
    features, shares = generator.normal(size=(40, 3)), generator.uniform(size=40)
    weights = generator.integers(0, 4, size=(5, 40)).astype(float)
    coefficients = fit_logistic(features[None], shares[None], weights)
    for row, weight in zip(coefficients, weights, strict=True):
        np.testing.assert_allclose(row, by_scipy(features, shares, weight), atol=1e-5)
    with pytest.raises(ValueError, match=r"ridge=0\.0 must be positive"):
        fit_logistic(features[None], shares[None], weights, ridge=0.0)


def test_logistic_regression_stays_finite_where_one_side_always_wins():
    """w sigmoid(-a) = ridge a at the optimum; features of a thousand make plain Newton steps overshoot."""
    (a,) = fit_logistic(np.ones((1, 12, 1)), np.ones((1, 12)), np.ones((1, 12)))[0]
    assert 12 / (1 + math.exp(a)) == pytest.approx(RIDGE * a, rel=1e-6)
    steep = fit_logistic(1000 * np.ones((1, 3, 1)), np.array([[1.0, 1.0, 0.0]]), np.ones((1, 3)))
    assert 1000 * steep.item() == pytest.approx(math.log(2), rel=1e-4)


def judged(num, effect, quality, seed=0):
    generator = np.random.default_rng(seed)
    policy, baseline = generator.integers(50, 3000, size=(2, num))
    z = np.tanh((policy - baseline) / (policy - baseline).std(ddof=1))
    return 1 / (1 + np.exp(-quality - effect * z)), policy, baseline


def test_the_length_adjusted_rate_finds_the_quality_that_was_put_in():
    preferences, policy, baseline = judged(300, effect=2.0, quality=-0.5)
    rate = length_adjusted(preferences, policy, baseline, range(300), seed=0)
    assert rate.win_rate == pytest.approx(1 / (1 + math.exp(0.5)), abs=1e-4)
    assert rate.length_effect == pytest.approx(2.0, abs=5e-3)  # the ridge
    longer = length_adjusted(judged(300, 2.0, -0.5)[0], policy + 5000, baseline, range(300), seed=0)
    assert longer.win_rate < rate.win_rate


def test_the_length_adjusted_rate_is_antisymmetric_and_the_win_rate_at_equal_lengths():
    preferences, policy, baseline = judged(80, 1.0, 0.3)
    forth = length_adjusted(preferences, policy, baseline, range(80), seed=0)
    back = length_adjusted(1 - preferences, baseline, policy, range(80), seed=0)
    assert forth.win_rate == pytest.approx(1 - back.win_rate)
    assert (forth.low, forth.high) == (pytest.approx(1 - back.high), pytest.approx(1 - back.low))
    same = length_adjusted(preferences, policy, policy, range(80), seed=0)
    assert same.win_rate == pytest.approx(preferences.mean(), abs=1e-4)  # the ridge
    assert same.length_effect == 0.0
    assert math.isnan(length_adjusted(preferences, policy + 1, policy, range(80), seed=0).win_rate)


def test_the_length_adjusted_interval_covers_as_often_as_it_says():
    """Wins and losses drawn from the model itself; its answer at these lengths is the quality, 0.6."""
    generator, covered = np.random.default_rng(2), 0
    for repetition in range(120):
        chance, policy, baseline = judged(150, 1.5, math.log(0.6 / 0.4), seed=1000 + repetition)
        wins = (generator.uniform(size=150) < chance).astype(float)
        rate = length_adjusted(wins, policy, baseline, range(150), repetition, num_resamples=200)
        covered += rate.low <= 0.6 <= rate.high
    assert 0.88 < covered / 120 < 0.99


def test_preference_metrics_by_hand():
    preferences = np.array([1.0, 0.5, 0.0, NAN, 0.75, 0.0])
    policy, baseline = np.array([10, 20, 30, 40, 50, 7]), np.array([5, 25, 30, 99, 40, 9])
    metrics = preference_metrics(preferences, policy, baseline, ["a", "a", "b", "b", "c", "c"], seed=0)
    assert metrics["win_rate"] == pytest.approx(2.25 / 5)
    residuals = [1.5 - 0.9, 0 - 0.45, 0.75 - 0.9]  # sums within a, b, c
    assert metrics["win_rate_se"] == pytest.approx(math.sqrt(sum(r * r for r in residuals) / 25 * 3 / 2))
    assert metrics["discrete_win_rate"] == pytest.approx((2 + 0.5) / 5)
    assert (metrics["ties"], metrics["longer_share"]) == (0.2, 0.4)
    assert metrics["win_rate_longer"] == pytest.approx((1 + 0.75) / 2)
    assert metrics["win_rate_shorter"] == pytest.approx((0.5 + 0.0) / 2)
    assert metrics["length_difference"] == pytest.approx((5 - 5 + 0 + 10 - 2) / 5)
    assert (metrics["num_compared"], metrics["num_missing"]) == (5.0, 1.0)
    assert metrics["win_rate_low"] < metrics["win_rate"] < metrics["win_rate_high"]
    again = preference_metrics(preferences, policy, baseline, ["a", "a", "b", "b", "c", "c"], seed=0)
    assert metrics == pytest.approx(again, nan_ok=True, abs=0)


def test_preference_metrics_of_nothing_are_nan():
    metrics = preference_metrics(np.full(2, NAN), np.ones(2, int), np.ones(2, int), range(2), seed=0)
    assert metrics.pop("num_compared") == 0.0
    assert metrics.pop("num_missing") == 2.0
    assert all(math.isnan(value) for value in metrics.values())
