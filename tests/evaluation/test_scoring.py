"""Scores against hand-derived numbers, and intervals against their own promise."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from dpo_ref.evaluation.heldout import pair_accuracy
from dpo_ref.evaluation.scorers import length
from dpo_ref.evaluation.stages import seq_rep_4, text_metrics
from dpo_ref.evaluation.statistics.comparisons import win_rate
from dpo_ref.evaluation.statistics.estimates import bootstrap_interval, clustered_mean
from dpo_ref.lab.conversations import FAMILIES, read_prompt
from dpo_ref.lab.gold import gold
from dpo_ref.lab.preferences import draw_prompts
from dpo_ref.lab.tasks import enumeration
from tests.support.command import resolved
from tests.support.evaluations import answer


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3], 0.0),  # no 4-gram
        ([1, 2, 3, 4], 0.0),  # one
        ([7] * 8, 4 / 5),  # five 4-grams, all equal
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 2341 3412 4123 1234: the first comes back
        ([1, 2, 1, 2, 1, 2, 1], 1 - 2 / 4),  # 1212 2121 1212 2121
    ],
)
def test_seq_rep_4_counts_repeated_4_grams(tokens, expected):
    assert seq_rep_4(tokens) == pytest.approx(expected)


def test_the_distance_to_a_length_by_hand():
    answers = [
        answer(0, 0, [5, 6, 2], True, "abc"),
        answer(0, 1, [7] * 19, False, "x"),
        answer(1, 0, [2] * 4, True, ""),
    ]
    assert length(answers, target=4) == ("length", pytest.approx([-0.1, -1.5, 0.0]))  # the end token counted


def test_a_length_that_no_answer_has_is_refused():
    with pytest.raises(ValueError, match=r"scorer.target=0 must be at least 1"):
        resolved("scorer=length", "scorer.target=0", kind="evaluate")


def test_text_metrics_by_hand():
    answers = [
        answer(0, 0, [5, 6, 2], True, "abc"),
        answer(0, 1, [7] * 9, False, "abcdefgh"),  # cut: all nine tokens are content, 4-grams 6, one distinct
        answer(1, 0, [8] * 6 + [2], True, "x"),  # ended: six tokens of content, 4-grams 3, one distinct
        answer(1, 1, [4, 2], True, ""),
    ]
    metrics = text_metrics(answers)
    assert metrics["lengths/response"] == pytest.approx((3 + 9 + 7 + 2) / 4)
    assert metrics["lengths/response_se"] == pytest.approx(abs(6 - 4.5) / 2)  # two prompt means: |a - b| / 2
    assert metrics["lengths/response_chars"] == 3.0
    assert metrics["lengths/response_median"] == 5.0
    assert metrics["ended/share"] == 0.75
    assert metrics["ended/share_se"] == pytest.approx(0.25)
    assert metrics["repetition/seq_rep_4"] == pytest.approx((0 + 5 / 6 + 2 / 3 + 0) / 4)
    with pytest.raises(ValueError, match="no generations"):
        text_metrics([])


def test_clustered_error_is_that_of_cluster_means_and_more_than_the_naive_one():
    values = [0.1, 0.3, 0.8, 0.9, 0.2, 0.2]
    clusters = ["a", "a", "b", "b", "c", "c"]
    estimate = clustered_mean(values, clusters)
    means = np.array([0.2, 0.85, 0.2])
    assert estimate.mean == pytest.approx(np.mean(values))
    assert estimate.se == pytest.approx(means.std(ddof=1) / math.sqrt(3))
    assert estimate.se > clustered_mean(values, range(6)).se
    assert clustered_mean(values, range(6)).se == pytest.approx(np.std(values, ddof=1) / math.sqrt(6))


def test_clustered_error_of_unequal_clusters_by_hand():
    estimate = clustered_mean([1.0, 2.0, 6.0], ["a", "a", "b"])  # residual sums -3 and 3
    assert estimate.se == pytest.approx(math.sqrt((9 + 9) / 9 * 2 / 1))
    assert math.isnan(clustered_mean([1.0, 2.0], ["a", "a"]).se)
    assert math.isnan(clustered_mean([], []).mean)


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for repetition in range(300):
        low, high = bootstrap_interval(generator.choice([0, 0.5, 1], size=80, p=[0.3, 0.2, 0.5]), repetition)
        covered += low <= 0.6 <= high
    assert 0.90 < covered / 300 < 0.985


def test_bootstrap_interval_is_seeded_whatever_its_chunks():
    values = np.linspace(0, 1, 57)
    assert bootstrap_interval(values, 3) == bootstrap_interval(values, 3)
    assert bootstrap_interval(values, 3) != bootstrap_interval(values, 4)
    low, high = bootstrap_interval(values, 3)
    half = 1.96 * values.std() / math.sqrt(57)
    assert (low, high) == (pytest.approx(0.5 - half, abs=0.01), pytest.approx(0.5 + half, abs=0.01))


def test_win_rate_of_single_samples_by_hand():
    ours, theirs = [answer(p) for p in range(4)], [answer(p, seed=9) for p in (2, 0, 3, 1)]
    rate = win_rate(ours, [0.9, 0.2, 0.5, 0.4], theirs, [0.5, 0.1, 0.1, 0.3], seed=0)
    # prompts 0..3: 0.9 > 0.1 win, 0.2 < 0.3 loss, 0.5 = 0.5 tie, 0.4 > 0.1 win
    assert (rate.mean, rate.ties, rate.num_prompts) == (2.5 / 4, 1 / 4, 4)
    assert rate.low < rate.mean < rate.high


def test_win_rate_compares_all_independent_pairs_of_samples():
    ours = [answer(0, s) for s in range(3)] + [answer(1, 0)]
    theirs = [answer(0, s) for s in range(2)] + [answer(1, 0)]
    rate = win_rate(ours, [1.0, 0.0, 0.5, 0.3], theirs, [0.5, 0.25, 0.6], seed=0)
    # prompt 0, pairs of different draws: (0,1) 1 > .25 win, (1,0) 0 < .5 loss, (2,0) .5 = .5 tie, (2,1) .5 > .25 win
    # prompt 1 has the one pair only: .3 < .6 loss
    assert rate.mean == pytest.approx((2.5 / 4 + 0) / 2)
    assert rate.ties == pytest.approx((1 / 4 + 0) / 2)
    other_seed = [answer(0, s, seed=4) for s in range(2)] + [answer(1, 0, seed=4)]
    independent = win_rate(ours, [1.0, 0.0, 0.5, 0.3], other_seed, [0.5, 0.25, 0.6], seed=0)
    assert independent.mean == pytest.approx((3.5 / 6 + 0) / 2)  # all six pairs: W W L L T W


def test_win_rate_is_antisymmetric_and_half_against_itself():
    generator = np.random.default_rng(0)
    answers = [answer(p, s) for p in range(30) for s in range(4)]
    a, b = generator.integers(0, 5, size=(2, 120)).astype(float).tolist()
    forth, back = win_rate(answers, a, answers, b, seed=0), win_rate(answers, b, answers, a, seed=0)
    assert forth.mean == pytest.approx(1 - back.mean)
    assert forth.ties == pytest.approx(back.ties)
    assert win_rate(answers, a, answers, a, seed=0).mean == pytest.approx(0.5)


def test_win_rate_needs_the_same_prompts():
    with pytest.raises(ValueError, match="only 1 prompts are shared by the policy's 2 and the baseline's 1"):
        win_rate([answer(0), answer(1)], [0.1, 0.2], [answer(1)], [0.3], seed=0)
    with pytest.raises(ValueError, match="same prompts"):
        win_rate([], [], [], [], seed=0)


def test_pair_accuracy_by_hand():
    metrics = pair_accuracy(
        np.array([1.0, -2.0, 0.5, 0.0, 3.0]),
        np.array([0.0, -1.0, 0.5, -0.5, 1.0]),
        np.array([5, 9, 4, 2, 3]),
        np.array([4, 3, 4, 8, 3]),
    )
    assert metrics["rewards/accuracies"] == pytest.approx(3 / 5)  # the tie is wrong
    assert metrics["rewards/ties"] == pytest.approx(1 / 5)
    assert metrics["rewards/margins"] == pytest.approx((1 - 1 + 0 + 0.5 + 2) / 5)
    assert metrics["rewards/length_baseline"] == pytest.approx((1 + 1 + 0.5 + 0 + 0.5) / 5)
    assert metrics["rewards/accuracies_se"] == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    with pytest.raises(ValueError, match="no held-out pairs"):
        pair_accuracy(*(np.zeros(0) for _ in range(4)))


def test_gold_scorer_reads_prompt_text_and_whether_the_answer_ended():
    rights, cuts, wrongs = [], [], []
    for prompt in draw_prompts("test", 12):
        task = read_prompt(prompt)
        items = FAMILIES[task.family].right(dict(task.slots), random.Random(0))
        right = replace(answer(text=enumeration(items) + "."), prompt=prompt)
        rights.append(right)
        cuts.append(replace(right, finish_reason="length"))
        wrongs.append(replace(right, output="I do not know."))
    assert min(gold(rights).values) > 0.99
    assert max(gold(cuts).values) < 0.8
    assert gold(wrongs).values == [0.0] * 12
