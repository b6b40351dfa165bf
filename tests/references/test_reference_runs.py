"""Every kind of reference in a run as a user types it, on tiny models; a foreign one evaluated."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dpo_ref.references.table import read_shards
from tests.support.command import train
from tests.support.evaluate_command import measure
from tests.support.foreign import foreign  # noqa: F401
from tests.support.quick import only

SMALL = ["model.path=lab:tiny", "data.num_pairs=48", "data.num_eval_pairs=8", "data.num_test_prompts=4"]
SMALL += ["trainer.batch_size=16", "tracking=none", "beta=0.1"]


KINDS = {
    "initial": ["reference=initial"],
    "other": ["reference=other", "reference.path=lab:tiny"],
    "foreign": ["reference=other", "reference.path={foreign}"],
    "prior": ["reference=prior"],
    "none": ["reference=none"],
    "uniform_token": ["reference=uniform_token"],
    "interpolate": ["reference=interpolate", "reference.path=lab:tiny", "reference.share=0.5"],
    "mixture": [
        "reference=mixture",
        "reference.parts=[{{reference: initial}}, {{reference: other, path: '{foreign}'}}]",
        "reference.weights=[1.0, 2.0]",
    ],
}


NAMED = {
    "other": "other lab:tiny",
    "foreign": "other {foreign}",
    "interpolate": "interpolate lab:tiny",
    "mixture": "mixture of initial, other {foreign}",
}


@pytest.mark.parametrize(
    "kind", only(KINDS, *KINDS.keys() - {"foreign", "other", "interpolate"})
)  # a diagnosis is of a run with it
def test_a_run_with_every_kind(kind, foreign, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    overrides = [override.format(foreign=foreign) for override in KINDS[kind]]
    done = train(*SMALL, *overrides, f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    at_ln_2 = rows[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert at_ln_2 == (kind in ("initial", "other", "interpolate"))  # the others do not start at the reference
    by_text = kind in ("foreign", "mixture")
    assert ("train/eos/chosen_logratio" in rows[1]) == (
        kind != "mixture"
    )  # a part of it has no tokens of the policy's
    assert rows[1]["train/rewards/saturated"] <= 1
    assert ("reference text: " in done.stdout) == by_text
    summary = json.loads((run / "summary.json").read_text())
    assert summary["reference"] == NAMED.get(kind, kind).format(foreign=foreign)
    assert summary["identities"]["loss_reference"]
    if kind == "foreign":
        overrides = [f"policy={run}", "tracking=none", "generation.max_new_tokens=8"]
        measure(*overrides)
        metrics = json.loads((run / "evaluation" / "evaluation.json").read_text())["metrics"]
        assert metrics["rewards/margins"] == pytest.approx(rows[-1]["eval/rewards/margins"] / 0.1, abs=1e-3)
        assert metrics["kl/loss_reference_share_cut"] == metrics["kl/initial_share_cut"] == 1 - metrics["ended/share"]


def test_resuming_against_another_reference_is_refused(foreign, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    overrides = [*SMALL, "reference=other", f"reference.path={foreign}", f"output_dir={run}", "trainer.save_every=1"]
    assert train(*overrides, "trainer.max_steps=2").returncode == 0
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("terminator: count", "terminator: skip"))
    again = train(f"resume={run}", "tracking=none")
    assert again.returncode == 1
    assert "reference.terminator was count and is skip now" in again.stderr


def test_a_short_run_scores_the_rows_it_comes_to_and_goes_on_to_others(tmp_path, monkeypatch):
    whole, short = ["trainer.max_steps=3", f"output_dir={tmp_path / 'whole'}"], [f"output_dir={tmp_path / 'short'}"]
    run = ["model=lab_tiny", "data=lab", "data.num_pairs=48", "data.num_eval_pairs=8", "tracking=none", "seed=5"]
    run += ["trainer.batch_size=8", "optim.schedule=constant", "optim.warmup_ratio=0", "beta=0.3"]
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))
    assert train(*run, *short, "trainer.max_steps=1").returncode == 0
    stored, _ = read_shards(next((tmp_path / "cache" / "reference").iterdir()))
    assert len(stored) == 8 + 8  # one step's pairs, and the held-out ones
    assert train(*run, *whole).returncode == 0
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "another_cache"))
    done = train(f"resume={tmp_path / 'short'}", "trainer.max_steps=3", "tracking=none")
    assert done.returncode == 0, done.stderr
    kept = [load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("whole", "short")]
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())
