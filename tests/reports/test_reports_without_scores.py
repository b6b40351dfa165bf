"""Reports of one job, and of answers that nobody has scored: what was measured is drawn, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest

from dpo_ref.evaluation.sweep import SweptRun
from dpo_ref.reports.plots import comparison_panels, svg
from dpo_ref.reports.sweep import sweep_page, write_sweep
from tests.support import evaluations as invented
from tests.support.pages import parsed
from tests.support.pictures import undrawn


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The initial policy and two others, as scored and as nobody scored them."""
    root = tmp_path_factory.mktemp("scores")
    baseline = invented.initial(root / "initial", 12)
    scored = [baseline, *(invented.trained(root / f"{beta}", baseline, beta, 0) for beta in (0.1, 1.0))]
    return scored, list(map(without_scores, scored))


def without_scores(policy):
    kept = {k: v for k, v in policy.evaluation.metrics.items() if not k.startswith(("gold/", "winrate/"))}
    return replace(policy, evaluation=replace(policy.evaluation, scorer="none", metrics=kept))


def job(policy, beta=0.1, state="completed", error=None):
    evaluation = policy and policy.evaluation
    return SweptRun(f"beta-{beta}", Path(), state, error, "dpo", "initial", beta, 0, (), evaluation)


def titles(panels):
    with undrawn():
        return [svg(panel) for panel in panels]


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("kind", [0, 1], ids=["scored", "not scored"])
@pytest.mark.parametrize("failed", [False, True])
def test_every_panel_of_a_sweep_has_something_in_it(tmp_path, evaluated, jobs, kind, failed):
    baseline, *others = evaluated[kind]
    swept = [job(policy, beta) for policy, beta in zip(others[:jobs], (0.1, 1.0), strict=False)]
    swept += [job(None, 3.0, "failed", "ValueError: no")] if failed else []
    with undrawn():
        write_sweep(tmp_path, swept, baseline)
        page = sweep_page(swept, baseline)
    assert (tmp_path / "sweep.png").is_file()
    names = [path.stem.partition("_")[2] for path in (tmp_path / "panels").glob("*.png")]
    assert any(name.startswith("answer_length") for name in names)
    assert ("None reward" in page, "Gold reward" in page) == (False, kind == 0)
    assert any("reward" in name for name in names) == (kind == 0)
    assert any("win_rate" in name for name in names) == (kind == 0)
    assert parsed(page).tags.count("figure") == len(names)
    assert not any(name.startswith(("none", "reward_against")) for name in names if kind == 1)


def test_a_policys_page_has_no_empty_panels_either(evaluated):
    scored, unscored = (" ".join(titles(comparison_panels(policies))) for policies in evaluated)
    assert "Gold reward" in scored
    assert "Win rate" in scored
    assert "reward" not in unscored.lower()
    assert "Answers still going on" in unscored
