"""Where the jobs of a sweep are looked for, and where results go."""

import pytest

from dpo_ref.evaluation.sweep import cells, collect, results_folder
from tests.support import evaluations as invented


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two multiruns of the same betas and seeds, and a run beside them."""
    root = tmp_path_factory.mktemp("runs")
    baseline = invented.initial(root / "initial", num_prompts=5)
    for name in ("a_sweep", "b_sweep"):
        invented.sweep(root / name, baseline, (0.3, 3.0), (0, 1))
    invented.trained(root / "single" / "evaluation", baseline, 1.0, 0)
    invented.summary(root / "single", objective="dpo", reference="initial", beta=1.0, seed=0, overrides=["beta=1"])
    return root


def test_folders_runs_patterns_and_lists_are_joined(runs):
    jobs = collect(runs / "a_sweep")
    assert [job.name for job in jobs] == [path.name for path in sorted((runs / "a_sweep").iterdir())]
    both = collect(f"{runs}/*_sweep")
    assert [job.name.split("/")[0] for job in both] == ["a_sweep"] * 4 + ["b_sweep"] * 4
    assert collect(runs / "a_sweep", runs / "b_sweep") == both
    assert collect(f"{runs}/*_sweep", runs / "a_sweep") == both  # each once
    assert [job.name for job in collect(runs / "single")] == ["single"]
    assert len(collect(f"{runs}/*")) == 9
    for nothing in (runs / "missing", f"{runs}/*_nothing", runs / "initial"):
        with pytest.raises(ValueError, match="holds no jobs; give a folder"):
            collect(runs / "a_sweep", nothing)


def test_equal_runs_of_two_sweeps_are_no_seeds(runs):
    sweep_cells = cells(collect(f"{runs}/*_sweep"))
    assert [(cell.series, cell.beta, len(cell.jobs)) for cell in sweep_cells] == [
        (f"dpo, in {sweep}", beta, 2) for sweep in ("a_sweep", "b_sweep") for beta in (0.3, 3.0)
    ]


def test_where_results_go(runs):
    assert results_folder([str(runs / "a_sweep")]) == runs / "a_sweep"
    assert str(results_folder(["outputs/x/*_sweep"])) == "outputs/evaluations/x_sweep"
    assert str(results_folder(["outputs/x/a", "outputs/x/b"])) == "outputs/evaluations/x_a_and_1_more"
