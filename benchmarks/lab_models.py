"""Train the lab's models by their recipes and compare them with those that ship; `make lab-models`.

    OMP_NUM_THREADS=1 python benchmarks/lab_models.py                       all of them, an hour on one core
    OMP_NUM_THREADS=1 python benchmarks/lab_models.py initial tiny          some
    OMP_NUM_THREADS=1 python benchmarks/lab_models.py --ship                put them in the place of those that ship

On the machine and with the number of threads that they were trained with, weights come out with the same digest.
Elsewhere sums are rounded in another order and training takes another path: then the gold rewards of their answers are
compared, within three standard errors. Status 1 where they differ.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from common import RESULTS, write

from dpo_ref.files.digests import file_digest
from dpo_ref.generation.sampling import generate
from dpo_ref.lab.conversations import read_prompt
from dpo_ref.lab.gold import gold_rewards
from dpo_ref.lab.models import BUILT, CHECKPOINTS, locate, shipped_folder, shipped_name
from dpo_ref.lab.preferences import draw_prompts
from dpo_ref.lab.recipes import RECIPES, build
from dpo_ref.models.loading import load_model, load_tokenizer

NUM_PROMPTS, SAMPLES, MAX_TOKENS = 400, 16, 128
WEIGHTS = "model.safetensors"


def answers_worth(folder, samples, temperature):
    """Gold rewards of `samples` answers to each test prompt, by prompt, and each prompt's family."""
    model, prompts = load_model(str(folder), torch.device("cpu"), "auto").model, draw_prompts("test", NUM_PROMPTS)
    options = {"samples_per_prompt": samples, "temperature": temperature, "max_new_tokens": MAX_TOKENS}
    found = generate(model, load_tokenizer(str(folder)), prompts, 0, **options)
    rewards = gold_rewards([g.prompt for g in found], [g.output for g in found], [g.finished for g in found])
    by_prompt = defaultdict(list)
    for generation, reward in zip(found, rewards, strict=True):
        by_prompt[generation.prompt_index].append(reward)
    return [by_prompt[index] for index in range(len(prompts))], [read_prompt(prompt).family for prompt in prompts]


def measured(folder):
    """What a model's answers are worth: sampled, greedy, the best of 16; means over prompts, and by family."""
    sampled, families = answers_worth(folder, SAMPLES, 1.0)
    greedy, _ = answers_worth(folder, 1, 0.0)
    means = [statistics.fmean(rewards) for rewards in sampled]
    per_prompt = {"gold": means, "greedy": [rewards[0] for rewards in greedy], "best_of_16": list(map(max, sampled))}
    numbers = {name: statistics.fmean(values) for name, values in per_prompt.items()}
    numbers["gold_error"] = statistics.stdev(means) / math.sqrt(len(means))
    by_family = {
        family: {
            name: round(statistics.fmean(v for v, f in zip(values, families, strict=True) if f == family), 3)
            for name, values in per_prompt.items()
        }
        for family in dict.fromkeys(families)
    }
    return {name: round(value, 4) for name, value in numbers.items()} | {"by_family": by_family}


def trained(name, work):
    """The folder of a model trained anew, and the seconds that took."""
    started, parent = time.perf_counter(), RECIPES[name].parent
    build(RECIPES[name], work / name, Path(locate(f"lab:{parent}")) if parent else None)
    return work / name, round(time.perf_counter() - started)


def shipped_rows():
    """What was measured of the models that ship."""
    path = RESULTS / "lab_models.json"
    return json.loads(path.read_text())["models"] if path.is_file() else {}


def ship(row, folder):
    """Put a folder in the place of the one that ships."""
    if (old := shipped_folder(row["name"])) is not None:
        shutil.rmtree(old)
    shutil.copytree(folder, CHECKPOINTS / shipped_name(row["name"], folder))
    write("lab_models", {"models": shipped_rows() | {row["name"]: row}})
    return "shipped"


def compared(row, folder):
    """Whether a model trained anew is the one that ships, in words; None where it differs."""
    if file_digest(folder / WEIGHTS) == file_digest(shipped_folder(row["name"]) / WEIGHTS):
        return "same digest"
    shipped = shipped_rows()[row["name"]]
    error = math.hypot(row["gold_error"], shipped["gold_error"])
    return "same gold within error" if abs(row["gold"] - shipped["gold"]) <= 3 * error else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ships = [name for name in RECIPES if name not in BUILT]
    parser.add_argument("names", nargs="*", default=ships)
    parser.add_argument("--ship", action="store_true")
    args = parser.parse_args()
    differing = []
    with tempfile.TemporaryDirectory() as work:
        for name in sorted(args.names, key=list(RECIPES).index):
            folder, seconds = trained(name, Path(work))
            row = {"name": name, "key": RECIPES[name].key, "threads": torch.get_num_threads(), "seconds": seconds}
            row |= measured(folder)
            verdict = ship(row, folder) if args.ship else compared(row, folder)
            differing += [] if verdict else [name]
            gold = f"gold {row['gold']:.3f}±{row['gold_error']:.3f}  greedy {row['greedy']:.3f}"
            verdict = verdict or "DIFFERS from the one that ships"
            print(f"lab:{name:13} {gold}  best of 16 {row['best_of_16']:.3f}  {seconds} s  {verdict}", flush=True)
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
