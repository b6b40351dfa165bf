"""What successive halving would have found, from the records of a grid that was trained in full.

    python benchmarks/halving.py outputs/default/my_grid

A cell that goes on is the run of a sweep without a search, bit for bit (tests/cli/test_halving.py), so the records of
that sweep say which cells any search would have kept. Cells are joined over seeds, and what is found is compared by
the measure of the sweep's report, on the answers of evaluate.py.
"""

import argparse
import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
from common import ROOT  # noqa: F401  (it makes dpo_ref importable)

from dpo_ref.cli.halving import Standing, going_on, halving
from dpo_ref.evaluation.results import measure_of
from dpo_ref.evaluation.sweep import cells, collect
from dpo_ref.tracking import run_record

METRICS = ("evaluation/gold/mean", "evaluation/winrate/initial", "eval/rewards/accuracies")
SEARCHES = ((3, 3), (2, 3), (2, 4), (4, 2), (3, 2))  # eta and rungs


def measured(cell, metric):
    """The metric by step, the mean over the cell's seeds, and at which steps any of them was degenerate."""
    values, broken = defaultdict(list), set()
    for job in cell.jobs:
        for row in run_record.read(job.folder / "metrics.jsonl"):
            if row.get(metric) is not None:
                values[row["step"]].append(row[metric])
            if row.get("evaluation/degenerate"):
                broken.add(row["step"])
    return {step: float(np.mean(several)) for step, several in values.items()}, broken


def search(grid, metric, eta, rungs):
    """The cells that come to their end, and the optimiser steps of all, as a share of the whole grid's."""
    curves = {index: measured(cell, metric) for index, cell in enumerate(grid)}
    steps = sorted(curves[0][0])
    every, total = steps[1] - steps[0], steps[-1]
    at = halving(total, every, metric=metric, eta=eta, rungs=rungs, rung=1).steps
    going, cost = list(curves), 0
    for earlier, step in pairwise((0, *at)):
        cost += len(going) * (step - earlier)
        if step == total:
            break
        standings = [
            Standing((str(index),), curves[index][0].get(step, math.nan), step not in curves[index][1])
            for index in going
        ]
        going = [int(standing.cell[0]) for standing in going_on(standings, "higher", eta)]
    return [grid[index] for index in going], cost / (len(grid) * total), at


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="the folder of a sweep whose jobs were evaluated while they trained")
    grid = cells(collect(parser.parse_args().grid))
    measure = measure_of([cell.evaluation for cell in grid])
    sound = [cell for cell in grid if not cell.evaluation.degenerate]
    ranked = sorted(sound, key=lambda cell: -cell.evaluation.get(measure.key))
    best = ranked[0].evaluation
    print(f"best of the {len(grid)} cells: {best.name}, {measure.title} {measure.scale * best.get(measure.key):.4g}")
    print(f"{'metric':28} eta rungs {'at steps':18} {'steps':>6}  rank  {measure.short}, what is found")
    for metric in (metric for metric in METRICS if len(measured(grid[0], metric)[0]) > 2):
        for eta, rungs in SEARCHES:
            ended, share, at = search(grid, metric, eta, rungs)
            left = [cell for cell in ranked if any(cell is each for each in ended)]
            found = left[0].evaluation
            value, where = measure.scale * found.get(measure.key), ", ".join(map(str, at))
            rank = 1 + [cell is left[0] for cell in ranked].index(True)
            print(f"{metric:28} {eta:3} {rungs:5} {where:18} {share:6.0%}  {rank:4}  {value:.4g} {found.name}")


if __name__ == "__main__":
    main()
