"""The lab's three models as references, and none, a prior and a mixture: one short run each, evaluated, one table."""

import csv
import json
import math

import pytest

from tests.support.command import typed

PARTS = "reference.parts=[{reference: initial}, {reference: other, path: 'lab:strong'}]"
REFERENCES = {
    "initial": ["reference=initial"],
    "strong": ["reference=other", "reference.path=lab:strong"],
    "foreign": ["reference=other", "reference.path=lab:foreign"],
    "prior": ["reference=prior"],
    "none": ["reference=none"],
    "mixture": ["reference=mixture", PARTS],
}
SHORT = ["beta=0.3", "data.num_pairs=1024", "data.num_eval_pairs=64", "data.num_test_prompts=24", "tracking=none"]


@pytest.mark.slow
def test_one_short_run_each(tmp_path):
    sweep = tmp_path / "sweep"
    for index, (name, words) in enumerate(REFERENCES.items()):
        done = typed("train.py", *words, *SHORT, f"output_dir={sweep / f'{index}_{name}'}")
        assert done.returncode == 0, done.stderr
        assert ("reference text: " in done.stdout) == (name == "foreign")  # its audit
    done = typed("evaluate.py", f"sweep={sweep}", "tracking=none", "generation.samples_per_prompt=1")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((sweep / "sweep.csv").read_text().splitlines()))
    assert [row["job"].partition("_")[2] for row in rows] == list(REFERENCES)
    assert all(math.isfinite(float(row[key])) for row in rows for key in ("gold/mean", "winrate/initial"))
    identities = [json.loads((sweep / row["job"] / "summary.json").read_text())["identities"] for row in rows]
    assert len({by_role["loss_reference"] for by_role in identities}) == len(REFERENCES)
    assert len({by_role["kl_reference"] for by_role in identities}) == 1
    first = [
        json.loads((sweep / row["job"] / "metrics.jsonl").read_text().splitlines()[0])["eval/loss"] for row in rows
    ]
    assert first[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len({round(loss, 6) for loss in first}) == len(REFERENCES)
