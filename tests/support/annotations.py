"""Judged answers in AlpacaEval's files, and the stage that reads them."""

import json

import numpy as np

from tests.support import evaluate_command


def evaluate(*overrides):
    evaluate_command.evaluate(*overrides, "tracking=none")


def rows(model, wins, baseline="base", judge="someone", prompts=None, answer="b" * 40):
    """A row per preference in [1, 2]; the model's answers have 30 to 49 characters."""
    return [
        {
            "instruction": f"question {index}" if prompts is None else prompts[index],
            "output_1": answer,
            "output_2": "m" * (30 + 7 * index % 20),
            "generator_1": baseline,
            "generator_2": model,
            "annotator": judge,
            "preference": preference,
        }
        for index, preference in enumerate(wins)
    ]


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def preferences(seed, mean, size=60):
    return np.round(1 + np.random.default_rng(seed).beta(4 * mean, 4 * (1 - mean), size=size), 6).tolist()
