"""A run's folder from a stranger, gone on with and evaluated: nothing in it is called, and no key is sent to where it
alone says."""

import shutil
import sys
from itertools import product

import pytest
import wandb

from dpo_ref.models.server import KEY
from dpo_ref.tracking.tracker import RunInfo
from dpo_ref.tracking.weights_and_biases import wandb_tracker
from tests.support.checkpoints import changed_state
from tests.support.command import train, typed
from tests.support.evaluate_command import evaluate
from tests.support.faults import forge_config, forge_summary, summary
from tests.support.loopback import Answering, LoopbackServer
from tests.support.quick import only
from tests.support.wandb_runs import Offline

TRAIN = ["model.path=lab:tiny", "data.num_pairs=32", "data.num_eval_pairs=4", "data.num_test_prompts=4"]
TRAIN += ["trainer.batch_size=8", "trainer.max_steps=1", "tracking=none"]
SECRET = "a-key-of-the-user-0123456789"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(*TRAIN, f"output_dir={run}").returncode == 0
    return run


@pytest.fixture
def stranger(whole, tmp_path, monkeypatch):
    """A copy of the run, beside a module that leaves a file when it is imported."""
    (tmp_path / "payload.py").write_text(f"open({str(tmp_path / 'called')!r}, 'w')\ndef run(*a, **k): pass\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    return shutil.copytree(whole, tmp_path / "run")


def refusals(run, *words):
    """What going on with a run and evaluating it say; both must refuse it in one sentence."""
    done = train(f"resume={run}", *words)
    assert done.returncode == 1
    with pytest.raises(ValueError) as refused:
        evaluate(f"policy={run}", "tracking=none", *words)
    lines = [done.stderr.removeprefix("error: "), f"{refused.value}\n"]
    assert all(line.count("\n") == 1 and "Traceback" not in line for line in lines)
    return lines


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


CONFIGURATIONS = {
    "another function in a group": ("dpo_ref.references.policies.auto", "os.system", "reference._target_='os.system'"),
    "a module that acts when imported": ("dpo_ref.objectives.pairwise.dpo", "payload.run", "objective._target_"),
    "a function of another choice": ("policies.auto", "policies.initial", "conf/reference/auto.yaml offers"),
    "a function beside the groups": ("seed: 0", "seed: 0\nhub: {_target_: payload.run}", "conf/ offers none there"),
    "a function inside an option": (
        "template_options: null",
        "template_options: {a: [{_target_: payload.run}]}",
        "model.template_options.a.0._target_",
    ),
    "arguments for a function": ("  cache: auto", "  cache: auto\n  _args_: [x]", "reference._args_"),
    "a partial call": ("  cache: auto", "  cache: auto\n  _partial_: true", "reference._partial_"),
    "a group without its function": ("  _target_: dpo_ref.lab.preferences.lab\n", "", "lacks data._target_"),
    "a key of the environment": ("path: lab:tiny", "path: ${oc.env:WANDB_API_KEY}", "model.path"),
    "an interpolation as a key": ("seed: 0", "seed: 0\n${oc.env:WANDB_API_KEY}: 1", "an interpolation"),
    "a decoded interpolation": ("path: lab:tiny", "path: ${oc.decode:'[1]'}", "an interpolation"),
    "a python tag": ("path: lab:tiny", "path: !!python/object/apply:os.system ['true']", "has a tag"),
    "a YAML bomb": ("seed: 0", "a: &a [x, x]\nb: &b [*a, *a]\nseed: 0", "has an anchor or alias"),
    "endless levels": ("seed: 0", "seed: 0\na: " + "[" * 5000 + "]" * 5000, "levels deep"),
    "a value of another type": ("  lr: 0.0003", "  lr: fast", "optim.lr of another kind"),
    "a section of another type": ("batch_size: 8", "batch_size: [8]", "trainer.batch_size of another kind"),
    "a group that is a text": (
        "reference:\n  _target_: dpo_ref.references.policies.auto\n  cache: auto\n  strength: 1.0",
        "reference: initial",
        "lacks reference._target_",
    ),
    "a key of a service": (
        "path: lab:tiny",
        "path: hf_0123456789abcdef0123",
        "model.path holds what looks like a key",
    ),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_calls_nothing(case, stranger, tmp_path, monkeypatch, tell):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    old, new, message = CONFIGURATIONS[case]
    rewrite(stranger / "config.yaml", old, new)
    resumed, evaluated = refusals(stranger)
    for line in (resumed, evaluated):
        assert str(stranger / "config.yaml") in line
        assert message in line
        assert SECRET not in line
    assert not (tmp_path / "called").exists()
    tell("let in", f"a run's config.yaml with {case}", seen=resumed, survived="nothing of it was called or read")


UNREADABLE = {
    "empty": "",
    "cut short": "model:\n  path: [lab",
    "a list": "- a\n- b\n",
    "binary": "\x00\x01",
    "huge": "a: " + "b" * 2**21,
}


@pytest.mark.parametrize("file", ["config.yaml", "summary.json"])
@pytest.mark.parametrize("case", UNREADABLE)
def test_records_of_another_form_are_told(file, case, stranger, tell):
    (stranger / file).write_text(UNREADABLE[case])
    resumed, evaluated = refusals(stranger)
    for line in (resumed, evaluated):
        assert str(stranger / file) in line
        assert "copy the folder again" in line or "only training it again brings back" in line
    tell("untidy", f"a run's {file} that is {case}", seen=resumed, survived="the folder is as it was")


SUMMARIES = {
    "a choice that climbs out of conf/": ({"choices": {"objective": "../../x"}}, "is no name of a file in conf/"),
    "an absolute choice": ({"choices": {"objective": "/etc/passwd"}}, "is no name of a file in conf/"),
    "a choice that conf/ has not": ({"choices": {"objective": "mine"}}, "conf/objective/ has no mine.yaml"),
    "no choices": ({"choices": {}}, "conf/ offers none there"),
    "choices of another type": ({"choices": ["a"]}, "is no record of a run (choices)"),
    "a seed that is a text": ({"seed": "0"}, "is no record of a run (seed)"),
    "an override that calls": ({"overrides": ["data._target_=payload.run"]}, "which is no option of a run"),
    "an override that reads the environment": ({"overrides": ["data.path=${oc.env:HOME}"]}, "no option of a run"),
    "an override that climbs out of conf/": ({"overrides": ["data=../../x"]}, "no name of a file in conf/"),
}


@pytest.mark.parametrize("case", SUMMARIES)
def test_a_summary_names_nothing_outside(case, stranger, tmp_path, tell):
    change, message = SUMMARIES[case]
    forge_summary(stranger, summary(stranger) | change)
    resumed, evaluated = refusals(stranger)
    for line in (resumed, evaluated):
        assert message in line
    assert not (tmp_path / "called").exists()
    tell("let in", f"a run's summary.json with {case}", seen=resumed, survived="nothing outside conf/ was composed")


def test_a_commit_that_is_none_is_not_suggested(stranger, tell):
    forge_summary(stranger, summary(stranger) | {"git": {"commit": "$(touch called)"}})
    rewrite(stranger / "config.yaml", "dpo_ref.lab.preferences.lab", "payload.run")
    resumed, _ = refusals(stranger)
    assert "the commit it was made with reads it" in resumed
    assert "touch" not in resumed
    tell("let in", "a run's summary.json with a shell command as its commit", seen=resumed, survived="not repeated")


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation", "checkpoints/step-00000009", "policy/README.md"])
def test_links_out_of_the_folder_are_told(name, stranger, tmp_path, tell):
    """Over which going on and evaluating would write."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("as it was")
    link = stranger / name
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "mine" if "." not in name else tmp_path / "mine" / "text")
    resumed, _ = refusals(stranger)
    assert f"{link} is a link that leads out of the run's folder" in resumed
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["text"]
    assert (tmp_path / "mine" / "text").read_text() == "as it was"
    tell("let in", f"a run whose {name} is a link to a file of the user", seen=resumed, survived="that file, unread")


def test_a_sweep_goes_on_without_the_strangers_run(stranger, tmp_path, capfd, tell):
    sweep = tmp_path / "sweep"
    shutil.copytree(stranger, sweep / "0_mine")
    shutil.copytree(stranger, sweep / "1_theirs")
    rewrite(sweep / "1_theirs" / "config.yaml", "dpo_ref.references.policies.auto", "payload.run")
    quick = ["tracking=none", "generation.max_new_tokens=4", "generation.samples_per_prompt=1", "diagnostic=none"]
    with pytest.raises(ValueError, match="not evaluated: 1_theirs"):
        evaluate(f"sweep={sweep}", *quick)
    err = capfd.readouterr().err
    (line,) = [line for line in err.splitlines() if "1_theirs could not be evaluated" in line]
    assert "reference._target_='payload.run'" in line
    assert "Traceback" not in err
    assert (sweep / "0_mine" / "evaluation" / "evaluation.json").is_file()
    assert not (tmp_path / "called").exists()
    tell("let in", "a sweep with one such run", seen=line, survived="nothing was called; the other was evaluated")


# --- servers


class Listener(LoopbackServer):
    """Remembers the keys that it was sent, and sends whoever asks elsewhere."""

    def __init__(self, elsewhere=None):
        self.sent, self.elsewhere = [], elsewhere
        super().__init__(Listening)


class Listening(Answering):
    server: Listener  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self):
        self.server.sent.append(self.headers.get("Authorization"))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.elsewhere:
            return self.say(307, {}, Location=self.server.elsewhere)
        self.say(404, {"message": "no such model"})

    do_GET = do_POST


@pytest.fixture
def listener(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Listener() as server:
        yield server


def served(run, url):
    """The run, as if it had been trained against the model behind an address."""
    text = (run / "config.yaml").read_text()
    start, end = text.index("reference:\n"), text.index("optim:\n")
    options = f"url: {url}\n  model: big\n  tokenizer: lab:tiny\n  retries: 0\n"
    reference = f"reference:\n  _target_: dpo_ref.references.served.served\n  {options}"
    forge_config(run, text[:start] + reference + text[end:])
    record = summary(run)
    forge_summary(run, record | {"choices": record["choices"] | {"reference": "served"}})
    shutil.rmtree(run / "checkpoints")  # which know the run's configuration


def test_a_key_goes_to_no_address_of_the_folder(stranger, listener, monkeypatch, tell):
    monkeypatch.setenv(KEY, SECRET)
    served(stranger, listener.url)
    resumed, evaluated = refusals(stranger)
    for line in (resumed, evaluated):
        assert f"reference.url={listener.url}" in line
        assert f"the key in {KEY} would be sent there" in line
        assert f"append trust={listener.url}" in line
    assert listener.sent == []
    tell("let in", "a run whose reference.url is a stranger's", seen=resumed, survived="no connection was opened")


def test_without_a_key_texts_go_to_no_other_machine(stranger, monkeypatch, tell):
    monkeypatch.delenv(KEY, raising=False)
    served(stranger, "http://192.0.2.1:8000/v1")
    resumed, _ = refusals(stranger)
    assert "texts would be sent there" in resumed
    assert "append trust=http://192.0.2.1:8000/v1" in resumed
    tell("let in", "the same without a key, the server on another machine", seen=resumed, survived="nothing was sent")


RESUMED, EVALUATED = "train.py resume={}", "evaluate.py policy={}"
CONFIRMED = list(product((RESUMED, EVALUATED), ("trust={}", "reference.url={}")))


@pytest.mark.parametrize(
    ("command", "confirmation"), only(CONFIRMED, (RESUMED, "trust={}"), (EVALUATED, "reference.url={}"))
)
def test_an_address_that_is_typed_is_asked(command, confirmation, stranger, listener, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    served(stranger, listener.url)
    words = command.format(stranger).split()
    done = typed(*words, "tracking=none", confirmation.format(listener.url))
    assert "no model big" in done.stderr + done.stdout or "was not found (404)" in done.stderr
    assert set(listener.sent) == {f"Bearer {SECRET}"}
    assert SECRET not in done.stdout + done.stderr


def test_an_address_that_the_run_has_not_is_refused(stranger, listener, tell):
    served(stranger, listener.url)
    other = "trust=http://127.0.0.1:9/v1"
    done = train(f"resume={stranger}", other)
    assert f"{other} has no effect" in done.stderr
    assert listener.sent == []
    tell("let in", "another address confirmed than the run has", seen=done.stderr, survived="nothing was sent")


def test_on_this_machine_without_a_key_nothing_is_typed(stranger, listener, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    served(stranger, listener.url)
    done = train(f"resume={stranger}")
    assert "was not found (404)" in done.stderr
    assert set(listener.sent) == {None}


def test_a_variable_of_the_folder_is_not_sent(stranger, monkeypatch, tell):
    """The judge that rewards on-policy rounds names the variable of its key."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    rewrite(
        stranger / "config.yaml", "template_options: null", "template_options: {key_variable: AWS_SECRET_ACCESS_KEY}"
    )
    resumed, _ = refusals(stranger)
    assert "append trust=AWS_SECRET_ACCESS_KEY" in resumed
    assert SECRET not in resumed
    tell("let in", "a run that names another variable as its key's", seen=resumed, survived="the key was not sent")


def test_a_redirect_takes_no_key_along(stranger, listener, monkeypatch, tell):
    monkeypatch.setenv(KEY, SECRET)
    with Listener() as other:
        listener.elsewhere = f"{other.url}/completions"
        served(stranger, listener.url)
        done = train(f"resume={stranger}", f"trust={listener.url}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert listener.sent
    assert other.sent == []
    tell("service", "a server that redirects to another host", seen=done.stderr, survived="the key stayed with it")


def test_settings_of_wandb_in_the_folder_are_not_read(tmp_path, tell):
    wandb.teardown()  # which reads settings once
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nbase_url = http://127.0.0.1:9\nentity = stranger\n")
    wandb_tracker(RunInfo(tmp_path, {}, "run", None, "train", resume=True), mode="offline").finish(0)
    tracked = Offline(tmp_path)
    assert tracked.run.project == "dpo_ref"
    assert tracked.run.entity == ""
    assert b"stranger" not in tracked.bytes
    tell(
        "let in",
        "a run folder whose wandb/settings name a server and a team",
        seen="nothing",
        survived="the user's own settings are taken, the folder's are not read",
    )


def test_what_is_typed_again_says_the_same(stranger):
    """A word of the run's own is no change of it."""
    assert train(f"resume={stranger}", "reference=auto", "model.path=lab:tiny", "trainer.max_steps=2").returncode == 0
    record = summary(stranger)
    assert record["status"] == "completed"
    assert record["steps"] == 2


STATES = {
    "no configuration": ({"configuration": None}, "is not the configuration of a run"),
    "a configuration with aliases": ({"configuration": "a: &a [1]\nb: *a"}, "has an anchor or alias"),
    "a configuration that calls": ({"configuration": "a: !!python/object/apply:os.system [ls]"}, "has a tag"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_checkpoint_of_another_form_is_told(case, stranger, tell):
    change, message = STATES[case]
    changed_state(stranger, **change)
    done = train(f"resume={stranger}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert message in line
    tell("let in", f"a run whose checkpoint says {case}", seen=line, survived="nothing was called")
