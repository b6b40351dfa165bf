"""Gold reward after on-policy training on the lab, beside offline training with as many rewards and steps: one table.

    OMP_NUM_THREADS=1 python benchmarks/on_policy.py     (five minutes on two cores)

Every run starts from lab:initial, takes 64 optimiser steps at the same learning rate and asks for 8,192 gold rewards:

    fresh    the policy answers 32 prompts 4 times before each step
    stale    all 2,048 prompts are answered before the first step, by the initial policy
    data     4,096 pairs of the lab's writers, ordered by gold reward; twice as many a step

Runs that are there already are kept, so that an interrupted benchmark goes on.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

from common import ROOT, write
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dpo_ref.cli import schemas
from dpo_ref.cli.command_line import compose_command
from dpo_ref.evaluation.results import ENDED, KL, LENGTH, SCORE

ROUNDS, PROMPTS, SAMPLES = 64, 32, 4
SAMPLED = ["data=on_policy", f"data.rounds={ROUNDS}", f"data.prompts_per_round={PROMPTS}", "data.max_new_tokens=64"]
SAMPLED += [f"data.samples_per_prompt={SAMPLES}", f"trainer.batch_size={PROMPTS}", "data.prompts.num_eval_pairs=0"]
PAIRS = ["data=lab", f"data.num_pairs={ROUNDS * PROMPTS * SAMPLES // 2}", "data.length_bias=0", "data.label_noise=0"]
PAIRS += [f"trainer.batch_size={PROMPTS * SAMPLES // 2}", "data.num_eval_pairs=0"]
DATA = {"fresh": SAMPLED, "stale": [*SAMPLED, f"data.sample_every={ROUNDS}"], "data": PAIRS}
OBJECTIVES = {
    "dpo": ["objective=dpo", "beta=0.1"],
    "sft": ["objective=sft"],
    "reinforce": ["objective=reinforce", "beta=0.05"],
}
CELLS = [(name, data) for data in ("fresh", "stale") for name in OBJECTIVES] + [("dpo", "data"), ("sft", "data")]
REWARD = SCORE.of(scorer="gold")
SHOWN = {REWARD: "gold", KL.of(model="initial"): "KL", LENGTH.key: "tokens", ENDED.key: "ended"}


def train(words: list[str], folder: Path) -> None:
    """`python train.py`, without importing everything again."""
    from dpo_ref.cli.run_folder import Job
    from dpo_ref.cli.train import run_job

    words = [*words, f"output_dir={folder}", "tracking=none"]
    cfg, choices = compose_command(words)
    if run_job(cfg, Job(folder, words, choices, sweep=None)).code:
        raise RuntimeError(f"{folder} failed; see its error.txt, and remove it to try again")


def evaluate(words: list[str]) -> None:
    """`python evaluate.py`."""
    from dpo_ref.cli.evaluate import run_evaluation

    words = [*words, "scorer=gold", "generation.samples_per_prompt=2", "tracking=none"]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("evaluate", overrides=words, return_hydra_config=True)
    choices = {str(group): name for group, name in cfg.hydra.runtime.choices.items() if name is not None}
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    run_evaluation(cfg, choices, words)


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "evaluation.json").read_text())["metrics"]


def run(name: str, data: str, seed: int, folder: Path, lr: float) -> dict[str, object]:
    """Train and evaluate one run, unless that was done."""
    run_folder = folder / f"{name}_{data}_{seed}"
    with redirect_stdout(io.StringIO()):
        if not (run_folder / "policy").is_dir():
            train([*OBJECTIVES[name], *DATA[data], f"seed={seed}", f"optim.lr={lr}"], run_folder)
        if not (run_folder / "evaluation" / "evaluation.json").is_file():
            evaluate([f"policy={run_folder}"])
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(line.get("on_policy/sample_seconds", 0.0) for line in lines)
    steps = max(line["step"] for line in lines)
    print(f"{run_folder.name}: {steps} steps, gold {metrics(run_folder / 'evaluation')[REWARD]:.4f}", flush=True)
    values = {key: metrics(run_folder / "evaluation")[key] for key in SHOWN}
    return {"objective": name, "data": data, "seed": seed, "steps": steps, "sample_seconds": seconds, **values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--folder", type=Path, default=Path("outputs/on_policy"))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    folder = ROOT / args.folder
    schemas.register()
    if not (folder / "initial" / "evaluation.json").is_file():
        with redirect_stdout(io.StringIO()):
            evaluate(["policy=lab:initial", f"output_dir={folder / 'initial'}"])
    start = metrics(folder / "initial")[REWARD]
    workers = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, workers, initializer=schemas.register) as pool:
        futures = [pool.submit(run, *cell, seed, folder, args.lr) for seed in args.seeds for cell in CELLS]
        rows = [future.result() for future in futures]
    print(f"\ngold reward of lab:initial {start:.4f}; mean over {len(args.seeds)} seeds (standard error)\n")
    print(f"{'objective':12}{'data':8}" + "".join(f"{name:>18}" for name in SHOWN.values()))
    for name, data in CELLS:
        cell = [row for row in rows if (row["objective"], row["data"]) == (name, data)]
        shown = [[float(row[key]) for row in cell] for key in SHOWN]
        errors = [statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0 for values in shown]
        texts = [f"{statistics.fmean(values):.3f} ({error:.3f})" for values, error in zip(shown, errors, strict=True)]
        print(f"{name:12}{data:8}" + "".join(f"{text:>18}" for text in texts))
    write("on_policy", {"initial": metrics(folder / "initial"), "lr": args.lr, "rows": rows})


if __name__ == "__main__":
    main()
