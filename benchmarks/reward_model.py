"""Reward models on the lab: how they rank held-out pairs, and what the best of n answers by them is worth.

    OMP_NUM_THREADS=1 python benchmarks/reward_model.py     (three minutes on one core)

Two are trained from lab:initial: on labels of the default judge, who likes length and errs, and on labels that are the
order of gold rewards. Ranked are 2,048 held-out pairs labelled by the default judge, and the same pairs by gold. Of n
answers of lab:initial to each of 400 prompts the one is kept that the reward model, or gold itself, prefers.

Runs that are there already are kept.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from common import ROOT, write

from dpo_ref.distributed import best_device
from dpo_ref.evaluation.scorers import reward_model
from dpo_ref.evaluation.statistics.estimates import clustered_mean
from dpo_ref.generation.records import Generation
from dpo_ref.generation.sampling import generate
from dpo_ref.lab.gold import gold
from dpo_ref.lab.models import locate
from dpo_ref.lab.preferences import lab
from dpo_ref.models.loading import load_model, load_tokenizer
from dpo_ref.types import PromptGroup

JUDGES = {"default judge": [], "gold": ["data.length_bias=0", "data.label_noise=0"]}
NUM_PAIRS, EPOCHS, COUNTS = 2048, 4, (1, 4, 16)


def trained(name: str, folder: Path) -> str:
    """The folder of the reward model trained on this judge's labels."""
    run_folder = folder / name.replace(" ", "_")
    sizes = [f"data.num_eval_pairs={NUM_PAIRS}", f"trainer.epochs={EPOCHS}"]
    words = ["objective=reward_model", *JUDGES[name], *sizes, "tracking=none"]
    if not (run_folder / "policy").is_dir():
        print(" ".join(["python train.py", *words]), flush=True)
        command = [sys.executable, "train.py", *words, f"output_dir={run_folder}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return str(run_folder / "policy")


def written(pair: PromptGroup, index: int) -> Generation:
    """A response of the data as an answer that ended by itself."""
    text = pair.responses[index]
    return Generation(pair.prompt, 0, 0, text, (), (), "stop", 0, len(text), 0, 1.0, 1.0)


def margins(pairs: list[PromptGroup], path: str) -> list[float]:
    """Score of the chosen response less that of the rejected one."""
    answers = [written(pair, index) for index in (0, 1) for pair in pairs]
    scores = reward_model(answers, path=path, batch_size=64).values
    return [chosen - rejected for chosen, rejected in zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)]


def in_gold(pairs: list[PromptGroup]) -> list[float]:
    """Gold reward of the chosen response less that of the rejected one."""
    return [pair.rewards[0] - pair.rewards[1] for pair in pairs if pair.rewards]


def right(ours: float, theirs: float) -> float:
    """Whether two differences have the same sign; half where ours is none."""
    return 0.5 if ours == 0 else float((ours > 0) == (theirs > 0))


def accuracies(pairs: list[PromptGroup], preferred: list[float]) -> dict[str, float]:
    """Shares of pairs ranked as labelled, and of pairs of unequal gold rewards ranked as gold does."""
    order = zip(preferred, in_gold(pairs), strict=True)
    labels = statistics.fmean(right(ours, 1.0) for ours in preferred)
    return {"labels": labels, "gold": statistics.fmean(right(ours, theirs) for ours, theirs in order if theirs)}


def best(scores: list[float], num_samples: int, count: int) -> list[int]:
    """The place of the highest of each prompt's first `count` scores."""
    starts = range(0, len(scores), num_samples)
    return [max(range(start, start + count), key=scores.__getitem__) for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/reward_model"))
    folder = ROOT / parser.parse_args().folder
    models = {name: trained(name, folder) for name in JUDGES}
    data = lab(0, num_pairs=1, num_eval_pairs=NUM_PAIRS)
    pairs = list(data.eval)
    words = [float(len(pair.responses[0].split()) - len(pair.responses[1].split())) for pair in pairs]
    ranked = {name: accuracies(pairs, margins(pairs, path)) for name, path in models.items()}
    ranked["longer is better"] = accuracies(pairs, words)
    ranked["gold itself"] = accuracies(pairs, in_gold(pairs))
    print("\nheld-out pairs ranked as labelled, as gold does")
    for name, row in ranked.items():
        print(f"{name:20}{row['labels']:8.3f}{row['gold']:8.3f}")

    checkpoint, samples = locate("lab:initial"), max(COUNTS)
    model, tokenizer = load_model(checkpoint, best_device(), "auto").model, load_tokenizer(checkpoint)
    answers = generate(model, tokenizer, data.test_prompts, 0, samples_per_prompt=samples)
    worth = gold(answers).values
    scores = {name: reward_model(answers, path=path, batch_size=64).values for name, path in models.items()}
    rows = []
    for name, values in (scores | {"gold itself": worth}).items():
        for count in COUNTS:
            kept = best(values, samples, count)
            mean = clustered_mean([worth[at] for at in kept], range(len(kept)))
            gain = clustered_mean([worth[at] - worth[at - at % samples] for at in kept], range(len(kept)))
            tokens = statistics.fmean(answers[at].num_tokens for at in kept)
            row = {"gold": mean.mean, "gold_se": mean.se, "gain": gain.mean, "gain_se": gain.se, "tokens": tokens}
            rows.append({"chosen_by": name, "n": count, **row})
            print(f"{name:20} best of {count:2}: gold {mean.mean:.3f}, gain {gain.mean:+.3f} ± {gain.se:.3f}")
    write("reward_model", {"pairs": ranked, "num_pairs": len(pairs), "best_of_n": rows})


if __name__ == "__main__":
    main()
