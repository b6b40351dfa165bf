"""One optimiser step of DPO: this project beside TRL's DPOTrainer, same model, same pairs, same optimiser, same order.

    pip install -r benchmarks/requirements.txt
    OMP_NUM_THREADS=2 python benchmarks/step_vs_trl.py                      # all cells, tens of minutes
    OMP_NUM_THREADS=2 python benchmarks/step_vs_trl.py --cells hh/4/8192 --repeats 3 --steps 6

Every measurement is a process of its own, so that peak memory is its own; tools take turns, and the ratio is taken
within a turn. "default" is TRL as shipped (gradient checkpointing, live reference); "best" has no checkpointing, a
precomputed reference and batches grouped by length. Our reference is a table, made before the clock starts as its is;
"ours-live" and "trl-nogc" ask it at every step. The first step of a process is not timed.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, llama, peak_mib, write

LR, BETA, MAX_LENGTH = 1e-5, 0.1, 4096
TOOLS = ("ours", "ours-live", "trl-default", "trl-nogc", "trl-best")
CELLS = [(case, 4, 8192) for case in ("ultrafeedback", "hh", "tldr", "long_chat")]
CELLS += [("ultrafeedback", 16, 8192), ("ultrafeedback", 4, 32000), ("ultrafeedback", 4, 128000)]


def batches(args):
    """The pairs of every step, in the order in which both tools see them; `best` groups them by length."""
    from pairs import pairs

    groups = pairs(args.case, args.batch * args.steps, args.vocab)
    if args.tool == "trl-best":
        groups.sort(key=lambda g: len(g.prompt_ids) + max(map(len, g.response_ids)))
    return [groups[i : i + args.batch] for i in range(0, len(groups), args.batch)]


def ours(args):
    """Seconds of every step, losses; through the trainer that train.py uses."""
    import torch

    from dpo_ref.data import packing
    from dpo_ref.data.packing import share_of
    from dpo_ref.distributed import keep_memory
    from dpo_ref.models.loading import Policy
    from dpo_ref.models.packable import install
    from dpo_ref.objectives.interface import bind
    from dpo_ref.objectives.pairwise import dpo
    from dpo_ref.references.policies import LiveReference
    from dpo_ref.references.table import PrecomputedReference, score
    from dpo_ref.training.optim import adamw, optimisation
    from dpo_ref.training.trainer import backward, update

    if args.allocator != "plain":
        keep_memory()
    model, device = llama(args.vocab).eval(), torch.device("cpu")
    assert install(model, "sdpa") is None
    policy = Policy(lambda: model, None)
    steps = batches(args)
    groups = [group for batch in steps for group in batch]
    if args.tool == "ours-live":
        reference = LiveReference("initial", copy.deepcopy(model), "", "")
    else:
        rows = {key: row for batch in steps for key, row in score(model, batch, device).items()}
        reference = PrecomputedReference("initial", "", "", groups, rows, device)
    optim = optimisation(adamw, model, len(steps), lr=LR, schedule="constant", warmup_ratio=0.0, max_grad_norm=1.0)
    pack = partial(packing.pack, tokens_per_batch=8192)
    before, seconds, losses = peak_mib(), [], []
    for step, batch in enumerate(steps):
        start = time.perf_counter()
        values, _ = backward(policy, reference, bind(dpo, beta=BETA), share_of(batch, pack))
        update(policy, optim, step, torch.tensor(True))
        losses.append(float(values["loss"].mean()))
        seconds.append(time.perf_counter() - start)
    return seconds, losses, before


def trl(args):
    """The same through DPOTrainer on tokenised rows."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    words = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3} | {f"w{i}": i for i in range(4, args.vocab)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")

    def text(ids):
        return " ".join(f"w{i}" for i in ids)

    rows = [
        {"prompt": text(g.prompt_ids), **{
            name: " " + text(ids[:-1]) for name, ids in zip(("chosen", "rejected"), g.response_ids, strict=True)
        }}
        for batch in batches(args)
        for g in batch
    ]  # fmt: skip
    precomputed = args.tool == "trl-best"
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=args.batch, max_steps=args.steps, use_cpu=True,
        bf16=False, gradient_checkpointing=args.tool == "trl-default", precompute_ref_log_probs=precomputed,
        max_length=MAX_LENGTH, learning_rate=LR, lr_scheduler_type="constant", beta=BETA, max_grad_norm=1.0,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
        train_sampling_strategy="sequential", seed=0,
    )  # fmt: skip
    policy = llama(args.vocab)
    reference = None if precomputed else copy.deepcopy(policy).eval().requires_grad_(False)
    stamps, losses = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            stamps.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            stamps.append(time.perf_counter())

        def on_log(self, _, state, control, logs=None, **__):
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    trainer = DPOTrainer(
        model=policy, ref_model=reference, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    before = peak_mib()
    torch.manual_seed(0)
    trainer.train()
    ends = stamps[1::2]
    return [stamps[1] - stamps[0], *(b - a for a, b in pairwise(ends))], losses, before


def child(args):
    """Measure one tool and print one line of JSON."""
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    imported = peak_mib()
    seconds, losses, before = (ours if args.tool.startswith("ours") else trl)(args)
    timed = seconds[1:]
    print(json.dumps({
        "pairs_per_second": args.batch * len(timed) / sum(timed), "seconds_per_step": statistics.mean(timed),
        "peak_mib": peak_mib() - imported, "peak_before_mib": before - imported, "losses": losses,
    }))  # fmt: skip


def measured(tool, cell, args):
    """One process; its JSON."""
    case, batch, vocab = cell
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if args.allocator == "kept" and tool.startswith("trl"):  # what mallopt does for us, by glibc's environment
        environment |= {"MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_MMAP_THRESHOLD_": "100000000000"}
        environment |= {"MALLOC_TOP_PAD_": "67108864"}
    command = [sys.executable, __file__, "--tool", tool, "--case", case, "--batch", str(batch), "--vocab", str(vocab)]
    command += ["--steps", str(args.steps), "--threads", str(args.threads), "--allocator", args.allocator]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(cell, args):
    """Alternate the tools; ratios within a turn."""
    turns = [{tool: measured(tool, cell, args) for tool in args.tools} for _ in range(args.repeats)]
    row = {"case": cell[0], "batch": cell[1], "vocab": cell[2], "allocator": args.allocator}
    row |= {"steps": args.steps, "repeats": args.repeats, "tools": {}}
    for tool in args.tools:
        speeds = [turn[tool]["pairs_per_second"] for turn in turns]
        ratios = [turn["ours"]["pairs_per_second"] / turn[tool]["pairs_per_second"] for turn in turns]
        row["tools"][tool] = {
            "pairs_per_second": statistics.median(speeds),
            "ours_is_faster": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios),
            "peak_mib": statistics.median(turn[tool]["peak_mib"] for turn in turns),
        }  # fmt: skip
    same_order = [tool for tool in args.tools if tool in ("trl-default", "trl-nogc")]
    gaps = [
        abs(a - b)
        for tool in same_order
        for a, b in zip(turns[0]["ours"]["losses"], turns[0][tool]["losses"], strict=True)
    ]
    row["largest_loss_difference"] = max(gaps, default=None)
    return row


def show(row):
    """One cell as lines of text."""
    print(f"\n{row['case']}, batch {row['batch']}, vocabulary {row['vocab']}, allocator {row['allocator']}")
    print(f"  {'':12} {'pairs/s':>8} {'ours is faster':>22} {'peak MiB':>9}")
    for tool, r in row["tools"].items():
        spread = f"{r['ours_is_faster']:.2f} [{r['ratio_low']:.2f}, {r['ratio_high']:.2f}]"
        print(f"  {tool:12} {r['pairs_per_second']:8.2f} {spread:>22} {r['peak_mib']:9.0f}")
    if row["largest_loss_difference"] is not None:
        print(f"  largest difference of a step's losses: {row['largest_loss_difference']:.1e}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", help="such as hh/4/8192 (case/batch/vocabulary); all by default")
    parser.add_argument("--tools", nargs="*", default=["ours", "trl-default", "trl-best"], choices=TOOLS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--allocator", choices=("shipped", "kept", "plain"), default="shipped",
        help="glibc told to keep its memory: by us alone as both projects come (shipped), on both sides, on none",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/step_vs_trl.json")
    for name, kind in (("--tool", str), ("--case", str), ("--batch", int), ("--vocab", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tool:
        child(args)
        return
    path = args.out or RESULTS / "step_vs_trl.json"
    stored = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {(row["case"], row["batch"], row["vocab"], row["allocator"]): row for row in stored}
    for cell in CELLS:
        if args.cells and "/".join(map(str, cell)) not in args.cells:
            continue
        row = compare(cell, args)
        show(row)
        rows[(*cell, args.allocator)] = row
        content = {"threads": args.threads, "trl": version("trl"), "rows": list(rows.values())}
        write("step_vs_trl", content, path)


if __name__ == "__main__":
    main()
