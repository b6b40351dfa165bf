"""Every kind of reference with every objective: refused as it is composed, with the reason, or trained for a step.

The table of docs/references.md says which is which from composing alone (test_references_page.py); here those that
compose are run. By hand: -m slow.
"""

import json
import math
from collections import Counter

import pytest

from dpo_ref.cli.schemas import CONF
from tests.support.command import resolved, train
from tests.support.reference_kinds import KINDS, written

pytestmark = pytest.mark.slow

OBJECTIVES = sorted(path.stem for path in CONF.glob("objective/*.yaml"))
# What a model's tokenizer decides is known once it is loaded: distributions over another vocabulary, and samples,
# which are scored from text in a table.
WHEN_LOADED = {
    "another tokenizer": {"epsilon_dpo", "tdpo", "tdpo1", "grpo", "ppo_clip", "reinforce", "qrpo"},
}
ON_POLICY = ["data=on_policy", "data.rounds=1", "data.prompts_per_round=4", "data.samples_per_prompt=2"]
ON_POLICY += ["data.prompts.num_pairs=8", "data.prompts.num_eval_pairs=4", "data.max_new_tokens=8"]


def test_every_kind_is_here():
    there = {words[0].partition("=")[2] if words else "auto" for words in KINDS.values()}
    assert {path.stem for path in CONF.glob("reference/*.yaml")} - there == {"served"}  # tests/references/..._served


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What every objective on pairs and every kind of reference reads."""
    return written(tmp_path_factory.mktemp("rows") / "pairs.jsonl")


def data_for(objective, rows):
    """Samples for objectives that learn from them, else the rows."""
    learns_from_samples = "advantages" in resolved(f"objective={objective}").objective.inputs
    return ON_POLICY if learns_from_samples else ["data=jsonl", f"data.path={rows}"]


def refused(words):
    try:
        resolved(*words)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_every_objective(kind, rows, tmp_path):
    """A cell that composes trains; what is refused later is refused with a sentence that names what to write."""
    became, wrong = Counter(), []
    for objective in OBJECTIVES:
        words = [f"objective={objective}", "model.path=lab:initial", *data_for(objective, rows), *KINDS[kind]]
        if refused(words) is not None:
            became["refused"] += 1
            continue
        run = tmp_path / objective
        small = ["trainer.max_steps=1", "trainer.batch_size=8", "tracking=none", f"output_dir={run}"]
        done = train(*words, *small)
        if done.returncode and objective in WHEN_LOADED.get(kind, ()):
            assert "error: " in done.stderr
            became["refused when loaded"] += 1
            continue
        if done.returncode:
            wrong.append(f"{objective}: {done.stderr.strip().splitlines()[-1]}")
            continue
        losses = [json.loads(line).get("train/loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert all(math.isfinite(loss) for loss in losses if loss is not None)
        became["trained"] += 1
    assert wrong == []
    assert became["trained"] > 0
    print(kind, dict(became))
