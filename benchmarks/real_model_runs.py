"""A pretrained model and real pairs from end to end, by the commands of docs/real_model.md, on this machine.

    python benchmarks/real_model_runs.py --model SmolLM2-135M-Instruct --train pairs_train.jsonl.gz \\
        --test pairs_test.jsonl.gz --hh test.jsonl.gz --folder outputs/real_model

Every command is a process of its own, with the settings that the program takes by itself; its seconds and the peak of
its memory are noted, and what it measured. What is done already in the folder is kept. No text of the data is written
into the result file; the questions below are this project's own.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, ROOT, write

QUESTIONS = [
    "How do I keep basil alive on a window sill?",
    "Explain to a ten-year-old why the moon changes its shape.",
    "Write a short, polite email asking a neighbour to turn the music down.",
]
LONGER = ["trainer.batch_size=8", "optim.lr=5e-6", "trainer.eval_every=6"]  # enough steps to see a policy move
CURVES = ("train/loss", "train/rewards/margins", "eval/loss", "eval/rewards/accuracies")
METRICS = (
    "rewards/accuracies", "rewards/accuracies_se", "rewards/length_baseline", "kl/initial", "kl/initial_se",
    "lengths/response", "ended/share", "eos/chosen_logratio", "repetition/seq_rep_4",
)  # fmt: skip


def commands(args):
    """The commands by name, in their order."""
    model = ["model=smollm2_135m", f"model.path={args.model}", "tracking=none"]
    pairs = ["data=jsonl", f"data.path={args.train}", f"data.eval_path={args.test}", f"data.limit={args.pairs}"]
    longer = [*pairs[:-1], f"data.limit={args.longer}"]
    hh = ["data=hh", f"data.path={args.hh}", "data.eval_fraction=0.1", f"data.limit={args.pairs}"]
    runs = {
        "sft": [*pairs, "objective=sft"],
        "dpo": [*pairs, "reference=initial"],
        "dpo_lora": [*pairs, "reference=initial", "model.lora_rank=16"],
        "dpo_other": [*pairs, "reference=other", f"reference.path={args.folder / 'sft' / 'policy'}"],
        "dpo_prior": [*pairs, "reference=prior"],
        "dpo_none": [*pairs, "reference=none"],
        "dpo_hh": [*hh, "reference=initial"],
        "dpo_longer": [*longer, "reference=initial", *LONGER],
    }
    made = {name: ["train.py", *model, *words, f"output_dir={args.folder / name}"] for name, words in runs.items()}
    asked = [f"prompts.path={args.folder / 'questions.jsonl'}", "prompts=jsonl", "generation=greedy", "stage=generate"]
    few = ["prompts=data", "data@prompts.data=jsonl", f"prompts.data.path={args.train}"]
    few += [f"prompts.data.eval_path={args.test}", f"prompts.limit={args.prompts}", "generation.samples_per_prompt=2"]
    made["evaluate dpo_longer"] = ["evaluate.py", f"policy={args.folder / 'dpo_longer'}", "tracking=none", *few]
    for name, policy in (("initial", args.model), ("dpo_longer", args.folder / "dpo_longer")):
        words = [f"policy={policy}", *asked, "tracking=none", f"output_dir={args.folder / 'asked' / name}"]
        made[f"ask {name}"] = ["evaluate.py", *words]
    push = [f"policy={args.folder / 'dpo_longer'}", "stage=push", f"hub.folder={args.folder / 'pushed'}"]
    made["push"] = ["evaluate.py", *push]
    made["compatibility"] = [
        "evaluate.py", "stage=compatibility", f"policy={args.model}", *pairs, "tracking=none",
        f"references=[initial, prior, none, {args.folder / 'sft' / 'policy'}]", "compatibility.num_pairs=64",
        "compatibility.num_prompts=16", f"output_dir={args.folder / 'compatibility'}",
    ]  # fmt: skip
    return made


def run(words):
    """Seconds and peak GiB of one command."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(words)} ended with {process.returncode}")
    return {"seconds": time.monotonic() - start, "peak_gib": usage.ru_maxrss / 2**20}


def trained(folder):
    """What a training run measured, first and last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = {}
    for name in ("train/loss", "eval/loss", "eval/rewards/accuracies", "eval/rewards/margins"):
        values = [line[name] for line in lines if name in line]
        measured |= {name: [values[0], values[-1]]} if values else {}
    curves = {name: [[line["step"], line[name]] for line in lines if name in line] for name in CURVES}
    measured["curves"] = {name: curve for name, curve in curves.items() if len(curve) > 2}
    config = (folder / "config.yaml").read_text().splitlines()
    measured["lr"] = next(line.split(":")[1].strip() for line in config if line.strip().startswith("lr:"))
    return measured


def evaluated(folder):
    """What an evaluation measured."""
    metrics = json.loads((folder / "evaluation" / "evaluation.json").read_text())["metrics"]
    return {name: metrics[name] for name in METRICS if name in metrics}


def looked_at(folder):
    """What a look at references came to, by reference."""
    report = json.loads((folder / "compatibility.json").read_text())
    return {
        candidate["title"]: {
            "accuracy": candidate["alone"]["accuracy"], "sd": candidate["start"]["sd"],
            "beta": candidate["start"]["listed"], "kl": candidate["forward"]["per_answer"],
        }
        for candidate in report["candidates"]
    }  # fmt: skip


def answers(folder):
    """The answers to our own questions."""
    lines = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    return [line["output"] for line in lines]


def results(name, args):
    """What a command came to."""
    kind, _, which = name.partition(" ")
    if kind == "evaluate":
        return evaluated(args.folder / which)
    if kind == "compatibility":
        return {"references": looked_at(args.folder / "compatibility")}
    if kind == "ask":
        return {"answers": answers(args.folder / "asked" / which)}
    return trained(args.folder / name) if (args.folder / name / "metrics.jsonl").is_file() else {}


def as_typed(words, args):
    """A command with the names of files and folders instead of this machine's."""
    names = {str(args.model): "SmolLM2-135M-Instruct", str(args.folder): "outputs/real_model"}
    names |= {str(path): Path(path).name for path in (args.train, args.test)} | {str(args.hh): "harmless.jsonl.gz"}
    text = shlex.join(["python", *words])
    for path, shown in names.items():
        text = text.replace(path, shown)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--train", "--test", "--hh"):
        parser.add_argument(name, required=True)
    parser.add_argument("--pairs", type=int, default=64, help="to train on, and as many to hold out")
    parser.add_argument("--longer", type=int, default=96, help="pairs of the longer run")
    parser.add_argument("--prompts", type=int, default=16, help="held-out prompts that are answered")
    parser.add_argument("--folder", type=Path, default=Path("outputs/real_model"))
    parser.add_argument("--only", nargs="*", help="names of commands")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_model_runs.json")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"prompt": question}) for question in QUESTIONS]
    (args.folder / "questions.jsonl").write_text("\n".join(rows) + "\n")
    done = json.loads(args.out.read_text())["rows"] if args.out.is_file() else {}
    for name, words in commands(args).items():
        if name in done or (args.only and name not in args.only):
            continue
        print(f"\n== {name}\n{shlex.join(words)}", flush=True)
        done[name] = {"command": as_typed(words, args), **run(words), **results(name, args)}
        sizes = {name: getattr(args, name) for name in ("pairs", "longer", "prompts")}
        write("real_model_runs", sizes | {"questions": QUESTIONS, "rows": done}, args.out)


if __name__ == "__main__":
    main()
