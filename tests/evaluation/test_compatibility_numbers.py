"""The report's numbers: every one by hand, by loops, or from a property it must have."""

import math

import numpy as np
import pytest

from dpo_ref.evaluation import compatibility as numbers
from dpo_ref.evaluation.compatibility import CompatibilityOptions, Pairs
from dpo_ref.evaluation.kl import BY_TEXT, estimate_divergence
from dpo_ref.evaluation.statistics.estimates import Estimate
from dpo_ref.reports.compatibility import interval, share

RNG = np.random.default_rng(3)
POLICY, REFERENCE = RNG.normal(-40, 9, 24), RNG.normal(-37, 8, 24)
# Twelve pairs: group g has responses 2g and 2g + 1; every two groups share a prompt; one reference margin is a tie.
REFERENCE[7] = REFERENCE[6]
PAIRS = Pairs(np.arange(0, 24, 2), np.arange(1, 24, 2), RNG.integers(1, 60, 24), np.arange(24) // 4)


def correlation(a, b):
    """Pearson's formula, one term after the other."""
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    cross = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    squares = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
    return cross / math.sqrt(squares)


def ranked(values):
    """Mean rank by counting how many are below and how many are equal."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def clustered(values, clusters):
    """Mean, and the error from the sums of residuals by cluster."""
    mean = sum(values) / len(values)
    sums = [
        sum(v - mean for v, c in zip(values, clusters, strict=True) if c == cluster)
        for cluster in sorted(set(clusters))
    ]
    count = len(sums)
    return mean, math.sqrt(sum(s * s for s in sums) / len(values) ** 2 * count / (count - 1))


def test_a_model_alone():
    alone = numbers.alone(REFERENCE, PAIRS)
    margins = [REFERENCE[2 * i] - REFERENCE[2 * i + 1] for i in range(12)]
    right = [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins]
    assert right.count(0.5) == 1
    prompts = [i // 2 for i in range(12)]
    assert alone.accuracy == pytest.approx(clustered(right, prompts))
    assert alone.margin == pytest.approx(clustered(margins, prompts))
    longer = [float(PAIRS.num_bytes[2 * i] - PAIRS.num_bytes[2 * i + 1]) for i in range(12)]
    assert alone.length_correlation == pytest.approx(correlation(margins, longer))


def test_a_reference_beside_the_policy():
    beside = numbers.beside(POLICY, REFERENCE, PAIRS, seed=0)
    ours, theirs = (x[0::2] - x[1::2] for x in (POLICY, REFERENCE))
    assert beside.logps_pearson == pytest.approx(correlation(POLICY, REFERENCE))
    assert beside.logps_spearman == pytest.approx(correlation(ranked(POLICY), ranked(REFERENCE)))
    assert beside.margins_pearson == pytest.approx(correlation(ours, theirs))
    assert beside.margins_spearman == pytest.approx(correlation(ranked(ours), ranked(theirs)))
    low, high = beside.margins_spearman_interval
    assert -1 <= low < beside.margins_spearman < high <= 1
    gaps = [(p - r) / b for p, r, b in zip(POLICY, REFERENCE, PAIRS.num_bytes, strict=True)]
    assert beside.gap_per_byte == pytest.approx(clustered(gaps, [i // 4 for i in range(24)]))
    per_byte = [ranked(x / PAIRS.num_bytes) for x in (POLICY, REFERENCE)]
    assert beside.per_byte_spearman == pytest.approx(correlation(*per_byte))
    right = [
        (float(a > 0) + float(a >= 0) - float(b > 0) - float(b >= 0)) / 2 for a, b in zip(theirs, ours, strict=True)
    ]
    assert beside.accuracy_difference == pytest.approx(clustered(right, [i // 2 for i in range(12)]))


def test_ranks_share_ties():
    assert numbers.ranks(np.array([2.0, 1.0, 2.0, 5.0])).tolist() == [2.5, 1.0, 2.5, 4.0]


def test_saturation_and_weights_by_hand():
    """Rewards -5, 0, 3, 6, ln 3 at beta 1: one pair saturated on each side; the weight of ln 3 is 1/4."""
    margins = np.array([-5.0, 0.0, 3.0, 6.0, math.log(3)])
    at_one = numbers.at_beta(margins, 1.0, range(5))
    assert (at_one.saturated.mean, at_one.saturated_wrong, at_one.saturated_right) == (0.4, 0.2, 0.2)
    weights = [1 / (1 + math.exp(m)) for m in margins]
    assert weights[4] == pytest.approx(0.25)
    assert at_one.effective_share == pytest.approx(sum(weights) ** 2 / (5 * sum(w * w for w in weights)))
    assert at_one.loss == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 5)
    assert at_one.weight_quantiles[2] == pytest.approx(0.25)  # the middle one of five
    tenth = numbers.at_beta(margins, 0.1, range(5))
    assert tenth.saturated.mean == 0
    far = numbers.at_beta(1e4 * np.ones(4), 3.0, range(4))  # weights of e^-30000 are zero in floating point
    assert far.effective_share == pytest.approx(1.0)


def test_where_to_start():
    """A hundred margins of +-10 in equal parts: saturated from beta 0.4 on, s.d. 1 at beta 0.1."""
    margins = np.array([10.0, -10.0] * 50)
    start = numbers.start(margins, [0.01, 0.3, 1.0], range(100))
    assert (start.sd, start.mean, start.listed) == (10, 0, 0.3)
    assert start.unit == pytest.approx(0.1)
    assert numbers.start(margins, [1.0], range(100)).listed is None
    some = np.concatenate([margins, [100.0] * 5])  # 5 of 105 are beyond at 0.3, 4.8 %
    assert numbers.start(some, [0.3], range(105)).listed == 0.3
    assert numbers.start(np.append(some, 100.0), [0.3], range(106)).listed is None


def test_a_policy_beside_itself():
    beside = numbers.beside(POLICY, POLICY, PAIRS, seed=0)
    assert beside.logps_pearson == pytest.approx(1)
    assert (beside.margins_spearman, beside.accuracy_difference) == (pytest.approx(1), Estimate(0, 0))
    assert beside.gap_per_byte == Estimate(0, 0)
    start = numbers.start(np.zeros(12), [0.1, 3.0], PAIRS.clusters)
    assert (start.sd, start.unit, start.listed) == (0, None, 3.0)
    assert all(at.loss == pytest.approx(math.log(2)) and at.saturated.mean == 0 for at in start.at)
    assert all(at.effective_share == pytest.approx(1) for at in start.at)


def test_no_reference_has_no_relations():
    beside = numbers.beside(POLICY, np.zeros(24), PAIRS, seed=0)
    assert all(map(math.isnan, (beside.logps_spearman, beside.margins_spearman, beside.gap_per_byte.mean)))


def test_kl_per_byte_is_a_ratio_of_totals():
    values, num_bytes = np.array([3.0, 1.0, 8.0]), np.array([10.0, 10.0, 20.0])
    divergence = estimate_divergence(values, num_bytes, [0, 1, 2], BY_TEXT, 1)
    assert divergence.per_answer is not None
    assert divergence.per_byte is not None
    assert (divergence.per_answer.mean, divergence.per_byte.mean) == (4.0, 0.3)
    residuals = [0.0, -2.0, 2.0]  # of 0.3 nats a byte
    assert divergence.per_byte.se == pytest.approx(math.sqrt(sum(r * r for r in residuals) / 9 * 3 / 2) / (40 / 3))


def test_shares_are_told_with_their_interval():
    assert share(Estimate(0.71, 0.01)) == "71\u00a0% [69, 73]"
    assert share(Estimate(0.0, 0.0)) == "0\u00a0%"
    assert interval(Estimate(0.5, 0.1)) == pytest.approx((0.304, 0.696))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_pairs": 1}, "compatibility.num_pairs=1"), ({"max_new_tokens": 0}, "compatibility.max_new_tokens=0"),
     ({"betas": [0.0]}, "must be positive"), ({"betas": []}, "at least one")],
)  # fmt: skip
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        CompatibilityOptions(**options)
