"""Sweeps: every job is a row whatever became of it, seeds are joined by their spread, files are always written."""

import csv
import io
import math

import numpy as np
import pytest

from dpo_ref.evaluation.results import RESULTS, Evaluation
from dpo_ref.evaluation.sweep import cells, collect, csv_text, mean_over_seeds, without_result
from dpo_ref.reports.sweep import panels, sweep_panels, sweep_tables, write_sweep
from tests.support import evaluations as invented


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two references, three betas, two seeds; then a failed, a missing, an unevaluated and two damaged jobs."""
    root = tmp_path_factory.mktemp("sweep")
    baseline = invented.initial(root / "initial", num_prompts=20)
    invented.sweep(root / "sweep", baseline, (0.005, 0.3, 3.0), (0, 1), ("initial", "other"))
    sweep = root / "sweep"
    invented.summary(
        sweep / "12_beta=10", status="failed", error="ValueError: <loss> is not finite", beta=10.0, seed=0
    )
    (sweep / "13_beta=30").mkdir()
    invented.summary(sweep / "14_beta=9", beta=9.0, objective="dpo", reference="initial", overrides=["beta=9"])
    invented.summary(sweep / "15_torn", beta=9.0)
    (sweep / "15_torn" / "summary.json").write_text('{"status": "compl')
    invented.summary(sweep / "16_odd", beta=9.0)
    (sweep / "16_odd" / RESULTS).mkdir()
    (sweep / "16_odd" / RESULTS / "evaluation.json").write_text("{}")
    (sweep / "notes").mkdir()
    return sweep, baseline


def test_every_job_is_collected_in_the_order_of_its_number(folder):
    jobs = collect(folder[0])
    assert [int(job.name.split("_")[0]) for job in jobs] == list(range(17))
    assert [job.evaluation is not None for job in jobs] == [True] * 12 + [False] * 5
    states = [job.state for job in jobs[12:]]
    assert states[0] == "failed: ValueError: <loss> is not finite"
    assert states[1:3] == ["missing", "completed, not evaluated"]
    assert states[3].startswith("unreadable: ")
    assert "lacks name, scorer, metrics" in states[4]
    assert without_result(jobs) == jobs[12:]


def test_a_folder_without_jobs_is_refused(tmp_path):
    (tmp_path / "policy").mkdir()
    with pytest.raises(ValueError, match="holds no jobs"):
        collect(tmp_path)


def test_cells_join_seeds_and_nothing_else(folder):
    sweep_cells = cells(collect(folder[0]))
    assert [(cell.series, cell.beta, len(cell.jobs)) for cell in sweep_cells] == [
        (f"dpo, reference {reference}", beta, 2) for reference in ("initial", "other") for beta in (0.005, 0.3, 3.0)
    ]
    cell = sweep_cells[1]
    pair = [job.evaluation.metrics for job in cell.jobs]
    for key in ("gold/mean", "kl/initial", "lengths/response"):
        values = [metrics[key] for metrics in pair]
        assert cell.evaluation.metrics[key] == pytest.approx(np.mean(values))
        assert cell.evaluation.metrics[f"{key}_se"] == pytest.approx(np.std(values, ddof=1))
        assert cell.spread(key) == pytest.approx(np.std(values, ddof=1))
    assert cell.evaluation.num_seeds == 2


def test_the_joined_win_rate_holds_both_kinds_of_chance():
    def evaluation(mean, half):
        metrics = {"winrate/initial": mean, "winrate/initial_low": mean - half, "winrate/initial_high": mean + half}
        return Evaluation("x", "gold", metrics, baseline="initial")

    metrics = mean_over_seeds([evaluation(0.5, 0.0392), evaluation(0.6, 0.0588)]).metrics
    # standard errors 0.02 and 0.03, variance over seeds 0.005, two seeds
    half = 1.96 * math.sqrt((0.02**2 + 0.03**2) / 2 + 0.005 / 2)
    assert metrics["winrate/initial"] == pytest.approx(0.55)
    assert metrics["winrate/initial_high"] == pytest.approx(0.55 + half)
    assert metrics["winrate/initial_low"] == pytest.approx(0.55 - half)


def test_one_degenerate_seed_marks_its_cell(folder):
    sweep_cells = cells(collect(folder[0]))
    broken = [cell for cell in sweep_cells if cell.evaluation.degenerate]
    assert {cell.beta for cell in broken} == {0.005}
    reasons = broken[0].evaluation.degenerate
    assert all(reason.startswith("2 of 2 seeds: ") and reason.endswith(" in seed 0") for reason in reasons)


def test_options_that_vary_make_series_of_their_own(tmp_path):
    baseline = invented.initial(tmp_path / "initial", num_prompts=5)
    for seed, lr in enumerate(("1e-4", "1e-4", "3e-4")):
        job = tmp_path / "sweep" / f"{seed}_lr={lr}"
        invented.trained(job / RESULTS, baseline, 0.3, seed)
        overrides = ["objective=dpo", f"optim.lr={lr}", f"seed={seed}", "trainer.epochs=2"]
        invented.summary(job, objective="dpo", reference="initial", beta=0.3, seed=seed, overrides=overrides)
    assert [(cell.series, len(cell.jobs)) for cell in cells(collect(tmp_path / "sweep"))] == [
        ("dpo, optim.lr=1e-4", 2),
        ("dpo, optim.lr=3e-4", 1),
    ]
    write_sweep(
        tmp_path / "sweep", collect(tmp_path / "sweep"), baseline
    )  # one beta only: the jobs are drawn beside each other
    assert "Share of paired comparisons won" in (tmp_path / "sweep" / "report.html").read_text()


def test_csv_holds_every_job_and_metric(folder):
    jobs = collect(folder[0])
    rows = list(csv.DictReader(io.StringIO(csv_text(jobs))))
    assert [row["job"] for row in rows] == [job.name for job in jobs]
    assert rows[12]["error"] == "ValueError: <loss> is not finite"
    assert rows[12]["gold/mean"] == ""
    first = jobs[0].evaluation
    assert first is not None
    assert {key: float(rows[0][key]) for key in first.metrics} == pytest.approx(first.metrics)
    assert "times as long" in rows[0]["degenerate"]


def terminal_text(jobs, baseline):
    from rich.console import Console

    console = Console(width=80, file=io.StringIO())
    console.print(*sweep_tables(jobs, baseline.evaluation))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_terminal_table_fits_80_characters_and_names_failures(folder):
    text = terminal_text(collect(folder[0]), folder[1])
    assert max(map(len, text.splitlines())) <= 80
    for expected in ("end Δ", "initial policy", "2 seeds", "degenerate", "12_beta=10", "13_beta=30: missing"):
        assert expected in text
    assert "…" not in text


def test_a_number_of_seeds_that_all_have_is_said_once(folder):
    whole = [cell for cell in cells(collect(folder[0])) if len(cell.jobs) == 2]
    jobs = [job for cell in whole for job in cell.jobs]
    text = terminal_text(jobs, folder[1])
    assert text.count("seeds") == text.count("means over 2 seeds") == 1
    text = terminal_text(jobs[1:], folder[1])
    assert "means over" not in text
    assert text.count("(2") == len(whole) - 1


def test_a_sweep_leaves_table_picture_and_page(folder):
    sweep, baseline = folder
    write_sweep(sweep, collect(sweep), baseline)
    page = (sweep / "report.html").read_text()
    assert "failed: ValueError: &lt;loss&gt; is not finite" in page
    assert page.count("<figure>") == 6
    assert (sweep / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len((sweep / "sweep.csv").read_text().splitlines()) == 18


def test_a_sweep_of_which_nothing_is_left_still_has_its_table(tmp_path):
    invented.summary(tmp_path / "0_beta=1", status="failed", error="out of memory", beta=1.0)
    jobs = collect(tmp_path)
    write_sweep(tmp_path, jobs, None)
    assert [job.status for job in jobs] == ["failed"]
    page = (tmp_path / "report.html").read_text()
    assert "None of the 1 jobs left a result." in page
    assert "out of memory" in page


def test_lines_go_through_the_means_and_crosses_mark_degenerate_cells(folder):
    from matplotlib.figure import Figure

    sweep, baseline = folder
    sweep_cells = cells(collect(sweep))
    axes = Figure().subplots()
    sweep_panels(sweep_cells, baseline.evaluation)[2].draw(axes)
    lines = [container.lines[0] for container in axes.containers]
    assert len(lines) == 2
    for line, cell_row in zip(lines, (sweep_cells[:3], sweep_cells[3:]), strict=True):
        assert line.get_xdata().tolist() == [0.005, 0.3, 3.0]
        assert line.get_ydata().tolist() == [cell.evaluation.metrics["lengths/response"] for cell in cell_row]
    assert axes.get_xscale() == "log"
    crosses = [line for line in axes.lines if line.get_marker() == "X" and len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in crosses] == [0.005, 0.005]
    level = baseline.evaluation.metrics["lengths/response"]
    assert any(list(line.get_ydata()) == [level, level] for line in axes.lines)


def test_pictures_leave_out_what_was_not_measured(tmp_path):
    baseline = invented.initial(tmp_path / "initial", num_prompts=5)
    invented.sweep(tmp_path / "sweep", baseline, (0.1, 1.0), (0,))
    sweep_cells = cells(collect(tmp_path / "sweep"))
    for cell in sweep_cells:
        del cell.evaluation.metrics["kl/initial"]
    assert len(panels(collect(tmp_path / "sweep"), sweep_cells, baseline.evaluation)) == 3
