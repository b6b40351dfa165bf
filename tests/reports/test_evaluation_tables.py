"""What a sweep says: the Pareto front, the best strength of each series, the paper's table; which runs it joins."""

import csv
import io
import math
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ref.evaluation.results import Evaluation
from dpo_ref.evaluation.sweep import Cell, SweptRun, mean_over_seeds, short_names
from dpo_ref.reports import paper_table as tables
from dpo_ref.reports.findings import best_strengths, interval, strength_table, told_apart
from dpo_ref.reports.plots import figure_of
from dpo_ref.reports.policy import TemperatureCurve, temperature_panels, temperatures
from dpo_ref.reports.sweep import (
    front_of,
    frontier_csv,
    frontier_panel,
    point_axis,
    temperature_curves,
    undominated,
)
from tests.support.command import ROOT, composed


def cell(series="dpo", beta=0.1, wins=(0.6,), half=0.04, kl=1.0, gold=0.5, tokens=10.0, degenerate=()):
    """A cell whose seeds have these win rates, each with an interval of mean ± half."""
    evaluations = [
        Evaluation(
            "x",
            "gold",
            {
                "winrate/initial": win,
                "winrate/initial_low": win - half,
                "winrate/initial_high": win + half,
                "gold/mean": gold,
                "kl/initial": kl,
                "lengths/response": tokens,
            },
            baseline="initial",
            objective="dpo",
            degenerate=list(degenerate),
        )
        for win in wins
    ]
    jobs = [
        SweptRun("", Path(), "completed", None, "dpo", "initial", beta, seed, (), evaluation)
        for seed, evaluation in enumerate(evaluations)
    ]
    return Cell(series, beta, jobs, mean_over_seeds(evaluations))


def test_the_front_by_hand():
    distances = np.array([3.0, 1.0, 2.0, 2.0, 4.0, math.nan])
    rewards = np.array([0.5, 0.4, 0.6, 0.6, 0.7, 0.9])
    assert undominated(distances, rewards) == [1, 2, 3, 4]  # 0 costs more than 2 and has less; 2 and 3 are equal


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_front_by_brute_force(points):
    distances, rewards = np.array(points, float).T
    beaten = [
        any(
            d <= distance and r >= reward and (d < distance or r > reward)
            for d, r in zip(distances, rewards, strict=True)
        )
        for distance, reward in zip(distances, rewards, strict=True)
    ]
    assert sorted(undominated(distances, rewards)) == [index for index, out in enumerate(beaten) if not out]


def test_degenerate_cells_are_never_on_the_front():
    cells = [cell(kl=1.0, gold=0.4), cell(kl=2.0, gold=0.6, degenerate=["loops"]), cell(kl=3.0, gold=0.5)]
    assert front_of(cells) == [cells[0], cells[2]]
    rows = list(csv.DictReader(io.StringIO(frontier_csv(cells))))
    assert [row["pareto"] for row in rows] == ["1", "0", "1"]
    assert [float(row["kl/initial"]) for row in rows] == [1.0, 2.0, 3.0]
    assert [row["degenerate"] for row in rows] == ["", "loops", ""]


def test_the_front_is_drawn_from_the_initial_policy_to_its_corners():
    from matplotlib.figure import Figure

    cells = [cell(beta=1.0, kl=1.0, gold=0.3), cell(beta=0.3, kl=2.0, gold=0.6), cell(beta=0.1, kl=3.0, gold=0.5)]
    axes = Figure().subplots()
    frontier_panel(cells, Evaluation("initial", "gold", {"gold/mean": 0.4})).draw(axes)
    (front,) = (line for line in axes.lines if line.get_label() == "Pareto front")
    assert (list(front.get_xdata()), list(front.get_ydata())) == ([0.0, 2.0], [0.4, 0.6])
    assert [text.get_text() for text in axes.texts] == ["1", "0.3", "0.1"]


def test_an_interval_holds_both_kinds_of_chance():
    # one seed: 1.96 standard errors
    assert interval(cell(wins=(0.6,), half=0.0392), "winrate/initial") == pytest.approx((0.5608, 0.6392), abs=1e-6)
    # three seeds, variance over them 0.01: t(0.975, 2) = 4.302653; standard error of one evaluation 0.02
    low, high = interval(cell(wins=(0.5, 0.6, 0.7), half=0.0392), "winrate/initial")
    assert high - 0.6 == pytest.approx(4.302653 * math.sqrt(0.02**2 + 0.01 / 3), rel=1e-6)
    assert 0.6 - low == pytest.approx(high - 0.6)


def test_strengths_are_told_apart_in_pairs_of_seeds():
    best = cell(wins=(0.60, 0.70, 0.80))
    # always lower by 0.04 ± 0.01: far more than the paired standard error 0.00577 x 4.30, far less than the spread
    assert told_apart(best, cell(wins=(0.56, 0.67, 0.75)), "winrate/initial")
    assert not told_apart(best, cell(wins=(0.70, 0.55, 0.75)), "winrate/initial")
    # one seed: standard errors of 0.02 each, so 0.05544 is the threshold
    assert not told_apart(cell(wins=(0.6,), half=0.0392), cell(wins=(0.545,), half=0.0392), "winrate/initial")
    assert told_apart(cell(wins=(0.6,), half=0.0392), cell(wins=(0.544,), half=0.0392), "winrate/initial")


@pytest.fixture
def reference_cells():
    """Two references; the second one's loosest is degenerate, though it wins most."""
    return [
        cell("dpo, reference initial", 0.1, (0.50,), tokens=21.66),
        cell("dpo, reference initial", 1.0, (0.60,), tokens=15.0),
        cell("dpo, reference none", 0.1, (0.90,), tokens=47.0, degenerate=["long"]),
        cell("dpo, reference none", 0.3, (0.41,)),
        cell("dpo, reference none", 1.0, (0.42,)),
    ]


def test_the_best_strength_of_each_series_is_sound(reference_cells):
    first, second = best_strengths(reference_cells)
    assert first.best is reference_cells[1]
    assert first.as_good == []
    assert second.best is reference_cells[4]
    assert second.as_good == [0.3]
    assert second.degenerate == [0.1]
    names, rows = strength_table(reference_cells)
    assert names[:3] == ["Series", "Best β", "Win rate against initial, %"]
    assert rows[0] == ["reference initial", "1", "60.0 [56.0, 64.0]", "15.0", "1.00", "–", "–"]
    assert rows[1][5:] == ["0.3", "0.1"]
    assert best_strengths(reference_cells[2:3])[0].best is None


def test_series_are_named_by_what_tells_them_apart(reference_cells):
    assert list(short_names(reference_cells).values()) == ["reference initial", "reference none"]
    assert short_names(reference_cells[:2]) == {"dpo, reference initial": "dpo, reference initial"}


def test_the_paper_table_by_hand(reference_cells):
    table = tables.paper_table(reference_cells)
    assert table.groups == ["reference initial", "reference none"]
    assert [(label, [entry.text for entry in entries]) for label, entries in table.rows] == [
        ("0.1", ["50.0 ± 2.0", "21.7", "90.0 ± 2.0†", "47.0"]),
        ("0.3", ["–", "–", "41.0 ± 2.0", "10.0"]),
        ("1", ["60.0 ± 2.0", "15.0", "42.0 ± 2.0", "10.0"]),
    ]
    assert [[entry.best for entry in entries] for _, entries in table.rows] == [
        [False] * 4, [False] * 4, [True, False, True, False]
    ]  # fmt: skip
    assert "† degenerate" in table.note
    with pytest.raises(ValueError, match="no cells"):
        tables.paper_table([])


def test_every_form_of_the_paper_table_has_the_same_entries(reference_cells):
    table = tables.paper_table(reference_cells)
    rows = list(csv.reader(io.StringIO(tables.csv_table(table))))
    assert rows[0] == ["β", "reference initial: win rate, %", "reference initial: tokens",
                       "reference none: win rate, %", "reference none: tokens"]  # fmt: skip
    assert rows[1] == ["0.1", "50.0 ± 2.0", "21.7", "90.0 ± 2.0†", "47.0"]
    markdown = tables.markdown_table(table).splitlines()
    assert markdown[4] == "| 1 | **60.0 ± 2.0** | 15.0 | **42.0 ± 2.0** | 10.0 |"
    assert len({line.count("|") for line in markdown[:5]}) == 1
    page = tables.html_table(table)
    assert page.count("<td") == 12
    assert "<td class=best>60.0 ± 2.0</td>" in page
    latex = tables.latex_table(table)
    assert r"0.1 & 50.0 $\pm$ 2.0 & 21.7 & 90.0 $\pm$ 2.0$^\dagger$ & 47.0 \\" in latex
    assert r"\cmidrule(lr){2-3}\cmidrule(lr){4-5}" in latex


def test_latex_has_no_bare_special_character(reference_cells):
    nasty = [cell("dpo, a_b=50% & {x} $ # ~^\\", 0.1), *reference_cells[:1]]
    body = [line for line in tables.latex_table(tables.paper_table(nasty)).splitlines() if "multicolumn" in line]
    assert r"a\_b=50\% \& \{x\} \$ \# \textasciitilde{}\textasciicircum{}\textbackslash{}" in body[0]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex is installed, so no table is set with it")
def test_latex_is_set_by_latex(reference_cells, tmp_path):
    body = tables.latex_table(tables.paper_table(reference_cells))
    document = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}" + body + "\\end{document}"
    (tmp_path / "t.tex").write_text(document)
    subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True)


def test_a_terminal_shows_three_series_beside_each_other(reference_cells):
    from rich.console import Console

    many = [cell(f"dpo, reference {name}", beta) for name in "abcdefg" for beta in (0.1, 1.0)]
    parts = tables.terminal_tables(tables.paper_table(many))
    assert [len(part.columns) for part in parts] == [7, 7, 3]
    console = Console(width=80, file=io.StringIO())
    console.print(*parts)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("60.0±2.0") == 14


def test_temperature_curves_are_drawn_from_the_keys():
    from matplotlib.figure import Figure

    metrics = {
        "temperature/1/gold/mean": 0.4, "temperature/0.5/gold/mean": 0.6, "temperature/0/gold/mean": 0.5,
        "temperature/0/gold/mean_se": 0.1, "gold/mean": 0.4,
        "temperature/1/winrate/initial": 0.5, "temperature/1/winrate/initial_low": 0.4,
    }  # fmt: skip
    policy = Evaluation("p", "gold", metrics, baseline="initial")
    assert temperatures(policy, "gold/mean") == [0.0, 0.5, 1.0]
    (panel,) = temperature_panels([TemperatureCurve(policy, "p", "#2563eb")])  # one temperature makes no curve
    axes = Figure().subplots()
    panel.draw(axes)
    assert list(axes.lines[0].get_xdata()) == [0.0, 0.5, 1.0]
    assert list(axes.lines[0].get_ydata()) == [0.5, 0.6, 0.4]
    (bars,) = axes.containers[0].lines[2]
    assert bars.get_segments()[0][:, 1] == pytest.approx([0.5 - 0.196, 0.5 + 0.196])
    assert (
        temperature_panels([]) == temperature_panels([TemperatureCurve(Evaluation("q", "gold", {}), "q", "k")]) == []
    )


def test_temperatures_of_several_policies_stay_apart_and_the_verdict_is_marked_where_it_holds():
    """The initial policy is dashed; the cross stands at temperature 1, whose answers the verdict is on."""
    from matplotlib.figure import Figure

    metrics = {"temperature/0/gold/mean": 0.5, "temperature/1/gold/mean": 0.4}
    initial = Evaluation("initial", "gold", metrics)
    broken = Evaluation("p", "gold", metrics, baseline="initial", degenerate=["x"], generation={"temperature": 1.0})
    (panel,) = temperature_panels(
        [TemperatureCurve(initial, "initial", "#000000"), TemperatureCurve(broken, "p", "#2563eb80")]
    )
    axes = Figure().subplots()
    panel.draw(axes)
    first, second = (container.lines[0] for container in axes.containers)
    assert (first.get_linestyle(), second.get_linestyle()) == ("--", "-")
    assert all(0 < b - a < 0.05 for a, b in zip(first.get_xdata(), second.get_xdata(), strict=True))
    (cross,) = [line for line in axes.lines if line.get_marker() == "X"]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (second.get_xdata()[1], 0.4)


def test_every_cell_of_a_small_sweep_has_its_curve():
    """Fainter where the beta is smaller; of many cells the best of each series."""
    cells = [cell("dpo", 0.1), cell("dpo", 1.0, wins=(0.7,)), cell("ipo_sum", 0.1)]
    curves = temperature_curves(cells)
    assert [curve.evaluation for curve in curves] == [swept_cell.evaluation for swept_cell in cells]
    assert [curve.name for curve in curves] == ["dpo, β = 0.1", "dpo, β = 1", "ipo_sum, β = 0.1"]
    faint, strong, other = (curve.colour for curve in curves)
    assert faint[:7] == strong[:7] != other[:7]
    assert (int(faint[7:], 16), strong[7:], other[7:]) == (round(255 * 0.7), "ff", "ff")
    more = [cell("dpo", 3.0, wins=(0.9,), half=0.01), cell("ipo_sum", 1.0, wins=(0.55,)), cell("ipo_sum", 3.0)]
    assert [curve.name for curve in temperature_curves([*cells, *more])] == ["dpo, β = 3", "ipo_sum, β = 0.1"]


COMMANDS = re.findall(r"^python evaluate\.py (.*)$", (ROOT / "docs" / "reports.md").read_text(), re.M)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_page_compose(line):
    cfg, _ = composed(*shlex.split(line), kind="evaluate")
    assert "outputs/default/" in str(cfg.sweep)


def test_labels_of_many_strengths_do_not_meet():
    betas = [round(0.01 * index, 2) for index in range(1, 21)]
    with figure_of(1, 1) as (figure, (axes,)):
        point_axis(axes, [cell(beta=beta) for beta in betas])
        axes.plot(betas, betas)
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert len(boxes) > 5
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
