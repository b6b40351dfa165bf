"""One short DPO run against each kind of reference on the lab, at several betas: one table.

    OMP_NUM_THREADS=1 python benchmarks/references.py     (20 minutes on one core, models built)

The policy is lab:initial; lab:strong is a better model with the same tokenizer, lab:foreign one with another
tokenizer, vocabulary and chat template, scored from text. Every run sees the same pairs in the same order.
"""

import argparse
import subprocess
import sys

from common import ROOT, write

from dpo_ref.evaluation.results import ACCURACY, ENDED, KL, LENGTH, SCORE, WIN_RATE

PARTS = '[{reference: initial}, {reference: other, path: "lab:strong"}]'
REFERENCES = {
    "initial": ["reference=initial"],
    "strong": ["reference=other", "reference.path=lab:strong"],
    "foreign": ["reference=other", "reference.path=lab:foreign"],
    "prior": ["reference=prior"],
    "none": ["reference=none"],
    "mixture": ["reference=mixture", f"reference.parts={PARTS}"],
}
REWARD, WON = SCORE.of(scorer="gold"), WIN_RATE.of(baseline="initial")
DISTANCES = (KL.of(model=model) for model in ("initial", "loss_reference"))
SHOWN = (REWARD, f"{REWARD}_se", WON, f"{WON}_low", f"{WON}_high", LENGTH.key, ENDED.key, *DISTANCES, ACCURACY.key)


def command(*arguments):
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main():
    import csv

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--folder", default="outputs/references")
    args, index = parser.parse_args(), 0
    for name, overrides in REFERENCES.items():
        for beta in args.betas:
            index += 1
            folder = f"{args.folder}/{index}_{name}_{beta:g}"
            print(folder, flush=True)
            command("train.py", *overrides, f"beta={beta}", f"output_dir={folder}", "tracking=none")
    command("evaluate.py", f"sweep={args.folder}", "tracking=none")
    with (ROOT / args.folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        print(row["job"], *(f"{key} {float(row[key]):.3f}" for key in SHOWN if row.get(key)), sep="  ")
    write("references", {"rows": rows})


if __name__ == "__main__":
    main()
