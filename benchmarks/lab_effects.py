"""Do the lab's effects stand out from chance? The demo's sweep over ten seeds, without reference, and with a judge who
does not care for length; each target beside what came, and the README's table, sentences and picture.

    python benchmarks/lab_effects.py                     (half an hour on 2 cores; goes on where it was stopped)
    python benchmarks/lab_effects.py --folder outputs/lab_effects --seeds 0 1

A seed draws the pairs, their order and the answers; the prompts are the test split's first 400 for all, and all start
from the lab:initial that ships. Betas and learning rate were chosen on validation prompts with other seeds, and this
plan (sweeps, seeds, targets) was committed before it was run (docs/lab.md). Differences between two policies' gold are
paired by prompt; their standard errors are over prompts.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from common import ROOT, write

PICTURE = ROOT / "docs" / "images" / "demo.png"
SEEDS = list(range(10))
SWEEPS = {"demo": [], "none": ["reference=none"], "no_length_bias": ["data.length_bias=0"]}
KEYS = {
    "gold": "gold/mean",
    "win_rate": "winrate/initial",
    "tokens": "lengths/response",
    "ended": "ended/share",
    "kl": "kl/initial",
    "end_shift": "eos/chosen_logratio",
}
ERRORS = 4  # standard errors of a difference that tell two policies apart
GAIN, WIN_RATE, LENGTH_DRIFT = 0.12, 0.6, 1.25


# --- running


def swept(name, folder, seeds):
    """Run a sweep, or what is left of it; its cells."""
    command = ["train.py", "-m", "+experiment=demo", f"seed={','.join(map(str, seeds))}", *SWEEPS[name]]
    command += [f"output_dir={folder / name}", "tracking=none"]
    print(f"python {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return [cell(path.parent) for path in sorted((folder / name).glob("*/evaluation/evaluation.json"))]


def told(sweep):
    """What the end of a sweep says in a terminal of 80 columns: its table, and its sentences."""
    command = [sys.executable, "evaluate.py", f"sweep={sweep}", "tracking=none"]
    environment = os.environ | {"COLUMNS": "80"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    text = "\n".join(line.rstrip() for line in done.stdout.splitlines())
    table, _, rest = text[text.index(" policy ") :].partition("\n\n")
    (sentences,) = (each for each in rest.split("\n\n") if "What does not follow: " in each)
    return f"{table}\n\n{rest.splitlines()[0]}\n\n{sentences}"


def gold_by_prompt(folder):
    """The mean gold reward of the answers to each prompt, in the prompts' order."""
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    answers = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    by_prompt = {}
    for answer, score in zip(answers, scores, strict=True):
        by_prompt.setdefault(answer["prompt_index"], []).append(score)
    return [statistics.fmean(by_prompt[index]) for index in sorted(by_prompt)]


def cell(folder):
    """What a policy's evaluation says."""
    said = json.loads((folder / "evaluation.json").read_text())
    about = {key: said[key] for key in ("reference", "beta", "seed")} | {"degenerate": bool(said["degenerate"])}
    return about | {key: said["metrics"][name] for key, name in KEYS.items()} | {"by_prompt": gold_by_prompt(folder)}


def initial_policy(folder):
    """Gold and length of the policy that all start from."""
    metrics = json.loads((folder / "evaluation.json").read_text())["metrics"]
    return {key: metrics[KEYS[key]] for key in ("gold", "tokens")} | {"gold_error": metrics["gold/mean_se"]}


def difference(one, other):
    """Mean of the paired differences of two lists, and its standard error."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


# --- targets


def targets_of(cells, initial):
    """The targets for the cells of one seed and the initial policy, each met or not."""
    with_reference = sorted(cells["demo"], key=lambda row: row["beta"])
    smallest, *_, largest = with_reference
    sound = [row for row in with_reference if not row["degenerate"]]
    best = max(sound or with_reference, key=lambda row: row["gold"])
    unbiased = min(cells["no_length_bias"], key=lambda row: row["beta"])["tokens"]

    def below_the_best(row, errors):
        gap, error = difference(best["by_prompt"], row["by_prompt"])
        return gap >= errors * error

    return {
        f"best beta: gold at least {GAIN} above the initial policy's": best["gold"] - initial["gold"] >= GAIN,
        f"best beta: win rate at least {WIN_RATE:.0%}": best["win_rate"] >= WIN_RATE,
        f"smallest beta: gold at least {ERRORS} standard errors below the best": below_the_best(smallest, ERRORS),
        "smallest beta: longer answers, a lower log-prob of the end token, degenerate": smallest["degenerate"]
        and smallest["end_shift"] < 0
        and smallest["tokens"] > initial["tokens"],
        f"largest beta: gold at least {ERRORS} standard errors below the best": below_the_best(largest, ERRORS),
        "no reference: at every beta more than its error below the best": all(
            below_the_best(row, 1) for row in cells["none"]
        ),
        f"no length bias: at the smallest beta at most {LENGTH_DRIFT} times the initial policy's length": unbiased
        <= LENGTH_DRIFT * initial["tokens"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "lab_effects")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    args = parser.parse_args()
    folder = args.folder.resolve()
    asked = ["evaluate.py", "policy=lab:initial", "prompts=lab", f"output_dir={folder / 'initial'}", "tracking=none"]
    subprocess.run([sys.executable, *asked], cwd=ROOT, check=True)
    initial = initial_policy(folder / "initial")
    rows = {name: swept(name, folder, args.seeds) for name in SWEEPS}
    met = {}
    for seed in args.seeds:
        of_seed = {name: [row for row in cells if row["seed"] == seed] for name, cells in rows.items()}
        for target, is_met in targets_of(of_seed, initial).items():
            met.setdefault(target, []).append(bool(is_met))
    kept = {
        name: [{k: v for k, v in row.items() if k != "by_prompt"} for row in cells] for name, cells in rows.items()
    }
    about = {"seeds": args.seeds, "initial": initial, "sweeps": kept, "met": met}
    write("lab_effects", about | {"told": told(folder / "demo")})
    shutil.copyfile(folder / "demo" / "sweep.png", PICTURE)
    for target, seeds in met.items():
        print(f"{sum(seeds):3} of {len(seeds)}  {target}")


if __name__ == "__main__":
    main()
