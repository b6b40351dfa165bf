"""Keys, wherever they are put: typed, they are refused before anything is written; in the environment, no file and no
message holds them, whatever answers with them."""

import base64
import json
import os
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import wandb

from dpo_ref.models.server import KEY
from dpo_ref.tracking.redaction import hide
from tests.support.command import started, train, typed
from tests.support.evaluate_command import QUICK, evaluate
from tests.support.loopback import Answering, LoopbackServer

TRAIN = ["model.path=lab:tiny", "data.num_pairs=32", "data.num_eval_pairs=4", "data.num_test_prompts=4"]
TRAIN += ["trainer.batch_size=8", "trainer.max_steps=1"]
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_aFakeTokenOfNobody0123456789",
    "OPENAI_API_KEY": "sk-a-fake+key/of=nobody-0123456789",
    KEY: "served-key-of-nobody/0123456789",
}


def forms(secret):
    """A secret, and how it may be written so that anybody reads it again."""
    texts = [secret, quote(secret, safe=""), secret.encode().hex()]
    for before in ("", "a", "ab"):
        texts.append(base64.b64encode((before + secret).encode()).decode()[4:-6])
    return {text.encode() for text in texts}


HELD = set().union(*map(forms, SECRETS.values()))


def leaks(folder):
    """Files below a folder, and their names, that hold a secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    contents = [(path, str(path).encode() + path.read_bytes()) for path in files]
    return [path for path, content in contents if any(text in content for text in HELD)]


@pytest.fixture
def keys(monkeypatch):
    """An environment that holds keys, and no settings of W&B but these."""
    wandb.teardown()  # first: the address of what it ends would be put back into the environment after the test
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield SECRETS
    wandb.teardown()


TYPED = {
    "an option of the tracker": "+tracking.api_key={WANDB_API_KEY}",
    "the project": "tracking.project={WANDB_API_KEY}",
    "a tag": "tracking.tags=[pilot,{HF_TOKEN}]",
    "a user in an address": "reference.url=http://me:{OPENAI_API_KEY}@host/v1",
    "a query": "reference.url=http://host/v1?api_key=hunter22",
    "an encoded query": "reference.url=http://host/v1?api%5Fkey=hunter22",
    "a mapping": "judge.request={{headers: {{Authorization: hunter22}}}}",
    "a key of any name": "+judge.key=hunter22",
    "a token of the hub": "+hub.token={HF_TOKEN}",
    "the name of the key's variable": "judge.key_variable={OPENAI_API_KEY}",
    "an interpolation": "tracking.project=${{oc.env:WANDB_API_KEY}}",
    "a path": "model.path=some/{OPENAI_API_KEY}",
    "no option": "{HF_TOKEN}",
}


def refusal(folder, *command):
    """What a command with a key says, which writes nothing."""
    done = typed(*command)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert any(remedy in done.stderr for remedy in ("wandb login", "hf auth login", "environment"))
    assert not any(text in (done.stdout + done.stderr).encode() for text in (*HELD, b"hunter22"))
    assert list(folder.iterdir()) == []
    return done.stderr


@pytest.mark.parametrize("case", TYPED)
def test_typed_keys_are_refused(case, keys, tmp_path, tell):
    """Of a multirun, before Hydra writes the command line into its folder."""
    word = TYPED[case].format(**keys)
    seen = refusal(tmp_path, "train.py", "-m", f"output_dir={tmp_path / 'run'}", "seed=0,1", word)
    tell("let in", f"a key on the command line: {case}", seen=seen, survived="no file was written")


ENTRY_POINTS = {
    "train": ["train.py"],
    "evaluate": ["evaluate.py", "policy=lab:tiny"],
    "sweep": ["evaluate.py", "sweep=nowhere"],
    "winrates": ["evaluate.py", "stage=winrate", "annotations=nowhere"],
}


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_every_entry_point_refuses_typed_keys(entry, keys, tmp_path):
    words = [*ENTRY_POINTS[entry], f"output_dir={tmp_path / 'run'}"]
    for case in ("a tag", "a query"):
        refusal(tmp_path, *words, TYPED[case].format(**keys))


NO_KEYS = [
    "objective=dpo", "model.revision=0123456789abcdef0123456789abcdef01234568", "data.max_length=512",
    "data.special_tokens_in_text=text", "judge.key_variable=OPENAI_API_KEY", "reference.url=http://host:8000/v1",
    "model.template_options={eos_token: '</s>'}", "judge.max_tokens=5", "data.path=/home/me/token/pairs.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("word", NO_KEYS)
def test_other_words_pass(word, keys):
    from dpo_ref.tracking.redaction import refuse_typed_credentials

    refuse_typed_credentials([word])


class Echo(Answering):
    """Refuses, and sends back every key it got, however written."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        header = self.headers.get("Authorization", "")
        key = header.rpartition(" ")[2]
        if header.startswith("Basic"):
            key = base64.b64decode(key).decode().rpartition(":")[2]
        spelled = "".join(f"\\u{ord(letter):04x}" for letter in key)
        words = [key, quote(key, safe=""), base64.b64encode(header.encode()).decode(), key.encode().hex()]
        error = f'{{"message": {json.dumps(" ".join(words))[:-1]} {spelled}"}}'
        self.say(400, f'{{"error": {error}, "errors": [{error}]}}'.encode())

    do_GET = do_POST


@pytest.fixture
def echo():
    with LoopbackServer(Echo) as server:
        yield server


SERVED = ["reference=served", "reference.model=big", "reference.tokenizer=lab:tiny", "reference.retries=0"]


def test_no_file_and_no_message_holds_a_key(keys, echo, tmp_path, capfd, monkeypatch, tell):
    """Of runs that end and fail, and of their evaluations; every server answers with the keys it gets."""
    run, url = tmp_path / "run", f"reference.url={echo.url}"
    assert train(*TRAIN, "tracking.mode=offline", f"output_dir={run}").returncode == 0
    served = train(*TRAIN, *SERVED, url, "tracking=none", f"output_dir={tmp_path / 'failed'}")
    assert served.returncode == 1
    assert "***" in served.stderr
    judge = ["judge=tldr", "judge.model=big", f"judge.base_url={echo.url}", "judge.retries=0"]
    with pytest.raises(ValueError, match=r"\*\*\*") as judged:
        evaluate(f"policy={run}", *QUICK, *judge)
    printed = capfd.readouterr()
    assert not any(text in (printed.out + printed.err + served.stderr + str(judged.value)).encode() for text in HELD)
    assert leaks(tmp_path) == []
    tell("service", "servers that answer with the key they got, in any writing", seen=served.stderr,
         survived="no file of runs that ended and failed holds a key")  # fmt: skip


def titles(process: int) -> list[bytes]:
    """The command lines of a process and of all that it started, as `ps` shows them to everybody."""
    folder = Path("/proc") / str(process)
    title = (folder / "cmdline").read_bytes()
    children = [child for path in folder.glob("task/*/children") for child in path.read_text().split()]
    return [title, *(line for child in children for line in titles(int(child)))]


@pytest.mark.slow
def test_a_killed_run_holds_no_key(keys, tmp_path, tell):
    (tmp_path / "killed").mkdir()
    killed = tmp_path / "killed" / "run"
    process = started(tmp_path / "killed", "train.py", *TRAIN, "trainer.max_steps=500", "trainer.epochs=999",
                      "tracking.mode=offline", f"output_dir={killed}")  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (killed / "metrics.jsonl").exists():
        time.sleep(0.02)
    shown = titles(process.pid)
    process.kill()
    process.join()
    assert any(b"wandb-core" in title for title in shown)
    assert not any(text in title for text in HELD for title in shown)
    assert (killed / "config.yaml").is_file()
    assert leaks(tmp_path) == []
    tell(
        "killed",
        "a run with keys in its environment, killed while it trains",
        seen="nothing",
        survived="no key in a file, nor in the title of a process that it had started (W&B's own among them)",
    )


def test_a_tracking_service_that_sends_the_key_back(keys, echo, tmp_path, monkeypatch, tell):
    """W&B's own logs hold what the service answers."""
    monkeypatch.setenv("WANDB_BASE_URL", echo.url.removesuffix("/v1"))
    done = typed("train.py", *TRAIN, "tracking.timeout=4", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert not any(text in (done.stdout + done.stderr).encode() for text in HELD)
    assert list(tmp_path.glob("run/wandb/*/logs/debug-internal.log"))
    assert leaks(tmp_path) == []
    (line,) = [line for line in done.stdout.splitlines() if "W&B: offline" in line]
    tell("service", "W&B's service that sends its key back", seen=line, survived="the run; the key is in no log")


def test_hiding_costs_little():
    """An answer of 10 MB without a key in it."""
    answer = json.dumps([-1.234567] * 1_000_000)
    begin = time.perf_counter()
    assert hide(answer, SECRETS["OPENAI_API_KEY"]) == answer
    assert time.perf_counter() - begin < 1
