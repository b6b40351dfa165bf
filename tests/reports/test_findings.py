"""What a sweep's sentences claim: what the intervals carry, of whatever numbers come."""

from pathlib import Path

import pytest

from dpo_ref.evaluation.results import Evaluation
from dpo_ref.evaluation.sweep import Cell, SweptRun, mean_over_seeds
from dpo_ref.reports.findings import findings, gain

INITIAL = Evaluation(
    "initial", "gold", {"gold/mean": 0.30, "gold/mean_se": 0.003, "lengths/response": 14.0,
                        "lengths/response_se": 0.3, "ended/share": 1.0},
)  # fmt: skip


def cell(beta, win, half=0.04, gold=0.3, tokens=14.0, degenerate=(), seeds=1, series="dpo", ended=0.95):
    """A cell whose win rate is known to ± half, its mean reward to ± 1.96 * 0.004, its mean length to ± 1.96 * 0.4."""
    metrics = {
        "winrate/initial": win, "winrate/initial_low": win - half, "winrate/initial_high": win + half,
        "gold/mean": gold, "gold/mean_se": 0.004, "lengths/response": tokens, "lengths/response_se": 0.4,
        "ended/share": ended, "kl/initial": 2.5, "eos/chosen_logratio": -0.25,
    }  # fmt: skip
    each = [
        Evaluation(
            f"{beta}", "gold", metrics, objective=series, beta=beta, seed=seed, baseline="initial",
            degenerate=list(degenerate),
        )
        for seed in range(seeds)
    ]  # fmt: skip
    jobs = [
        SweptRun(f"{beta}-{e.seed}", Path(), "completed", None, series, "initial", beta, e.seed, (), e) for e in each
    ]
    return Cell(series, beta, jobs, mean_over_seeds(each))


def test_a_gain_has_the_interval_of_both_errors():
    mean, low, high = gain(cell(0.3, 0.6, gold=0.38), INITIAL)
    assert mean == pytest.approx(0.08)
    assert high - mean == pytest.approx(mean - low) == pytest.approx(1.96 * 0.005, rel=1e-3)  # 3, 4, 5


def test_an_optimum_inside_is_claimed_where_both_ends_are_told_apart():
    told = findings([cell(0.02, 0.5), cell(0.3, 0.7, gold=0.38), cell(3.0, 0.55)], INITIAL)
    assert told[0] == (
        "β = 0.3 gained most over the initial policy: gold +0.080 [+0.070, +0.090], win rate 70.0\u00a0% [66.0, 74.0] "
        "(95 % intervals); the best lies inside the grid."
    )


def test_what_is_not_told_apart_is_not_ranked():
    told = findings([cell(0.02, 0.5), cell(0.3, 0.62), cell(3.0, 0.6)], INITIAL)
    assert told[0].endswith("; β = 3 is not told apart from it.")
    assert "inside" not in told[0]
    several = findings([cell(0.02, 0.61), cell(0.3, 0.62), cell(3.0, 0.6)], INITIAL)
    assert several[0].endswith("; β = 0.02 and β = 3 are not told apart from it.")


def test_the_end_of_the_grid_is_no_optimum():
    told = findings([cell(0.02, 0.8), cell(0.3, 0.6), cell(3.0, 0.55)], INITIAL)
    assert told[0].startswith("β = 0.02 gained most")
    assert told[0].endswith("; it is at the end of the grid, and the best may lie beyond.")


def test_a_first_that_is_no_better_than_the_initial_policy_gained_nothing():
    assert findings([cell(0.3, 0.52), cell(3.0, 0.3)], INITIAL)[0].startswith(
        "β = 0.3 comes first, and is not told from the initial policy: gold "
    )
    assert findings([cell(0.3, 0.42), cell(3.0, 0.3)], INITIAL)[0].startswith(
        "β = 0.3 comes first, and loses to the initial policy: "
    )


def test_a_degenerate_policy_is_never_the_best():
    broken = cell(0.02, 0.9, degenerate=["loops", "long"], tokens=30.0)
    told = findings([broken, cell(3.0, 0.6)], INITIAL)
    assert told[0].startswith("β = 3 gained most")
    assert "At the smallest β, 0.02, answers grow (14.0 to 30.0 tokens), 5.0\u00a0% of them never end" in told[1]
    assert "the policy is degenerate: loops, long; at the largest, 3, answers keep their length" in told[1]
    assert findings([broken], INITIAL)[0] == "Every policy is degenerate, so none is the best."


@pytest.mark.parametrize(("tokens", "word"), [(14.9, "keep their length"), (15.1, "grow"), (12.9, "shrink")])
def test_answers_change_their_length_beyond_its_error_only(tokens, word):
    """1.96 * sqrt(0.3^2 + 0.4^2) = 0.98 tokens."""
    told = findings([cell(0.02, 0.6, tokens=tokens), cell(3.0, 0.6)], INITIAL)
    assert f"At the smallest β, 0.02, answers {word} (14.0 to " in told[1]
    assert "the end token's log-prob moved by −0.25, KL to the initial policy is 2.5 nats" in told[1]


def test_where_every_answer_ends_no_share_is_told():
    told = findings([cell(0.02, 0.6, ended=1.0), cell(3.0, 0.6, ended=1.0)], INITIAL)
    assert "answers keep their length (14.0 to 14.0 tokens), all of them still end, the end token's" in told[1]
    assert "never end" not in told[1]


def test_what_does_not_follow_names_seeds_and_world():
    one, three = (findings([cell(0.3, 0.6, seeds=n), cell(3.0, 0.5, seeds=n)], INITIAL)[-1] for n in (1, 3))
    assert "another seed of training would give the same (intervals cover prompts, not training)" in one
    assert "other data would give the same (intervals cover prompts and 3 seeds)" in three
    assert "found in a toy world whose judge is known" in one


def test_ends_of_several_objectives_are_not_compared():
    """The tau of IPO says nothing beside the beta of DPO."""
    told = findings([cell(0.02, 0.6), cell(0.3, 0.6), cell(3.0, 0.6, series="ipo_sum")], INITIAL)
    assert len(told) == 2
    assert not told[1].startswith("At the smallest")


def test_nothing_is_said_without_a_comparison():
    assert findings([], INITIAL) == []
    assert findings([cell(0.3, 0.6)], None) == []
