"""`python evaluate.py` in this process, whole or without its page, and small options for it."""

import json

from dpo_ref.cli.evaluate import Evaluator, check_stage, run_evaluation
from tests.support.command import composed
from tests.support.pictures import undrawn

DATA = ["data.num_pairs=64", "data.num_eval_pairs=12", "data.num_test_prompts=10"]
TRAIN = [*DATA, "model.path=lab:tiny", "trainer.batch_size=16", "tracking=none"]
QUICK = ["tracking=none", "generation.max_new_tokens=12", "generation.samples_per_prompt=2"]
PLAIN = [*QUICK, "diagnostic=none"]


def evaluate_drawn(*overrides):
    """Whole."""
    cfg, choices = composed(*overrides, kind="evaluate")
    run_evaluation(cfg, choices, list(overrides))


def evaluate(*overrides):
    """Whole but for what is in its pictures, which takes longer than all the rest."""
    with undrawn():
        evaluate_drawn(*overrides)


def measure(*overrides):
    """The stages on one policy, without its page."""
    cfg, choices = composed(*overrides, kind="evaluate")
    check_stage(cfg, overrides)
    Evaluator(cfg, choices, list(overrides)).one(cfg.policy, cfg.output_dir)


def numbers(folder):
    return json.loads((folder / "evaluation.json").read_text())
