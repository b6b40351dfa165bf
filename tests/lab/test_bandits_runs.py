"""`python train.py bandit=...` as a user types it: its files, its choices, and what it refuses."""

import json
import re

import pytest

from tests.support.command import resolved, train, typed

QUICK = ["tracking=none", "bandit.num_seeds=2", "bandit.rounds=2", "bandit.steps_per_round=2", "bandit.beside=[sft]"]
SMALL = {
    "arms": [*QUICK, "+experiment=bandit_arms", "bandit.peaks=[70]"],
    "tokens": [*QUICK, "+experiment=bandit_tokens", "bandit.fit_steps=2", "bandit.peaks=[70]", "bandit.length=3"],
}


def summary(run):
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize("name", SMALL)
def test_an_experiment_leaves_what_it_promises(name, tmp_path):
    run = tmp_path / "run"
    done = train(*SMALL[name], f"output_dir={run}", "beta=0.3")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "summary.json", "report.html", "report.png",
    }  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0
    assert lines[-1]["step"] == 4
    assert lines[0]["peak_70/offline/dpo/kl"] == 0
    assert lines[0]["peak_70/on_policy/dpo/queries"] == 0
    run_summary = summary(run)
    assert (run_summary["status"], run_summary["objective"], run_summary["beta"], run_summary["reference"]) == (
        "completed",
        "dpo",
        0.3,
        "initial",
    )
    ends = run_summary["bandit"]["peak_70/on_policy/dpo"]
    assert len(ends["reward"]) == 2
    assert ends["queries"] == 2 * {"arms": 100, "tokens": 60}[name]
    assert lines[-1]["peak_70/on_policy/dpo/reward"] == pytest.approx(sum(ends["reward"]) / 2, abs=1e-6)
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r'(src|href)="http|<script |<link', page)
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "reward peak 70" in done.stdout
    assert "optimum at β = 0.3" in done.stdout


@pytest.mark.usefixtures("undrawn_pictures")
def test_objective_beta_seed_and_reference_are_the_runs(tmp_path):
    """Another objective with its strength, another seed, and no reference: all of them change the numbers."""
    changes = {
        "same": [],
        "ipo": ["objective=ipo_sum", "beta=0.3"],
        "seed": ["seed=1"],
        "none": ["reference=none"],
    }
    small = ["tracking=none", "bandit=arms", "bandit.num_seeds=1", "bandit.rounds=2", "bandit.steps_per_round=3",
             "bandit.beside=[]", "bandit.peaks=[20]"]  # fmt: skip
    ends = {}
    for name, words in {"first": [], **changes}.items():
        run = tmp_path / name
        done = train(*small, *words, f"output_dir={run}")
        assert done.returncode == 0, done.stderr
        own = summary(run)["own_method"]
        ends[name] = summary(run)["bandit"][f"peak_20/on_policy/{own}"]["reward"]
    assert ends["first"] == ends["same"]
    assert len({str(value) for value in ends.values()}) == 4
    assert summary(tmp_path / "ipo")["beta"] == 0.3


@pytest.mark.usefixtures("undrawn_pictures")
def test_a_sweep_has_one_table(tmp_path):
    folder = tmp_path / "sweep"
    done = typed("train.py", "-m", "bandit=arms", *QUICK, "bandit.peaks=[20]", f"output_dir={folder}", "beta=0.1,-1")
    assert [summary(job)["status"] for job in sorted(folder.glob("*_*"))] == ["completed", "failed"], done.stderr
    assert "peak_20/offline/dpo" in done.stdout
    assert "beta=-1.0" in done.stdout
    assert "evaluate.py" not in done.stdout


REFUSED = {
    "data": (["data=hh"], "data=hh has no effect on a bandit"),
    "an option of the model": (["model.path=lab:tiny"], "model.path=lab:tiny has no effect on a bandit"),
    "optimiser": (["optim.lr=1"], "optim.lr=1 has no effect on a bandit"),
    "trainer": (["trainer.epochs=2"], "trainer.epochs=2 has no effect on a bandit"),
    "stage": (["stage=data"], "stage=data has no effect on a bandit"),
    "reference": (["reference=other", "reference.path=lab:tiny"], "reference=other has no meaning in a bandit"),
    "beta": (["objective=sft", "beta=1"], "objective=sft has no KL strength"),
    "schedule": (["bandit.schedules=[online]"], "must be some of offline, on_policy"),
    "odd": (["bandit.samples_per_group=5"], "must be even"),
    "not a multiple": (["bandit.samples_per_group=6"], "must be a multiple of bandit.samples_per_group=6"),
    "peak": (["bandit.peaks=[100]"], "must be arms from 0 to 99"),
    "zero": (["bandit.lr=0"], "bandit.lr=0.0 must be positive"),
    "width": (["bandit.width=0"], "bandit.width=0.0 must be positive"),
    "misspelt": (["bandit.round=2"], "did you mean bandit.rounds?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_effect_is_refused(case):
    words, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        resolved("bandit=arms", *words)
    assert message in str(error.value)


def test_methods_beside_are_checked_as_if_typed(tmp_path):
    for words, message in (("sft beta=1", "sft has no KL strength"), ("dop", "Could not find 'objective/dop'")):
        done = train(
            "bandit=arms", "tracking=none", f"output_dir={tmp_path / words[:3]}", f'bandit.beside=["{words}"]'
        )
        assert done.returncode == 1
        assert f"bandit.beside: {words}: " in done.stderr
        assert message in done.stderr


@pytest.mark.usefixtures("undrawn_pictures")
def test_a_bandit_does_not_resume(tmp_path):
    run = tmp_path / "run"
    assert train(*QUICK, "bandit=arms", "bandit.peaks=[20]", f"output_dir={run}").returncode == 0
    done = train(f"resume={run}")
    assert done.returncode == 1
    assert "is the run of a bandit, which has no checkpoints; start it anew" in done.stderr
    assert summary(run)["status"] == "completed"
