"""A sweep over two keys: what stands where, the best cell and those within its error by hand, and how it is drawn."""

import re

import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from dpo_ref.evaluation.grid import grids
from dpo_ref.evaluation.sweep import cells, collect
from dpo_ref.reports.grid import DARK, LIGHT, MAP, SPLIT, _luminance, grid_panel, grid_sentence, ranked_grids
from dpo_ref.reports.plots import svg
from dpo_ref.reports.sweep import panels, sweep_page, sweep_tables, write_sweep
from tests.support import evaluations as invented
from tests.support import grids as made
from tests.support.pictures import undrawn

GOLD = {
    ("0.0001", 0.1): 0.60, ("0.0001", 1.0): 0.55, ("0.0001", 3.0): 0.52,
    ("0.0003", 0.1): 0.90, ("0.0003", 1.0): 0.62, ("0.0003", 3.0): 0.58,
    ("0.001", 0.1): 0.30, ("0.001", 1.0): 0.64, ("0.001", 3.0): 0.50,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine cells, the one with most reward degenerate; a tenth failed. As typed 1e-4, 3e-4, 1e-3."""
    root = tmp_path_factory.mktemp("grid")
    made.grid(root / "sweep", GOLD, degenerate=(("0.0003", 0.1),))
    made.job(root / "sweep" / "9_beta-3_optim.lr-0.003", ["optim.lr=0.003"], 3.0, status="failed", error="no number")
    made.typed_in(root / "sweep", "optim.lr=1e-4,3e-4,1e-3", "beta=0.1,1,3.0")
    return root / "sweep", made.baseline(root / "initial")


def ranked(folder):
    jobs = collect(folder)
    (found,) = ranked_grids(jobs, cells(jobs))
    return found


def test_places_are_the_values_as_they_were_typed(folder):
    (grid,) = grids(collect(folder[0]))
    assert (grid.x.key, list(grid.x.texts.items())) == (
        "optim.lr", [(0.0001, "1e-4"), (0.0003, "3e-4"), (0.001, "1e-3"), (0.003, "0.003")],
    )  # fmt: skip
    assert (grid.y.key, list(grid.y.texts.values())) == ("beta", ["0.1", "1", "3.0"])
    assert {place: len(jobs) for place, jobs in grid.jobs.items()} == {
        (lr, beta): 1
        for lr in grid.x.values
        for beta in grid.y.values
        if (lr, beta) not in ((0.003, 0.1), (0.003, 1.0))
    }


def test_the_best_and_what_is_within_its_error(folder):
    """Two means with standard errors of 0.01 differ by more than chance from 1.96 sqrt(2) 0.01 = 0.0277 on."""
    grid = ranked(folder[0])
    assert grid.best == (0.001, 1.0)
    assert grid.within == [(0.0003, 1.0)]  # 0.62 of 0.64; 0.60 is told apart
    assert grid.degenerate == [(0.0003, 0.1)]
    assert grid.measure.key == "gold/mean"


def test_several_seeds_are_one_cell_and_are_paired(tmp_path):
    """Differences of 0.10, 0.11, 0.12: mean 0.11, standard error 0.0058, and t for two degrees of freedom is 4.30."""
    for index, (lr, seed, gold) in enumerate(
        (lr, seed, base + 0.2 * seed)
        for lr, bases in (("0.001", (0.60, 0.61, 0.62)), ("0.01", (0.50, 0.50, 0.50)))
        for seed, base in enumerate(bases)
    ):
        for beta, more in ((1.0, 0.0), (2.0, -0.005)):
            place = made.job(tmp_path / f"{2 * index + int(beta) - 1}_x", [f"optim.lr={lr}"], beta, seed)
            made.measured(place, beta, seed, gold + more)
    grid = ranked(tmp_path)
    assert grid.best == (0.001, 1.0)
    assert grid.cells[grid.best].evaluation.metrics["gold/mean"] == pytest.approx(0.81)
    assert grid.within == []  # the same difference in every seed has no error


def test_what_is_said(folder):
    sentence = grid_sentence(ranked(folder[0]))
    assert sentence == (
        "Of 9 combinations of optim.lr and beta with a result (of 10), optim.lr=1e-3 beta=1 is the best: gold reward "
        "0.640 [0.620, 0.660]. Within its error (95 %): optim.lr=3e-4 beta=1 (0.620). Degenerate: optim.lr=3e-4 "
        "beta=0.1 (0.900)."
    )


def test_a_best_at_an_edge_is_told(tmp_path):
    made.grid(tmp_path, {place: value + 0.2 * (place == ("0.001", 3.0)) for place, value in GOLD.items()})
    assert grid_sentence(ranked(tmp_path)).endswith(
        "beta=0.1 is the best: gold reward 0.900 [0.880, 0.920]. No other is within its error (95 %). It is at the "
        "end of the values of beta, and the best may lie beyond."
    )


def test_a_share_has_its_unit(tmp_path):
    baseline = invented.initial(tmp_path / "initial", num_prompts=10)
    for index, (lr, beta) in enumerate((lr, beta) for lr in ("0.001", "0.01") for beta in (0.3, 3.0)):
        place = made.job(tmp_path / "sweep" / f"{index}_x", [f"optim.lr={lr}"], beta)
        invented.trained(place / "evaluation", baseline, beta, index)
    grid = ranked(tmp_path / "sweep")
    assert grid.measure.key == "winrate/initial"
    won = grid.cells[0.001, 0.3].evaluation.metrics["winrate/initial"]
    assert grid.written((0.001, 0.3)) == f"{100 * won:.1f}\u00a0%"
    low, high = (100 * grid.cells[grid.best].evaluation.metrics[f"winrate/initial_{end}"] for end in ("low", "high"))
    assert f"[{low:.1f}, {high:.1f}]" in grid_sentence(grid)


def drawn(grid):
    axes = Figure().subplots()
    grid_panel(grid).draw(axes)
    return axes


def test_every_cell_is_drawn_with_its_value_and_marks(folder):
    grid = ranked(folder[0])
    axes = drawn(grid)
    texts = {(round(t.get_position()[0]), round(t.get_position()[1])): [] for t in axes.texts}
    for text in axes.texts:
        texts[round(text.get_position()[0]), round(text.get_position()[1])].append(text.get_text())
    assert texts[2, 1] == ["0.640", "± 0.010"]
    assert texts[1, 0] == ["0.900", "± 0.010"]
    assert texts[3, 2] == ["failed", ""]
    squares = [patch for patch in axes.patches if patch.get_fill() or patch.get_linewidth() > 1]
    frames = [(round(p.get_x() + 0.5, 1), p.get_linestyle()) for p in axes.patches if not p.get_fill()]
    assert len(frames) == 2
    assert [style for _, style in frames].count("-") == 1
    hatched = [(p.get_x(), p.get_y()) for p in squares if p.get_hatch()]
    assert hatched == [(pytest.approx(0.53), pytest.approx(-0.47))]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1e-4", "3e-4", "1e-3", "0.003"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optim.lr", "beta")
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["best", "within its error", "degenerate"]


def luminance(colour):
    """Of an sRGB colour, as WCAG 2.2 defines it."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first, second):
    light, dark = sorted((luminance(to_rgb(first)), luminance(to_rgb(second))), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_what_is_written_can_be_read_on_every_shade(folder):
    """WCAG 2.2 asks for 4.5."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    axes = drawn(ranked(folder[0]))
    shades = {
        (round(patch.get_x() + 0.47), round(patch.get_y() + 0.47)): patch.get_facecolor()[:3]
        for patch in axes.patches
        if patch.get_fill() and patch.get_facecolor()[3]
    }
    at = {text: tuple(map(round, text.get_position())) for text in axes.texts}
    assert sum(place in shades for place in at.values()) == 18
    assert min(contrast(text.get_color(), shades[place]) for text, place in at.items() if place in shades) > 4.5
    every = [tuple(colormaps[MAP](level)[:3]) for level in range(256)]
    assert min(contrast(DARK if _luminance(shade) > SPLIT else LIGHT, shade) for shade in every) > 4.5


def test_the_page_s_dark_mode_leaves_cells_as_they_are(folder):
    picture = svg(grid_panel(ranked(folder[0])))
    assert "#020202" in picture
    assert "var(--ink, #020202)" not in picture


def test_page_terminal_and_files_have_it_first(folder):
    from io import StringIO

    from rich.console import Console

    sweep, baseline = folder
    jobs = collect(sweep)
    with undrawn():
        write_sweep(sweep, jobs, baseline)
    assert (sweep / "panels" / "1_gold_reward.png").is_file()
    page = sweep_page(jobs, baseline)
    sentence = grid_sentence(ranked(sweep))
    assert sentence.replace(" ", "") in re.sub(r"\s", "", page).replace("&#x27;", "'")
    console = Console(width=80, file=StringIO())
    console.print(*sweep_tables(jobs, baseline.evaluation))
    assert "optim.lr=1e-3 beta=1 is the best" in " ".join(console.file.getvalue().split())


def test_what_varies_besides_makes_a_grid_of_its_own(tmp_path):
    index = 0
    for noise in ("0", "0.2"):
        for (lr, beta), gold in GOLD.items():
            place = made.job(tmp_path / f"{index}_x", [f"optim.lr={lr}", f"data.label_noise={noise}"], beta)
            made.measured(place, beta, 0, gold - float(noise))
            index += 1
    jobs = collect(tmp_path)
    found = ranked_grids(jobs, cells(jobs))
    assert [grid.grid.rest for grid in found] == ["data.label_noise=0", "data.label_noise=0.2"]
    assert [grid.cells[0.001, 1.0].evaluation.metrics["gold/mean"] for grid in found] == pytest.approx([0.64, 0.44])


@pytest.mark.parametrize("words", [["trainer.epochs=2"], ["reference=initial"]])
def test_one_key_makes_no_grid_and_its_report_is_as_it_was(tmp_path, words):
    for index, beta in enumerate((0.1, 1.0, 3.0)):
        made.measured(made.job(tmp_path / f"{index}_x", words, beta), beta, 0, 0.5 + 0.1 * index)
    jobs = collect(tmp_path)
    assert grids(jobs) == []
    first = panels(jobs, cells(jobs), None)[0]
    with undrawn():
        write_sweep(tmp_path, jobs, None)
        assert svg(first) in sweep_page(jobs, None)
    assert "combinations" not in (tmp_path / "report.html").read_text()
    assert "rung" not in (tmp_path / "sweep.csv").read_text()


def test_a_sweep_that_is_typed_as_a_range_or_damaged_has_numbers(tmp_path):
    made.grid(tmp_path, GOLD)
    (tmp_path / "multirun.yaml").write_bytes(b"\xff\xfe: [\n- optim.lr=range(1,3)\n- beta=\n- beta=x,1.00,y\n")
    (grid,) = grids(collect(tmp_path))
    assert list(grid.x.texts.values()) == ["0.0001", "0.0003", "0.001"]
    assert list(grid.y.texts.values()) == ["0.1", "1.00", "3"]
