"""Invented evaluations with the shape of real ones: an initial policy, and policies trained at several betas."""

import json
import math
import random
from pathlib import Path

from dpo_ref.evaluation.results import RESULTS, Evaluated, Evaluation
from dpo_ref.evaluation.stages import score_stage
from dpo_ref.generation.records import Generation, write_generations
from dpo_ref.reports.exports import RewardedPair
from dpo_ref.types import Message, turns_of

QUESTIONS = (
    "List three animals that can fly.",
    "Spell the word 'window' backwards.",
    "Which is larger, 14 or 9? Answer in one sentence.",
    "Count the words: red green blue.",
)
SETTINGS = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 40, "seed": 0}


def answers(num_prompts: int, samples: int, length: float, ends: float, good: float, seed: int):
    """Generations and scores: answers of about `length` tokens, a share `ends` ends, `good` is the mean score."""
    rng = random.Random(seed)
    generations, scores = [], []
    for prompt in range(num_prompts):
        question = f"{QUESTIONS[prompt % len(QUESTIONS)]} ({prompt})"
        for sample in range(samples):
            finished = rng.random() < ends
            size = min(39, max(2, round(rng.gauss(length, length / 4)))) if finished else 40
            words = " ".join(
                rng.choice(("the", "bat", "14", "an owl,", "I think", "is larger")) for _ in range(size - 1)
            )
            message = {"role": "user", "content": question}
            first = ({"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello. Ask away."})
            generations.append(
                Generation(
                    prompt=(*(first if prompt % 3 == 2 else ()), message),
                    prompt_index=prompt,
                    sample_index=sample,
                    output=words + ("." if finished else ""),
                    prompt_ids=(1, 2, 3),
                    token_ids=tuple(rng.randrange(5, 90) for _ in range(size)),
                    finish_reason="stop" if finished else "length",
                    num_tokens=size,
                    num_chars=len(words),
                    seed=seed,
                    temperature=1.0,
                    top_p=1.0,
                )
            )
            scores.append(min(1.0, max(0.0, round(rng.gauss(good, 0.3), 1))))
    return generations, scores


def initial(folder: Path, num_prompts: int = 40) -> Evaluated:
    """The initial policy, evaluated."""
    generations, scores = answers(num_prompts, 2, 11.7, 0.995, 0.47, seed=100)
    about = Evaluation("initial", "gold", {}, generation=SETTINGS)
    folder.mkdir(parents=True, exist_ok=True)
    write_generations(folder / "generations.jsonl", generations)
    return score_stage(folder, about, generations, scores, None, seed=0)


def trained(folder: Path, baseline: Evaluated, beta: float, seed: int, reference: str = "initial") -> Evaluated:
    """A policy trained at `beta`: best in the middle, long and far away below, hardly moved above."""
    x, shift = math.log10(beta), 0.04 * (reference != "initial")
    good = 0.57 + shift - 0.06 * (x + 0.3) ** 2
    length, ends = 14 + 4.5 * max(0.0, -x - 0.2), 1 - 0.07 * max(0.0, -x - 0.3) ** 2
    num_prompts = len({g.prompt_index for g in baseline.generations})
    generations, scores = answers(
        num_prompts, 2, length + seed, ends, good + 0.01 * seed, seed=seed + int(1000 * beta)
    )
    kl = 9 / (1 + 6 * beta) + 0.1 + 0.3 * seed
    measured = {
        "kl/initial": kl,
        "kl/initial_se": 0.04 * kl,
        "eos/chosen_logratio": -0.5 + x,
        "eos/chosen_logratio_se": 0.03,
    }
    measured |= {"rewards/accuracies": 0.7 - 0.02 * abs(x), "rewards/length_baseline": 0.561}
    about = Evaluation(
        f"{beta:g}-{seed}",
        "gold",
        measured,
        objective="dpo",
        reference=reference,
        beta=beta,
        seed=seed,
        generation=SETTINGS,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_generations(folder / "generations.jsonl", generations)
    return score_stage(folder, about, generations, scores, baseline, seed=0)


def summary(folder: Path, **changes) -> None:
    """A job's summary.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({"status": "completed", "error": None} | changes))


def sweep(folder: Path, baseline: Evaluated, betas, seeds, references=("initial",)) -> None:
    """A multirun folder with every job completed and evaluated."""
    index = 0
    for reference in references:
        for beta in betas:
            for seed in seeds:
                job = folder / f"{index}_beta={beta:g},reference={reference},seed={seed}"
                trained(job / RESULTS, baseline, beta, seed, reference)
                overrides = [
                    "objective=dpo",
                    f"reference={reference}",
                    f"beta={beta}",
                    f"seed={seed}",
                    "optim.lr=3e-4",
                ]
                summary(job, objective="dpo", reference=reference, beta=beta, seed=seed, overrides=overrides)
                index += 1


def answer(prompt=0, sample=0, tokens=(5, 6, 2), finished=True, text="ab", seed=0):
    return Generation(
        prompt=({"role": "user", "content": f"question {prompt}"},),
        prompt_index=prompt,
        sample_index=sample,
        output=text,
        prompt_ids=(1, 3),
        token_ids=tuple(tokens),
        finish_reason="stop" if finished else "length",
        num_tokens=len(tokens),
        num_chars=len(text),
        seed=seed,
        temperature=1.0,
        top_p=1.0,
    )


def pair(**changed) -> RewardedPair:
    prompt = (Message(role="system", content="be short"), Message(role="user", content="a cat"))
    return RewardedPair(prompt, turns_of("good"), turns_of("bad"), 0.5, -0.25, "pairs.jsonl row 1")._replace(**changed)
