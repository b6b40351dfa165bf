"""docs/wandb.md, its sweep and its dashboard: what W&B makes of them is what our command line and its views take."""

import itertools
import re
from pathlib import Path

import pytest
import wandb
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from dpo_ref.cli import dashboard
from dpo_ref.cli.resolve import resolve
from dpo_ref.tracking import tracker
from dpo_ref.tracking import weights_and_biases as tracking
from tests.support.command import ROOT, composed, composes

SWEEP = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
PAGE = (ROOT / "docs" / "wandb.md").read_text()
COMMANDS = re.findall(r"^python (?:train|evaluate)\.py.*", PAGE, re.MULTILINE)


def words(parameters: dict) -> list[str]:
    """What an agent types after the program for one choice of parameters."""
    command = {"args": {name: {"value": value} for name, value in parameters.items()}}
    return create_sweep_command_args(command)["args_no_hyphens"]


def grid(sweep: dict) -> list[dict]:
    """Every choice of a grid search."""
    values = [entry.get("values", [entry.get("value")]) for entry in sweep["parameters"].values()]
    return [dict(zip(sweep["parameters"], choice, strict=True)) for choice in itertools.product(*values)]


def test_every_job_of_the_sweep_composes():
    choices = grid(SWEEP)
    assert len(choices) == 16
    for choice in choices[::5]:
        typed = words(choice)
        cfg, groups = composed(*typed)
        run = resolve(cfg, groups, typed)
        assert (run.beta, run.seed, run.reference.name) == (choice["beta"], choice["seed"], choice["reference"])
        assert run.trainer.max_steps is None
    assert (ROOT / SWEEP["program"]).is_file()
    assert create_sweep_command(SWEEP["command"])[1:] == ["python", "${program}", "${args_no_hyphens}"]


def test_lists_floats_booleans_groups_and_names_pass_as_they_are():
    parameters = {
        "objective": "ipo_mean", "optim.lr": 5e-7, "tracking.tags": ["pilot", "cpu 2"], "data": "jsonl",
        "data.path": "my_pairs.jsonl", "trainer.stop_when_degenerate": True, "evaluation.every": 8, "beta": "null",
        "optim.max_grad_norm": "null", "trainer.epochs": 2,
    }  # fmt: skip
    cfg, _ = composed(*words(parameters))
    assert (cfg.optim.lr, list(cfg.tracking.tags)) == (5e-7, ["pilot", "cpu 2"])
    assert (cfg.data.path, cfg.trainer.stop_when_degenerate) == ("my_pairs.jsonl", True)
    assert cfg.beta is None
    assert cfg.optim.max_grad_norm is None
    assert cfg.objective["_target_"].endswith("ipo_mean")


def test_pythons_none_is_refused_with_what_to_write():
    with pytest.raises(ValueError, match=r"beta=None: None is a text here; write beta=null"):
        composed(*words({"beta": None}))


def test_a_run_of_an_agent_has_the_id_that_the_agent_looks_for(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "given123")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)

    def opened(job_type: str, folder: str) -> str:
        directory = tmp_path / folder
        directory.mkdir(exist_ok=True)
        return tracking.run_id(tracker.RunInfo(directory, {}, "n", None, job_type, resume=False))

    assert opened("train", "alone") != "given123"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    assert opened("train", "of the sweep") == "given123"
    assert tracking.known_id(tmp_path / "of the sweep", "train") == "given123"
    assert opened("evaluate", "evaluation") != "given123"


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_compose(command):
    composes(command)


def test_the_page_names_what_is_logged():
    assert len(COMMANDS) == PAGE.count("\npython train.py") + PAGE.count("\npython evaluate.py") >= 4
    logged = set(re.findall(r"`((?:train|eval|evaluation)/[\w/]+)`", PAGE))
    assert len(logged) > 8
    for name in ("policy-", "reference-", "generations-", "evaluation-"):
        assert f"`{name}" in PAGE
    assert (ROOT / "docs" / "wandb_sweep.yaml").name in PAGE


def test_the_dashboard_is_built_offline_and_draws_over_the_optimiser_step():
    pytest.importorskip("wandb_workspaces", reason=tracking.NO_WORKSPACES)
    view = tracking.workspace("me", "my_project", dashboard.SECTIONS)
    assert (view.entity, view.project, view.name) == ("me", "my_project", tracking.DASHBOARD)
    by_name = {section.name: section.panels for section in view.sections}
    lines = [panel for name in ("Training", "Policies while training", "Cost") for panel in by_name[name]]
    assert {panel.x.name if hasattr(panel.x, "name") else panel.x for panel in lines} == {"step"}
    assert [(section.name, section.is_open) for section in view.sections] == [
        ("Policies", True), ("Policies while training", True), ("Training", True), ("Cost", False)
    ]  # fmt: skip
    assert [len(section.panels) for section in view.sections] == [4, 5, 6, 2]
    assert "KL to the initial policy" in [panel.title for panel in by_name["Policies while training"]]
    sent = view._to_model().model_dump_json(by_alias=True)
    assert '"xAxis":"summary:evaluation/kl/initial","yAxis":"summary:evaluation/gold/mean"' in sent
    assert "training.value.reference" in sent  # as the library writes a nested key


def test_the_dashboard_is_not_saved_without_a_key(monkeypatch, tmp_path):
    pytest.importorskip("wandb_workspaces", reason=tracking.NO_WORKSPACES)
    for name in ("HOME", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    with pytest.raises(ValueError, match="It needs an API key"):
        dashboard.main(["me", "my_project"])
    wandb.teardown()


def test_the_dashboard_needs_two_words_and_names_metrics_that_are_logged():
    with pytest.raises(ValueError, match="<user or team> <project>"):
        dashboard.main(["me"])
    source = "".join(path.read_text() for path in Path(ROOT / "dpo_ref").rglob("*.py") if path.name != "dashboard.py")
    panels = [panel for section in dashboard.SECTIONS for panel in section.panels]
    for name in {name for panel in panels if isinstance(panel, tracking.Curves) for name in panel.keys}:
        last = name.rpartition("/")[2]
        assert last in source, name
