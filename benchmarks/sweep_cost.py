"""What a sweep over five betas costs with the shared reference table, beside five runs that ask a live reference.

    OMP_NUM_THREADS=2 python benchmarks/sweep_cost.py

Both sides run `train.py` on the lab with a fresh cache, alternating; the pass that fills the table is part of the
price. The lab's model is built before the clock starts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, write

BETAS = (0.005, 0.02, 0.1, 0.3, 1.0)


def timed_steps(folder):
    """Seconds of training of a run: sum of its steps' times, from the pairs per second it logged."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sum(32 / line["train/throughput/pairs_per_second"] for line in lines if "train/loss" in line)


def train(cache, folder, *overrides):
    """One run in a process of its own; its wall time and its output folder."""
    command = [sys.executable, "train.py", "tracking=none", f"output_dir={folder}", *overrides]
    environment = os.environ | {"DPO_REF_CACHE": str(cache)}
    code = (
        "import subprocess, sys, time; t = time.perf_counter(); "
        "code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
        "print(time.perf_counter() - t); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lab:initial")
    parser.add_argument("--pairs", type=int, default=8192)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        common = [f"model.path={args.model}", f"data.num_pairs={args.pairs}"]
        train(work / "cache", work / "warm", *common, "trainer.max_steps=1", "reference.cache=off")
        totals = {"table": 0.0, "live": 0.0}
        steps = {"table": 0.0, "live": 0.0}
        for beta in BETAS:
            for side, cache in (("table", "auto"), ("live", "off")):
                folder = work / f"{side}-{beta}"
                totals[side] += train(work / "cache", folder, *common, f"beta={beta}", f"reference.cache={cache}")
                steps[side] += timed_steps(folder)
    ratio, step_ratio = totals["table"] / totals["live"], steps["table"] / steps["live"]
    print(f"five runs, wall time:     table {totals['table']:.0f} s, live {totals['live']:.0f} s, ratio {ratio:.2f}")
    print(
        f"five runs, training steps: table {steps['table']:.0f} s, live {steps['live']:.0f} s, ratio {step_ratio:.2f}"
    )
    write("sweep_cost", {"betas": BETAS, "wall_seconds": totals, "step_seconds": steps, "ratio": ratio})


if __name__ == "__main__":
    main()
