"""DPO on a real model and real pairs: the whole process of train.py beside that of TRL's DPOTrainer.

    pip install -r benchmarks/requirements.txt
    OMP_NUM_THREADS=2 python benchmarks/real_model.py --model SmolLM2-135M-Instruct --rows pairs_train.jsonl.gz

The same folder, the same rows in the same order, 8 pairs a step, AdamW at a constant rate; float32 on a CPU, bfloat16
autocast of float32 weights on CUDA. Every measurement is a process of its own. "trl-default" is TRL as shipped: its
default padding, gradient checkpointing, a live reference. "trl-best" has no checkpointing, a precomputed reference and
forward passes of 4 pairs of like length (its losses are of other batches and are not compared). Rows are given to TRL
rendered: of messages it would score the line break behind the end of a turn as well, which no model has to write.

Start-up is from the process's beginning to that of its first step, without the pass of a precomputed reference, which
is told apart. The first step is not timed. Memory is the peak of the resident set, net of what the imports take. The
bound is what the floating-point operations of the steps take at the rate of this machine's own matrix products,
measured in the same run: 6 per weight and token (the prompt counted once), attention, and the head on response tokens
alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import ROOT, peak_mib, write

BETA, LR, LENGTH = 0.1, 1e-5, 1024
MICRO = {"trl-default": 8, "trl-best": 4}  # pairs of a forward pass; without checkpointing 8 long ones take 22 GiB
TOOLS = ("ours", "trl-default", "trl-best")


def first_rows(path, count):
    """The first rows that fit, as messages, in the order in which both tools see them."""
    from dpo_ref.data.readers import file_rows

    rows = (row for _, row in file_rows(Path(path)))
    short = (row for row in rows if sum(len(str(row[side])) for side in ("prompt", "chosen", "rejected")) < 6000)
    return [row for _, row in zip(range(count), short, strict=False)]


class Clock:
    """Seconds of every optimiser step, written to a file as they come: the process may end in any way."""

    def __init__(self, path, born):
        self.path, self.content = path, {"born": born, "begins": [], "ends": [], "losses": [], "apart": 0.0}

    def begin(self):
        self.content["begins"].append(time.time())

    def end(self):
        self.content["ends"].append(time.time())
        self.save()

    def save(self):
        self.content |= {"peak_mib": peak_mib()}
        self.path.write_text(json.dumps(self.content))


PARTS = {  # of a step, by how torch's operators begin
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_"),
    "attention": ("aten::_scaled_dot_product",),
    "optimiser": ("aten::_fused_adamw",),
}


@contextmanager
def profiled(clock):
    """Shares of the time of all operators that the training steps call, the reference's pass included."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        yield
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages() if event.key.startswith("aten::")}
    shares = {part: sum(t for key, t in times.items() if key.startswith(names)) for part, names in PARTS.items()}
    whole = sum(times.values())
    clock.content["profile"] = {part: share / whole for part, share in shares.items()}
    clock.save()


# --- the two tools


def ours(args, clock):
    """train.py as typed, with a clock around its steps and its reference's pass."""
    import runpy

    from dpo_ref.data.packing import epoch_order
    from dpo_ref.references import table
    from dpo_ref.training import trainer

    backward, update, fill = trainer.backward, trainer.update, table.rows_of

    def timed_backward(*given):
        clock.begin()
        values = backward(*given)
        clock.content["losses"].append(float(values[0]["loss"].mean()))
        return values

    def timed_update(*given):
        done = update(*given)
        clock.end()
        return done

    def timed_fill(*given):
        start = time.time()
        rows = fill(*given)
        clock.content["apart"] += time.time() - start
        return rows

    trainer.backward, trainer.update, table.rows_of = timed_backward, timed_update, timed_fill
    rows, order = first_rows(args.rows, args.batch * args.steps), epoch_order(args.batch * args.steps, 0, 0)
    shuffled = [None] * len(rows)
    for position, row in zip(order, rows, strict=True):  # train.py's order of these is that of `rows`
        shuffled[position] = row
    folder = Path(tempfile.mkdtemp())
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shuffled))
    os.environ["DPO_REF_CACHE"] = str(folder / "cache")
    sys.argv = [
        "train.py", "tracking=none", "model=pretrained", f"model.path={args.model}", "data=jsonl",
        f"data.path={folder / 'rows.jsonl'}", f"data.max_length={LENGTH}", f"trainer.batch_size={args.batch}",
        f"beta={BETA}", f"optim.lr={LR}", "optim.schedule=constant", "optim.warmup_ratio=0",
        f"output_dir={folder / 'run'}", *args.extra,
    ]  # fmt: skip
    clock.content["imported_mib"] = peak_mib()
    with profiled(clock) if args.profile else nullcontext():
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def trl(args, clock):
    """DPOTrainer on rendered rows."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    best, cuda, micro = args.tool == "trl-best", torch.cuda.is_available(), min(MICRO[args.tool], args.batch)
    clock.content["imported_mib"] = peak_mib()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [rendered(tokenizer, row) for row in first_rows(args.rows, args.batch * args.steps)]
    if best:
        rows.sort(key=lambda row: len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])))
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=micro,
        gradient_accumulation_steps=args.batch // micro, max_steps=args.steps, bf16=cuda, use_cpu=not cuda,
        gradient_checkpointing=not best, precompute_ref_log_probs=best, max_length=LENGTH, learning_rate=LR,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, beta=BETA, max_grad_norm=1.0, report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True, train_sampling_strategy="sequential", seed=0,
        dataloader_pin_memory=False,
    )  # fmt: skip

    class Callback(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.begin()

        def on_step_end(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            clock.end()

        def on_log(self, _, state, control, logs=None, **__):
            if logs and "loss" in logs:
                clock.content["losses"].append(float(logs["loss"]))
                clock.save()

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *given):
            start = time.time()
            made = super()._precompute_ref_logps(*given)
            clock.content["apart"] += time.time() - start
            return made

    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), args=config,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Callback()],
    )  # fmt: skip
    trainer.train()


def rendered(tokenizer, row):
    """A row as text: the template's prompt, and answers that end with the token that ends a turn."""
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    answers = {side: row[side][0]["content"] + tokenizer.eos_token for side in ("chosen", "rejected")}
    return {"prompt": prompt} | answers


# --- what the machine can do


def gemm_flops_per_second(model):
    """Of float32 (on CUDA bfloat16) matrix products of the model's own sizes, the best of several."""
    import torch

    settings = json.loads((Path(model) / "config.json").read_text())
    hidden, inner = settings["hidden_size"], settings["intermediate_size"]
    cuda = torch.cuda.is_available()
    options = {"device": "cuda", "dtype": torch.bfloat16} if cuda else {}
    left, right = torch.randn(4096, hidden, **options), torch.randn(hidden, inner, **options)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(5):
            left @ right
        if cuda:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 5)
    return 2 * 4096 * hidden * inner / best


def flops_per_step(model, rows):
    """Floating-point operations that a step of these rows needs."""
    from transformers import AutoTokenizer

    settings, tokenizer = json.loads((Path(model) / "config.json").read_text()), AutoTokenizer.from_pretrained(model)
    hidden, layers, heads = (settings[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    head_dim, kv_heads = hidden // heads, settings["num_key_value_heads"]
    body = layers * (
        2 * hidden * hidden + 2 * hidden * kv_heads * head_dim + 3 * hidden * settings["intermediate_size"]
    )
    total = 0
    for row in (rendered(tokenizer, row) for row in rows):
        prompt, *sizes = (len(tokenizer(row[name], add_special_tokens=False).input_ids) for name in row)
        context = prompt * (prompt + 1) / 2 + sum(prompt * size + size * (size + 1) / 2 for size in sizes)
        total += 2 * body * (prompt + sum(sizes)) + 2 * hidden * settings["vocab_size"] * sum(sizes)
        total += 4 * layers * hidden * context
    return 3 * total


# --- one process each, and what they come to


def child(args):
    """Run one tool."""
    import torch
    import transformers

    if not torch.cuda.is_available():
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    (ours if args.tool == "ours" else trl)(args, Clock(args.clock, args.born))


def clock_of(tool, args, folder, *more):
    """What a process that ran one tool has noted down; whatever it writes lies in `folder`."""
    path = folder / "clock.json"
    words = [f"--{name}={getattr(args, name)}" for name in ("model", "rows", "batch", "steps", "threads")]
    command = [sys.executable, __file__, *words, "--tool", tool, "--clock", str(path), "--born", str(time.time())]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TMPDIR": str(folder)}
    environment |= {"OMP_NUM_THREADS": str(args.threads), "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run([*command, *more, "--extra", *args.extra], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{tool} failed:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    return path.read_text()


def measured(tool, args):
    """What one process came to."""
    with tempfile.TemporaryDirectory() as folder:
        clock = json.loads(clock_of(tool, args, Path(folder)))
    seconds = [end - begin for begin, end in zip(clock["begins"], clock["ends"], strict=True)]
    timed = seconds[1:] or seconds
    return {
        "start_up_s": clock["begins"][0] - clock["born"] - clock["apart"],
        "reference_pass_s_per_pair": clock["apart"] / (args.batch * args.steps),
        "seconds_per_pair": sum(timed) / len(timed) / args.batch,
        "peak_gib": (clock["peak_mib"] - clock["imported_mib"]) / 1024,
        "losses": clock["losses"],
    }


def summary(turns, args):
    """Medians over the turns, ratios within them, and the distance to the machine's own rate."""
    tools = {}
    for tool in args.tools:
        row = {key: statistics.median(turn[tool][key] for turn in turns) for key in turns[0][tool] if key != "losses"}
        ratios = [turn[tool]["seconds_per_pair"] / turn["ours"]["seconds_per_pair"] for turn in turns]
        whole = [in_all(turn[tool]) / in_all(turn["ours"]) for turn in turns]
        row |= {"ours_is_faster": statistics.median(ratios), "ours_is_faster_with_reference": statistics.median(whole)}
        row["losses"] = turns[0][tool]["losses"]
        tools[tool] = row
    rows = first_rows(args.rows, args.batch * args.steps)
    steps = [rows[i : i + args.batch] for i in range(0, len(rows), args.batch)]
    flops = statistics.mean(flops_per_step(args.model, step) for step in steps[1:] or steps)
    rate = statistics.median(turn["gemm"] for turn in turns)
    bound = flops / rate / args.batch
    ours, default = tools["ours"], tools.get("trl-default")
    gaps = [abs(a - b) for a, b in zip(ours["losses"], default["losses"], strict=True)] if default else []
    return {
        "batch": args.batch, "steps": args.steps, "threads": args.threads, "repeats": len(turns),
        "model": Path(args.model).name, "trl": version("trl"), "tools": tools,
        "gemm_gflops": rate / 1e9, "bound_s_per_pair": bound, "over_bound": ours["seconds_per_pair"] / bound,
        "largest_loss_difference": max(gaps, default=None),
    }  # fmt: skip


def in_all(row):
    """Seconds of a pair with its share of the reference's pass."""
    return row["seconds_per_pair"] + row["reference_pass_s_per_pair"]


def show(result):
    """The result as lines of text."""
    print(f"\n{'':12} {'start-up s':>10} {'s/pair':>8} {'+ reference':>11} {'ours faster':>11} {'peak GiB':>9}")
    for tool, row in result["tools"].items():
        print(
            f"{tool:12} {row['start_up_s']:10.1f} {row['seconds_per_pair']:8.2f} {in_all(row):11.2f} "
            f"{row['ours_is_faster']:11.2f} {row['peak_gib']:9.2f}"
        )
    print(
        f"matrix products: {result['gemm_gflops']:.0f} GFLOP/s, by which a pair takes "
        f"{result['bound_s_per_pair']:.2f} s: ours is {result['over_bound']:.2f} times that"
    )
    print(f"largest difference of a step's losses: {result['largest_loss_difference']}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--rows", required=True, help="pairs as messages, with the columns prompt, chosen, rejected")
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/real_model.json")
    parser.add_argument("--extra", nargs="*", default=[], help="more words for train.py")
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tool", help=argparse.SUPPRESS)
    parser.add_argument("--clock", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--born", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tool:
        child(args)
        return
    turns = []
    for _ in range(args.repeats):
        turn = {"gemm": gemm_flops_per_second(args.model)}
        for tool in args.tools:
            turn[tool] = measured(tool, args)
            print(tool, {key: value for key, value in turn[tool].items() if key != "losses"}, flush=True)
        turns.append(turn)
        result = summary(turns, args)
        write("real_model", result, args.out)
    show(result)
    with tempfile.TemporaryDirectory() as folder:  # in a process of its own: being observed takes time
        result["profile"] = json.loads(clock_of("ours", args, Path(folder), "--profile"))["profile"]
    write("real_model", result, args.out)
    print("what the time goes to:", result["profile"])


if __name__ == "__main__":
    main()
