"""Peak memory of a training run on a CPU: all weights, and an adapter on frozen weights held in float32 and bfloat16.

    python benchmarks/adapter_memory.py --model <a model's folder> [--out FILE]

Each run is a process of its own: resident memory above what it takes to import everything, at its highest, and at its
highest from the first optimiser step on. The second process of a run with an adapter holds nothing of the first.
"""

import argparse
import json
import random
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import ROOT, peak_mib, write

ARMS = {
    "all weights": [],
    "adapter, float32 below": ["model.lora_rank=16", "model.weights=float32"],
    "adapter, bfloat16 below": ["model.lora_rank=16", "model.weights=bfloat16"],
}
SENTENCE = "a red boat sails by the old bridge while it rains and nobody asks why the tea is cold"
STEPS = 3


def write_pairs(path, number=24, size=90):
    """Conversations of about 250 tokens a pair."""
    draw = random.Random(0)

    def text(words):
        return " ".join(draw.choice(SENTENCE.split()) for _ in range(words))

    rows = [{"prompt": text(40), "chosen": text(size), "rejected": text(size)} for _ in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def resident_mib():
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def run_here(folder, overrides):
    """One run in this process; prints its memory as JSON."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import dpo_ref.cli.train  # noqa: F401

    before, in_steps, done = resident_mib(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.01):
            if (folder / "metrics.jsonl").exists() and "train/loss" in (folder / "metrics.jsonl").read_text():
                in_steps[0] = max(in_steps[0], resident_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    sys.argv = ["train.py", *overrides, f"output_dir={folder}"]
    started = time.perf_counter()
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    done.set()
    watcher.join()
    numbers = {"peak_mib": peak_mib() - before, "in_steps_mib": in_steps[0] - before}
    (folder / "memory.json").write_text(json.dumps(numbers | {"seconds": time.perf_counter() - started}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run-here", type=Path, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.run_here:
        return run_here(arguments.run_here, overrides)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.jsonl"
        write_pairs(pairs)
        common = ["data=jsonl", f"data.path={pairs}", "data.tokens_per_batch=1024", "trainer.batch_size=8"]
        common += ["model=pretrained", f"model.path={arguments.model}", "tracking=none", f"trainer.max_steps={STEPS}"]
        for name, own in ARMS.items():
            run = Path(folder) / name.replace(" ", "_").replace(",", "")
            run.mkdir()
            command = [sys.executable, __file__, "--model", arguments.model, "--run-here", str(run), *common, *own]
            subprocess.run(command, check=True, cwd=ROOT)
            results[name] = json.loads((run / "memory.json").read_text())
            print(name, results[name], flush=True)
    write("adapter_memory", {"model": Path(arguments.model).name, "steps": STEPS, "arms": results}, arguments.out)


if __name__ == "__main__":
    main()
