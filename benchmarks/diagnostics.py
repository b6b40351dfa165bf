"""A policy whose beta is far too small beside a healthy one on the lab: what evaluate.py finds, and where answers end.

    OMP_NUM_THREADS=1 python benchmarks/diagnostics.py     (two minutes on one core)

Both are trained from lab:initial as in the demo, on 8,192 pairs of the default judge, who likes length; they differ in
beta alone. Writes results/diagnostics.json and docs/images/diagnostics_degenerate.png. Runs that are there are kept.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ROOT, write

from dpo_ref.evaluation.diagnostics.diagnose import Diagnosis
from dpo_ref.evaluation.results import RESULTS, Evaluation, read_evaluation
from dpo_ref.evaluation.stages import read_diagnosis
from dpo_ref.files.writing import plain
from dpo_ref.reports.diagnostics import end_panel, hazard_panel, relative_panel
from dpo_ref.reports.plots import Panel, figure_of, save

BETAS = {"degenerate": 0.01, "healthy": 1.0}
PICTURE = ROOT / "docs" / "images" / "diagnostics_degenerate.png"


def command(*words: str) -> None:
    print(" ".join(["python", *words]), flush=True)
    subprocess.run(
        [sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def evaluated(beta: float, run: Path) -> tuple[Evaluation, Diagnosis]:
    """The run of this beta, trained and evaluated unless that was done."""
    if not (run / "policy").is_dir():
        command("train.py", f"beta={beta}", "optim.lr=5e-4", f"output_dir={run}", "tracking=none")
    if not (run / RESULTS / "diagnostics.json").is_file():
        command("evaluate.py", f"policy={run}", "tracking=none")
    diagnosis = read_diagnosis(run / RESULTS)
    assert diagnosis is not None
    return read_evaluation(run / RESULTS), diagnosis


def ends_panels(diagnosis: Diagnosis) -> list[Panel]:
    """All that is about the end token."""
    own, chosen = diagnosis.texts["own"], diagnosis.texts["chosen"]
    return [
        end_panel(diagnosis),
        hazard_panel(own.hazard, "own answers"),
        relative_panel(chosen.relative_hazard, "chosen answers"),
    ]


def shared(axes: Sequence[Any]) -> None:
    """One scale for all; each axis keeps its direction."""
    for axis in ("xlim", "ylim"):
        starts, stops = zip(*(getattr(ax, f"get_{axis}")() for ax in axes), strict=True)
        upward = starts[0] < stops[0]
        limits = (min(starts), max(stops)) if upward else (max(starts), min(stops))
        for ax in axes:
            getattr(ax, f"set_{axis}")(limits)


def draw(diagnoses: dict[str, Diagnosis]) -> None:
    """A row of panels for each policy, the columns on one scale."""
    panels = {name: ends_panels(diagnosis) for name, diagnosis in diagnoses.items()}
    columns = len(next(iter(panels.values())))
    with figure_of(len(panels), columns, (4.9, 3.1), {"axes.titlesize": 10}) as (figure, axes):
        for start, (name, row) in zip(range(0, len(axes), columns), panels.items(), strict=True):
            for panel, ax in zip(row, axes[start:], strict=False):
                panel.draw(ax)
                ax.set_title(f"β = {BETAS[name]:g}: {ax.get_title(loc='left').lower()}", loc="left")
        for column in range(columns):
            shared(axes[column::columns])
        save(figure, PICTURE, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/diagnostics"))
    folder = ROOT / parser.parse_args().folder
    runs = {name: evaluated(beta, folder / name) for name, beta in BETAS.items()}
    draw({name: diagnosis for name, (_, diagnosis) in runs.items()})
    rows = {
        name: {
            "beta": BETAS[name],
            "degenerate": evaluation.degenerate,
            "metrics": evaluation.metrics,
            "by_class": plain(diagnosis.texts["chosen"].shift.by_class),
            "hazard": plain(diagnosis.texts["own"].hazard),
        }
        for name, (evaluation, diagnosis) in runs.items()
    }
    print(json.dumps({name: row["degenerate"] for name, row in rows.items()}, indent=1))
    write("diagnostics", rows)


if __name__ == "__main__":
    main()
