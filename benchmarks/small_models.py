"""What a model of the lab's size costs on one thread: a training step, sampling, an evaluation and a whole job.

    python benchmarks/small_models.py                           # this checkout, some minutes
    python benchmarks/small_models.py --beside ../dpo_ref_old   # and another one, in turn, with ratios

All numbers are CPU seconds of processes with one thread: on an idle machine those of the clock, and on a busy one what
they would be. The model is a Llama with random weights, fitted to the lab's demonstrations for a minute, so that its
answers end; `--model` names a folder instead. Every measurement is a process of its own with a cache of its own; a
job and an evaluation are `train.py` and `evaluate.py` from their start to their end.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Stepper, llama, write

SHAPE = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": True, "pad_token_id": 0}
PAIRS, BATCH, PROMPTS, SAMPLES = 2048, 32, 400, 4
UNITS = {"step": "pairs/s", "sampling": "answers/s", "job": "s", "evaluation": "s"}


# --- measured inside a process of its own, with the package of the checkout it was started for


def lab(tokenizer, num_prompts=1):
    """Pairs of the lab as groups of tokens, and prompts."""
    from dpo_ref.data.tokenise import tokenise
    from dpo_ref.lab.preferences import lab as pairs

    data = pairs(0, num_pairs=PAIRS, num_eval_pairs=1, num_test_prompts=num_prompts)
    return list(tokenise(data.train, tokenizer).groups), data.test_prompts


def cpu_seconds(call, *arguments, **options):
    """Of one call."""
    started = time.process_time()
    call(*arguments, **options)
    return time.process_time() - started


def step(model, tokenizer):
    """Pairs in a second of training: packs, layout, loss, gradient, update and metrics of the median step."""
    groups, _ = lab(tokenizer)
    stepper, _ = Stepper(model, groups), model.train()
    batches = [groups[start : start + BATCH] for start in range(0, len(groups), BATCH)]
    return BATCH / statistics.median(cpu_seconds(stepper, batch) for batch in [*batches, *batches])


def sampling(model, tokenizer):
    """Answers in a second, from prompts to texts, in the median of three times."""
    from dpo_ref.distributed import keep_memory
    from dpo_ref.generation.sampling import generate

    keep_memory()
    _, prompts = lab(tokenizer, PROMPTS)
    generate(model, tokenizer, prompts[:40], 0)
    seconds = (cpu_seconds(generate, model, tokenizer, prompts, seed, samples_per_prompt=SAMPLES) for seed in range(3))
    return PROMPTS * SAMPLES / statistics.median(seconds)


def child(args):
    import torch

    sys.path.insert(0, os.getcwd())
    from dpo_ref.models.loading import load_model, load_tokenizer

    model = load_model(args.model, torch.device("cpu"), "auto").model
    print({"step": step, "sampling": sampling}[args.measure](model, load_tokenizer(args.model)))


# --- one checkout after the other


def run(checkout, cache, *command):
    """Run a command in a checkout; what it printed, and its CPU seconds."""
    environment = os.environ | {"DPO_REF_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=checkout, env=environment, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return done.stdout, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def build(folder):
    """The model: fitted by this checkout's own SFT."""
    sys.path.insert(0, str(ROOT))
    from dpo_ref.lab.models import lab_tokenizer

    tokenizer, untrained = lab_tokenizer(), folder / "untrained"
    llama(len(tokenizer), SHAPE).save_pretrained(untrained)
    tokenizer.save_pretrained(untrained)
    options = ["model=pretrained", f"model.path={untrained}", "data=lab_sft", "objective=sft", "tracking=none"]
    options += ["data.num_examples=19200", "trainer.batch_size=64", "optim.lr=3e-3", f"output_dir={folder / 'sft'}"]
    run(ROOT, folder / "cache", "train.py", *options)
    return folder / "sft" / "policy"


def measured(checkout, model):
    """All four of one checkout."""
    values = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what in ("step", "sampling"):
            text, _ = run(checkout, folder, Path(__file__).resolve(), "--measure", what, "--model", model)
            values[what] = float(text.splitlines()[-1])
        options = ["model=pretrained", f"model.path={model}", f"data.num_pairs={PAIRS}", "beta=0.3", "tracking=none"]
        _, values["job"] = run(checkout, folder, "train.py", *options, f"output_dir={folder / 'run'}")
        _, values["evaluation"] = run(checkout, folder, "evaluate.py", f"policy={folder / 'run'}", "tracking=none")
    return values


def compared(turns, what):
    """Medians, and how many times as fast this checkout is as the other, within a turn."""
    row = {"unit": UNITS[what], "here": round(statistics.median(turn[0][what] for turn in turns), 2)}
    if len(turns[0]) == 1:
        return row
    ratios = [turn[0][what] / turn[1][what] for turn in turns]
    faster = sorted(ratio if "/s" in UNITS[what] else 1 / ratio for ratio in ratios)
    row["beside"] = round(statistics.median(turn[1][what] for turn in turns), 2)
    return row | {
        "times_as_fast": round(statistics.median(faster), 2),
        "from_to": [round(faster[0], 2), round(faster[-1], 2)],
    }


def commit(checkout):
    """Which one it is."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True)
    return done.stdout.strip() or None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--beside", type=Path, help="another checkout of this project, which takes turns with this one"
    )
    parser.add_argument("--model", help="a folder with a model of the lab's tokenizer; made by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/small_models.json")
    parser.add_argument("--measure", choices=("step", "sampling"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        child(args)
        return
    checkouts = [ROOT, *([args.beside.resolve()] if args.beside else [])]
    with tempfile.TemporaryDirectory() as name:
        model = Path(args.model).resolve() if args.model else build(Path(name))
        turns = [[measured(checkout, model) for checkout in checkouts] for _ in range(args.repeats)]
    rows = {what: compared(turns, what) for what in UNITS}
    for what, row in rows.items():
        print(f"{what:12}", "  ".join(f"{name} {value}" for name, value in row.items()))
    about = {"threads": 1, "repeats": args.repeats, "shape": None if args.model else SHAPE, "pairs": PAIRS}
    write("small_models", about | {"commits": [commit(checkout) for checkout in checkouts], "rows": rows}, args.out)


if __name__ == "__main__":
    main()
