"""Processes beside the command that die in the middle of their work: the copy that writes texts, a judge, a served
reference. Told, what was computed is kept, and the same command goes on."""

import json
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_ref.lab import models as lab_models
from dpo_ref.references import table
from tests.faults.test_full_disks import evaluates, one_sentence, prepared, typed_in, with_cache
from tests.faults.test_kills import answers, end_of_run, records_of, run_of, tables
from tests.support.completions_server import CompletionsServer
from tests.support.faults import SMALL, Typed
from tests.support.judge_server import JudgeServer
from tests.support.loopback import surroundings  # noqa: F401
from tests.support.pictures import undrawn

pytestmark = pytest.mark.slow  # `make faults` runs it


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def serve(make, port):
    with make(port):
        threading.Event().wait()


def started_server(make, port):
    """A server in a process of its own, once it listens."""
    process = get_context("fork").Process(target=serve, args=(make, port), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as asking:
            if asking.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.01)
    raise TimeoutError(port)


@contextmanager
def serving(make, port):
    process = started_server(make, port)
    try:
        yield
    finally:
        process.kill()
        process.join()


def dies_while(make, port, begun, folder, words):
    """Kill the server of a command once that has begun with it; the command's end."""
    server = started_server(make, port)
    shell = folder.with_name(f"{folder.name} and a server that dies")
    command = Typed(shell, *words, before=lambda: os.environ.update(DPO_REF_CACHE=str(folder / "cache")))
    command.until(begun)
    server.kill()
    server.join()
    return command


# --- a judge


def judge_at(port):
    return JudgeServer(wait=0.05, port=port)


def asks(port, retries):
    base = f"judge.base_url=http://127.0.0.1:{port}/v1"
    options = ["judge.model=big", base, "judge.max_workers=2", f"judge.retries={retries}"]
    return evaluates("diagnostic=none", "judge=alpaca_eval", *options)


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-real-key-0123456789")


def judged_elsewhere(trained, tmp_path):
    """The records of an evaluation whose judge did not die."""
    port, other = free_port(), prepared(tmp_path / "other", trained)
    with serving(judge_at, port):
        assert typed_in(other, asks(port, 1)(other)).returncode == 0
    return records_of(other)


def test_a_judge_that_dies_and_is_started_again_later(trained, key, tmp_path, tell):
    folder, port = prepared(tmp_path / "here", trained), free_port()
    words = asks(port, 1)(folder)
    with undrawn():
        stopped = dies_while(judge_at, port, lambda: answers(folder) > 4, folder, words).end()
        (seen,) = [line for line in (stopped.stdout + stopped.stderr).splitlines() if "pairs are judged, then" in line]
        assert "type the same command again" in seen
        assert stopped.returncode == 1
        assert "Traceback" not in stopped.stderr
        kept = answers(folder)
        assert kept > 4
        with serving(judge_at, port):
            done = typed_in(folder, words)
        assert done.returncode == 0, done
        (asked,) = [line for line in done.stdout.splitlines() if "questions asked, the others known" in line]
        assert f" {answers(folder) - kept} questions asked" in asked
        assert records_of(folder) == judged_elsewhere(trained, tmp_path)
    tell("service", "a judge's process killed while it judges", seen=seen, survived=f"its answers: {asked}; equal")


def test_a_judge_that_dies_and_comes_back_meanwhile(trained, key, tmp_path, tell):
    folder, port = prepared(tmp_path / "here", trained), free_port()
    with undrawn():
        command = dies_while(judge_at, port, lambda: answers(folder) > 4, folder, asks(port, 14)(folder))
        time.sleep(0.3)
        with serving(judge_at, port):
            done = command.end()
        assert done.returncode == 0, done
        assert records_of(folder) == judged_elsewhere(trained, tmp_path)
    (seen,) = [line for line in done.stdout.splitlines() if "questions asked, the others known" in line]
    tell("service", "a judge's process killed, and another started in its place", seen=seen, survived="all verdicts")


# --- a reference behind a server


def reference_at(port):
    policy = AutoModelForCausalLM.from_pretrained(lab_models.locate("lab:tiny"), dtype=torch.float32)
    return CompletionsServer(policy, port=port)


def test_a_served_reference_that_dies_in_the_middle_of_the_pass(tmp_path, monkeypatch, tell):
    monkeypatch.setattr(table, "WINDOW", 2)
    monkeypatch.setattr(table, "SHARD_TOKENS", 1)
    folder, other, port = with_cache(tmp_path / "here"), with_cache(tmp_path / "other"), free_port()
    options = [*SMALL, "reference=served", f"reference.url=http://127.0.0.1:{port}/v1", "reference.model=big"]
    options += ["reference.tokenizer=lab:tiny", "reference.retries=1", "reference.batch_size=1"]
    words = ["train.py", *options, f"output_dir={run_of(folder)}"]
    seen = one_sentence(dies_while(reference_at, port, lambda: len(tables(folder)) > 2, folder, words).end())
    assert "everything scored so far is kept: start the same command again when it is up" in seen
    kept = {path.name for path in tables(folder) if path.suffix == ".safetensors"}
    assert len(kept) > 2
    with serving(reference_at, port):
        done = typed_in(folder, words)
        assert done.returncode == 0, done
        assert kept < {path.name for path in tables(folder)}
        assert typed_in(other, ["train.py", *options, f"output_dir={run_of(other)}"]).returncode == 0
    assert end_of_run(run_of(folder)) == end_of_run(run_of(other))
    tell("service", "a served reference's process killed in the pass", seen=seen, survived="every row; equal weights")


# --- the copy of the command that writes texts


def copies(process):
    """Its children that are copies of it."""
    own = Path(f"/proc/{process}/cmdline").read_bytes()
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children if Path(f"/proc/{child}/cmdline").read_bytes() == own]


def kill_copies(command, most):
    """Kill the first copies that the command makes of itself; how many were killed."""
    killed = set()
    while command.process.exitcode is None and len(killed) < most:
        try:
            for copy in set(copies(command.process.pid)) - killed:
                os.kill(copy, signal.SIGKILL)
                killed.add(copy)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return len(killed)


@pytest.fixture
def many_rows(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Name {i}.", "chosen": f"It is {i}, of course.", "rejected": f"Not {i}."} for i in range(4000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["data=jsonl", f"data.path={path}", "model.path=lab:tiny", "tracking=none", "trainer.batch_size=4"]
    return [*options, "reference=none", "objective=simpo", "trainer.max_steps=2"]


@pytest.mark.parametrize("most", [1, 1000])
def test_the_copy_that_writes_texts_is_killed(most, many_rows, tmp_path, tell):
    folder, other = with_cache(tmp_path / "here"), with_cache(tmp_path / "other")
    words = ["train.py", *many_rows, f"output_dir={run_of(folder)}"]
    environment = {"DPO_REF_CACHE": str(folder / "cache")}
    command = Typed(tmp_path / "shell", *words, before=lambda: os.environ.update(environment))
    killed = kill_copies(command, most)
    done, seen = command.end(), f"{killed} killed, and done again without a word"
    assert killed >= min(most, 2)
    if most > 1:
        seen = one_sentence(done)
        assert "row " in seen
        assert "the process that did it was ended by SIGKILL" in seen
        done = typed_in(folder, words)
    assert done.returncode == 0, done
    assert typed_in(other, ["train.py", *many_rows, f"output_dir={run_of(other)}"]).returncode == 0
    assert end_of_run(run_of(folder)) == end_of_run(run_of(other))
    fault = "the first copy of the command that writes texts killed" if most == 1 else "each of them killed"
    tell("killed", f"{fault}, as by a system without memory", seen=seen, survived="typed again: equal weights")
