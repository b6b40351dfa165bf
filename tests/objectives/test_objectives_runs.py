"""Objectives of every sort train through the same command, and docs/objectives.md is what the code says."""

import json

import pytest

from dpo_ref.cli import docs_tables, schemas
from tests.support.command import ROOT, file_composes, files_of, train
from tests.support.quick import only

ONE_OF_EACH = ["ipo_mean", "dpo_per_byte", "nca", "simpo", "orpo", "ld_dpo", "wpo", "kto", "bco", "aot", "beta_dpo"]
SMALL = ["model.path=lab:tiny", "data.num_pairs=16", "data.num_eval_pairs=4", "trainer.batch_size=8", "tracking=none"]


@pytest.mark.parametrize("choice", files_of("objective"))
def test_every_file_composes(choice):
    file_composes(choice)


@pytest.mark.parametrize("name", only(ONE_OF_EACH, "dpo_per_byte", "orpo", "wpo", "bco", "aot", "beta_dpo"))
def test_two_steps(name, tmp_path):
    """The loss is finite and its gradient reaches the weights: the second step's loss is another."""
    done = train(*SMALL, f"objective={name}", "optim.lr=0.001", "optim.warmup_ratio=0", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    before, *steps, after = rows
    assert len(steps) == 2
    assert all(row["train/grad_norm"] > 0 for row in steps)
    assert after["eval/loss"] != before["eval/loss"]
    assert all(
        abs(row[key]) < float("inf") for row in rows for key in row if key.endswith(("loss", "rewards/margins"))
    )


def rows_of(run):
    """The metrics of a run, without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "throughput" not in k and "memory" not in k} for line in lines]


def test_a_resumed_run_goes_on_with_the_running_statistic(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SMALL, "objective=beta_dpo", "optim.lr=0.01", "optim.schedule=constant", "trainer.batch_size=4"]
    assert train(*options, f"output_dir={whole}").returncode == 0
    assert train(*options, f"output_dir={parts}", "trainer.max_steps=2").returncode == 0
    (state,) = parts.glob("checkpoints/*/state.json")
    assert json.loads(state.read_text())["running"]["mean_margin"] != 0
    done = train(f"resume={parts}", "trainer.max_steps=4", "tracking=none")
    assert done.returncode == 0, done.stderr
    steps = [[row for row in rows_of(run) if "train/loss" in row] for run in (whole, parts)]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 4
    assert steps[1][1]["train/objective/mean_margin"] != steps[1][3]["train/objective/mean_margin"]
    weights = [(run / "policy" / "model.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1]


def test_rows_with_a_label(tmp_path):
    """Half of the responses wanted; the likelihood term is refused before anything is read."""
    rows = tmp_path / "rows.jsonl"
    written = [{"prompt": f"ask {n}", "completion": f"answer {n}", "label": n % 2 == 0} for n in range(8)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in written))
    options = ["model.path=lab:tiny", "data=jsonl", f"data.path={rows}", "trainer.batch_size=4", "tracking=none"]
    refused = train(*options, "objective=kto", "objective.nll_weight=0.1", f"output_dir={tmp_path / 'refused'}")
    assert "objective.nll_weight has no place in objective=kto" in refused.stderr
    refused = train(*options, "objective=dpo", f"output_dir={tmp_path / 'pairs'}")
    assert "use sft, or kto for rows with a label" in refused.stderr
    done = train(*options, "objective=kto", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    first = rows_of(tmp_path / "run")[0]
    assert first["train/logps/chosen"] != first["train/logps/rejected"]
    assert first["train/loss"] == pytest.approx(0.5, abs=1e-6)
    assert "train/rewards/accuracies" not in first


def test_the_page_is_what_the_code_says():
    written = (ROOT / "docs" / "objectives.md").read_text()
    assert written == docs_tables.objectives_page(), (
        "run: python -m dpo_ref.cli.docs_tables objectives > docs/objectives.md"
    )


NEEDS = {
    "dpo": ["pairs", "reference"],
    "ipo_mean": ["pairs", "reference", "lengths"],
    "dpo_per_byte": ["pairs", "reference", "bytes"],
    "r_dpo": ["pairs", "reference", "lengths"],
    "simpo": ["pairs", "lengths"],
    "unlikelihood": ["pairs"],
    "sft": ["responses", "lengths"],
}


@pytest.mark.parametrize("name", NEEDS)
def test_needs_are_found_by_asking(name):
    target = next(target for path, target in schemas.groups()["objective"].items() if path.stem == name)
    assert docs_tables.needs(schemas.locate(target)) == NEEDS[name]


def test_a_header_without_its_parts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_tables, "CONF", tmp_path)  # a file of ours; of a user's own nothing is asked
    path = tmp_path / "objective" / "new.yaml"
    path.parent.mkdir()
    path.write_text("# A loss of some sort, which says nothing.\n#   python train.py objective=new\ndefaults: []\n")
    with pytest.raises(ValueError, match=r"new.yaml: its comment must be a title, a command, then loss, reward"):
        docs_tables.header(path)
