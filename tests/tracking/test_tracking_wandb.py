"""Weights & Biases: offline runs are read back from disk; a failing service neither ends a run nor makes it wait."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import wandb

from dpo_ref.tracking.tracker import NoTracker, RunInfo, Tracker
from dpo_ref.tracking.weights_and_biases import wandb_tracker
from tests.support.wandb_runs import Offline, service

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
KEY = "0123456789" * 4  # has the form of a key and is none
CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture(autouse=True)
def own_wandb(tmp_path, monkeypatch):
    """No settings, keys or folders but the test's own, and a background process that ends with it."""
    wandb.teardown()  # first: the address of what it ends would be put back into the environment after the test
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    with suppress(ConnectionError):  # where the test killed it
        wandb.teardown()


@pytest.fixture
def info(tmp_path):
    directory = tmp_path / "a run"
    directory.mkdir()
    config = {"beta": 0.02, "objective": {"label_smoothing": 0.25}, "data": {"path": "pairs.jsonl"}}
    return RunInfo(directory, config, name="2026_beta=0.02", group="sweep_1", job_type="train", resume=False)


def resumed(info: RunInfo) -> RunInfo:
    return RunInfo(info.directory, info.config, info.name, info.group, info.job_type, resume=True)


def test_an_offline_run_holds_what_was_logged(info, capsys):
    tracker = wandb_tracker(info, project="my_project", tags=["pilot", "cpu"])
    assert isinstance(tracker, Tracker)
    tracker.log({"eval/loss": 0.7}, step=0)
    for step in (1, 2, 3):
        tracker.log({"train/loss": 1 / step, "train/lr": 1e-7}, step=step)
    tracker.log({"eval/loss": 0.4}, step=3)
    tracker.log({"train/loss": float("nan")}, step=2)
    tracker.table("samples", ["prompt", "tokens", "reward"], [["p", [1, 2], 0.5], ["q", None, 1.0]], step=3)
    tracker.histogram("margins", [0.0, 1.0, 1.0, float("inf"), float("nan")], step=3)
    tracker.histogram("nothing", [float("nan")], step=3)
    tracker.summary({"gold/reward": 0.875, "status": "completed"})
    tracker.finish(0)
    tracker.finish(0)

    offline = Offline(info.directory)
    assert (offline.run.project, offline.run.run_group, offline.run.job_type) == ("my_project", "sweep_1", "train")
    assert (offline.run.display_name, list(offline.run.tags)) == ("2026_beta=0.02", ["pilot", "cpu"])
    assert {key: offline.config[key] for key in info.config} == info.config
    curve = [(row["step"], row["train/loss"]) for row in offline.history if "train/loss" in row]
    assert curve[:3] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert curve[3][0] == 2  # late, and not dropped
    assert [(row["step"], row["eval/loss"]) for row in offline.history if "eval/loss" in row] == [(0, 0.7), (3, 0.4)]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in offline.metrics)
    (drawn,) = (row for row in offline.history if "margins._type" in row)
    assert sum(drawn["margins.values"]) == 3
    assert not any("nothing" in key for row in offline.history for key in row)
    assert (offline.summary["gold/reward"], offline.summary["status"]) == (0.875, "completed")
    assert offline.exit_codes == [0]

    (table,) = (row for row in offline.history if "samples._type" in row)
    assert (table["step"], table["samples.nrows"], table["samples._type"]) == (3, 2, "table-file")
    stored = json.loads((offline.files[0].parent / "files" / table["samples.path"]).read_text())
    assert stored["columns"] == ["prompt", "tokens", "reward"]
    assert stored["data"] == [["p", "[1, 2]", 0.5], ["q", None, 1.0]]

    assert tracker.url is None
    assert tracker.location == str(info.directory / "wandb")
    (line,) = capsys.readouterr().out.splitlines()
    assert "offline, because no API key is configured" in line
    assert line.endswith(f"wandb sync '{info.directory}/wandb'/offline-run-*")


def test_a_resumed_run_keeps_its_id_and_another_job_in_its_folder_gets_its_own(info):
    for tracked, step in ((info, 1), (resumed(info), 2)):
        tracker = wandb_tracker(tracked)
        tracker.log({"train/loss": 1.0 / step}, step=step)
        tracker.finish(1)
        time.sleep(1.1)  # wandb names the pieces of a run by the second
    evaluation = RunInfo(info.directory, {}, "evaluation", info.group, "evaluate", resume=True)
    wandb_tracker(evaluation).finish(0)

    train_id, other_id = ((info.directory / f"wandb_id_{kind}").read_text() for kind in ("train", "evaluate"))
    assert train_id != other_id
    offline = Offline(info.directory, f"offline-run-*-{train_id}")
    assert len(offline.files) == 2
    assert offline.run.resume
    assert [row["step"] for row in offline.history] == [1, 2]
    assert offline.exit_codes == [1, 1]
    wandb_tracker(info).finish(0)  # a new run in the folder is not that run
    assert (info.directory / "wandb_id_train").read_text() != train_id


def test_pictures_and_files_go_along(info, tmp_path):
    from matplotlib.figure import Figure

    Figure(figsize=(1, 2)).savefig(tmp_path / "plot.png")
    (tmp_path / "report.html").write_text("<p>report</p>")
    tracker = wandb_tracker(info)
    tracker.image("gold_by_beta", tmp_path / "plot.png")
    tracker.file(tmp_path / "report.html")
    tracker.finish(0)
    files = Offline(info.directory).files[0].parent / "files"
    assert (files / "report.html").read_text() == "<p>report</p>"
    assert [path.suffix for path in (files / "media" / "images").iterdir()] == [".png"]


def test_credentials_are_not_written_even_if_given_on_the_command_line(tmp_path):
    """In a process of its own: wandb stores the arguments of the process among a run's metadata."""
    (tmp_path / "run").mkdir()
    code = f"""
from pathlib import Path
from dpo_ref.tracking.tracker import RunInfo
from dpo_ref.tracking.weights_and_biases import wandb_tracker
secret = "a-private-word"
config = {{"judge": {{"api_key": secret, "model": "m"}}}}
run = RunInfo(Path({str(tmp_path / "run")!r}), config, f"x_judge.api_key={{secret}}", secret, "train", False)
wandb_tracker(run).finish(0)
"""
    command = [sys.executable, "-c", code, "judge.api_key=a-private-word"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    offline = Offline(tmp_path / "run")
    assert offline.config["judge"] == {"api_key": "***", "model": "m"}
    assert offline.run.display_name == "x_judge.api_key=***"
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"a-private-word" not in written


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mode": "online"}, "wandb login"), ({"project": "a/b"}, "tracking.project"), ({"tags": [""]}, "tracking.tags"),
     ({"timeout": 0}, "tracking.timeout")],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(info, options, message):
    with pytest.raises(ValueError, match=message):
        wandb_tracker(info, **options)
    assert list(info.directory.iterdir()) == []


def test_a_key_of_the_wrong_form_is_named(info, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ValueError, match="API key is of no use"):
        wandb_tracker(info, mode="online")
    wandb_tracker(info).finish(0)
    assert "offline, because the configured API key is of no use" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["environment", "netrc"])
def test_auto_goes_online_when_a_key_is_configured(info, monkeypatch, capsys, where):
    with service() as (url, _):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        if where == "environment":
            monkeypatch.setenv("WANDB_API_KEY", KEY)
        else:
            netrc = Path(os.environ["NETRC"])
            netrc.write_text(f"machine {url.removeprefix('http://')} login user password {KEY}\n")
            netrc.chmod(0o600)
        tracker = wandb_tracker(info, timeout=10)
        assert tracker.location == tracker.url
        assert tracker.url is not None
        assert tracker.url.startswith(url)
        tracker.finish(0)
    assert capsys.readouterr().out == f"W&B: online at {tracker.url}\n"


@pytest.mark.parametrize(("value", "kind"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "off")])
def test_the_users_wandb_mode_is_respected(info, monkeypatch, capsys, value, kind):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", CLOSED)
    monkeypatch.setenv("WANDB_MODE", value)
    tracker = wandb_tracker(info)
    tracker.finish(0)
    assert capsys.readouterr().out.startswith(f"W&B: {kind}, because WANDB_MODE")
    assert isinstance(tracker, NoTracker) is (kind == "off")


def test_no_network_leaves_the_run_offline_under_its_id_within_the_timeout(info, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", CLOSED)
    start = time.monotonic()
    tracker = wandb_tracker(info, timeout=2)
    tracker.log({"train/loss": 0.5}, step=1)
    tracker.finish(0)
    assert time.monotonic() - start < 10
    offline = Offline(info.directory)
    assert offline.history[0]["train/loss"] == 0.5
    assert offline.run.run_id == (info.directory / "wandb_id_train").read_text()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("W&B: offline, because the service did not answer")


def test_a_service_that_vanishes_in_mid_run_costs_no_more_than_the_timeout(info, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with service() as (url, requests):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        tracker = wandb_tracker(info, timeout=3)
        tracker.log({"train/loss": 0.5}, step=1)
    start = time.monotonic()
    tracker.log({"train/loss": 0.25}, step=2)
    tracker.table("samples", ["output"], [["text"]], step=2)
    assert time.monotonic() - start < 1  # logging waits for nobody
    tracker.finish(0)
    assert time.monotonic() - start < 10
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2
    assert "later: wandb sync --include-online" in out[1]
    kept = Offline(info.directory, "run-*").history
    assert [(row["step"], row.get("train/loss")) for row in kept] == [(1, 0.5), (2, 0.25), (2, None)]
    assert any("upsertBucket" in request for request in requests)


@pytest.mark.parametrize("answer", [b"not json", b'{"errors": [{"message": "permission denied"}]}'])
def test_a_service_that_answers_nonsense_leaves_the_run_offline(info, monkeypatch, capsys, answer):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with service(lambda data: answer) as (url, _):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        tracker = wandb_tracker(info, timeout=3)
        tracker.log({"train/loss": 0.5}, step=1)
        tracker.finish(0)
    assert "W&B: offline, because the service did not answer" in capsys.readouterr().out
    assert Offline(info.directory).history[0]["train/loss"] == 0.5


def test_a_reply_that_crashes_wandb_itself_does_not_reach_the_run(info, monkeypatch, capsys):
    """wandb 0.31's background process takes an empty reply for a started run and dies of it."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with service(lambda data: b'{"data": {}}') as (url, _):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        tracker = wandb_tracker(info, timeout=3)
        tracker.log({"train/loss": 0.5}, step=1)
        tracker.finish(0)
    assert tracker.location == str(info.directory / "wandb")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_logging_that_fails_is_reported_once_and_the_run_goes_on(info, capfd):
    """wandb's background process is killed under a run."""
    tracker = wandb_tracker(info)
    (process,) = children_named("wandb-core")
    os.kill(process, 9)
    time.sleep(0.3)
    tracker.log({"train/loss": 0.5}, step=1)
    tracker.log({"train/loss": 0.25}, step=2)
    tracker.table("samples", ["output"], [["text"]], step=2)
    tracker.image("missing", info.directory / "none.png")
    tracker.summary({"gold/reward": 0.5})
    tracker.finish(0)
    out, err = capfd.readouterr()
    assert [line for line in out.splitlines() if "failed" in line] == [out.splitlines()[1]]
    assert len(out.splitlines()) == 2
    assert "Traceback" not in err


def children_named(name: str) -> list[int]:
    """Process ids of this process's children whose command names `name`."""
    pids = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in pids if name in Path(f"/proc/{pid}/cmdline").read_text()]


def test_opening_costs_a_second_and_imports_nothing_before():
    """`--help` imports every component: wandb and rich must not come along."""
    code = "import sys; from dpo_ref.tracking import weights_and_biases, tracker, terminal, run_record; "
    code += "sys.exit(bool({'wandb', 'rich', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
