"""DPO against each kind of reference on the lab, at several betas, three seeds each: one table, one picture.

    python benchmarks/references.py     (half an hour on 2 cores; goes on where it was stopped)

The policy is lab:initial. lab:strong is a better model in the same styles, lab:strong_terse one that has unlearnt
all styles but one, lab:foreign one with another tokenizer, vocabulary and chat template, scored from text. A seed
draws the pairs, their order and the answers; with the same seed every run sees the same pairs in the same order.
"""

import argparse
import csv
import shutil
import subprocess
import sys
from pathlib import Path

from common import ROOT, write

PARTS = '[{reference: initial}, {reference: other, path: "lab:strong"}]'
REFERENCES = {
    "initial": ["reference=initial"],
    "strong": ["reference=other", "reference.path=lab:strong"],
    "strong_terse": ["reference=other", "reference.path=lab:strong_terse"],
    "foreign": ["reference=other", "reference.path=lab:foreign"],
    "mixture": ["reference=mixture", f"reference.parts={PARTS}"],
    "prior": ["reference=prior"],
    "none": ["reference=none"],
}
PICTURE = ROOT / "docs" / "images" / "references_lab.png"


def command(*words):
    print(f"python {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--betas", default="0.1,0.3,1,3")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folder", type=Path, default=Path("outputs/references"))
    args = parser.parse_args()
    varied = [f"beta={args.betas}", f"seed={args.seeds}", "hydra/launcher=side_by_side", "tracking=none"]
    for name, reference in REFERENCES.items():
        command("train.py", "-m", *reference, *varied, f"output_dir={args.folder / name}")
    sweeps = ",".join(str(args.folder / name) for name in REFERENCES)
    command("evaluate.py", f"sweep=[{sweeps}]", f"output_dir={args.folder}", "n_jobs=null", "tracking=none")
    with (ROOT / args.folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    shutil.copyfile(ROOT / args.folder / "sweep.png", PICTURE)
    write("references", {"rows": rows})


if __name__ == "__main__":
    main()
