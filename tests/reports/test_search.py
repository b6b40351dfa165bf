"""A search in the report of its sweep: who came how far, what it cost, and that those left behind are not compared."""

import csv
from io import StringIO

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from dpo_ref.evaluation.sweep import cells, collect
from dpo_ref.reports.grid import ranked_grids
from dpo_ref.reports.search import search_panels, search_sentence, search_table, searched
from dpo_ref.reports.sweep import sweep_page, sweep_tables, write_sweep
from tests.support import grids as made
from tests.support.faults import forge_summary
from tests.support.pictures import undrawn

VALUES = {
    ("0.0001", 0.1): (0.40,), ("0.0001", 1.0): (0.52, 0.55, 0.61),
    ("0.001", 0.1): (0.45,), ("0.001", 1.0): (0.50, 0.54),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("search")
    made.search(root / "sweep", VALUES)
    return root / "sweep", made.baseline(root / "initial")


def test_who_came_how_far(folder):
    titles, rows = search_table(searched(collect(folder[0])))
    assert titles == ["Cell", "Step 32", "Step 80", "Step 256"]
    assert rows == [
        ["optim.lr=0.0001 beta=1.0", "0.52", "0.55", "0.61"],
        ["optim.lr=0.001 beta=1.0", "0.5", "0.54", "–"],
        ["optim.lr=0.001 beta=0.1", "0.45", "–", "–"],
        ["optim.lr=0.0001 beta=0.1", "0.4", "–", "–"],
    ]


def test_what_it_cost(folder):
    """32 + 256 + 32 + 80 steps of 4 times 256."""
    assert search_sentence(searched(collect(folder[0]))) == (
        "Searched by evaluation/gold/mean (higher is better): of 4 cells, 2 from step 32 and 1 from step 80 went on. "
        "All jobs made 400 optimiser steps of the 1,024 to their ends (39%)."
    )


def test_seeds_are_joined_and_steps_that_differ_are_rungs(tmp_path):
    for seed, value in enumerate((0.4, 0.6)):
        made.search(tmp_path / str(seed), {("0.001", 1.0): (value,), ("0.01", 1.0): (0.3, 0.2, 0.1)})
    for index, job in enumerate(sorted(tmp_path.glob("?/*"))):
        job.rename(tmp_path / f"{index}_x")
    jobs = collect(tmp_path)
    assert [row[1] for row in search_table(searched(jobs))[1]] == ["0.3", "0.5"]
    made.search(tmp_path / "other", {("0.1", 1.0): (0.2,)}, steps=(10, 20, 30))
    mixed = [*jobs, *collect(tmp_path / "other")]
    assert search_table(searched(mixed))[0] == ["Cell", "Rung 1", "Step 80", "Step 256"]


def test_those_left_behind_are_neither_compared_nor_failures(folder):
    sweep, baseline = folder
    jobs = collect(sweep)
    made.measured(sweep / "3_beta-1_optim.lr-0.001", 1.0, 0, 0.99)  # by hand, after 80 of 256 steps
    jobs = collect(sweep)
    assert [cell.jobs[0].name for cell in cells(jobs)] == ["1_beta-1_optim.lr-0.0001"]
    (ranked,) = ranked_grids(jobs, cells(jobs))
    assert ranked.best == (0.0001, 1.0)
    page = sweep_page(jobs, baseline)
    assert 'class="failed"' not in page
    assert "<h2>Search</h2>" in page
    console = Console(width=80, file=StringIO())
    console.print(*sweep_tables(jobs, baseline.evaluation))
    text = console.file.getvalue()
    assert "cell of the search" in text
    assert "stopped" not in text
    with undrawn():
        write_sweep(sweep, jobs, baseline)
    rows = list(csv.DictReader((sweep / "sweep.csv").read_text().splitlines()))
    assert [(row["status"], row["rung"], row["rung_step"], row["rung_value"]) for row in rows] == [
        ("stopped", "1", "32", "0.4"), ("completed", "3", "256", "0.61"), ("stopped", "1", "32", "0.45"),
        ("stopped", "2", "80", "0.54"),
    ]  # fmt: skip


def test_the_picture_has_the_last_rung_of_every_cell(folder):
    (panel,) = search_panels(collect(folder[0]))
    axes = Figure().subplots()
    panel.draw(axes)
    assert axes.get_title() == "Search by evaluation/gold/mean"
    assert [text.get_text() for text in axes.texts] == [
        "0.4", "step 32", "0.61", "step 256", "0.45", "step 32", "0.54", "step 80",
    ]  # fmt: skip
    assert sum(not patch.get_fill() for patch in axes.patches) == 1


@pytest.mark.parametrize(
    "content", [5, {"rungs": 3}, {"metric": "x", "better": "higher", "of": 3, "num_steps": 9, "rungs": [{}]}]
)
def test_a_record_that_is_none_is_told_and_the_table_comes_out(tmp_path, content):
    made.search(tmp_path, VALUES)
    job = tmp_path / "0_beta-0.1_optim.lr-0.0001"
    forge_summary(job, {"status": "stopped", "stopped_by": "search.rung", "search": content})
    jobs = collect(tmp_path)
    assert jobs[0].status == "unreadable"
    assert "its search is no record of rungs" in jobs[0].error
    assert len(searched(jobs)) == 3
