"""Commands that are killed and stopped at exact moments; for the tests of faults."""

import atexit
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from dpo_ref.cli.saved_run import SEAL, with_digest
from dpo_ref.files.digests import DIGEST, sealed
from tests.support.command import ROOT, Done, forked, train
from tests.support.evaluate_command import evaluate

SMALL = ["model.path=lab:tiny", "data.num_pairs=32", "data.num_eval_pairs=8", "data.num_test_prompts=4"]
SMALL += ["trainer.batch_size=8", "tracking=none"]


Entry = Callable[[Path, tuple[str, ...], Callable[[], object]], None]


class Typed:
    """A command in a process of its own, in a folder of its own, whose output lies beside that."""

    def __init__(
        self, folder: Path, *arguments: str, before: Callable[[], object] = lambda: None, enter: Entry | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("out", "err"):
            (folder / name).touch()
        self.folder = folder
        self.process = forked(folder, enter or _type_in, folder, arguments, before)
        atexit.register(self.process.kill)  # a test that fails may leave it stopped, and would be waited for

    def send(self, signum: int) -> None:
        os.kill(self.process.pid, signum)

    def send_if_alive(self, signum: int) -> None:
        """For whoever does not know whether it has ended meanwhile; it is not waited for yet, so its id is its own."""
        if self.process.exitcode is None:
            self.send(signum)

    def end(self) -> Done:
        self.process.join(timeout=120)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        return Done(self.process.exitcode, (self.folder / "out").read_text(), (self.folder / "err").read_text())

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it while the command runs."""
        deadline = time.monotonic() + 60
        while not condition():
            assert self.process.is_alive(), (self.folder / "err").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)


def _type_in(folder: Path, arguments: tuple[str, ...], before: Callable[[], object]) -> None:
    os.chdir(folder)
    sys.argv = list(arguments)
    GlobalHydra.instance().clear()
    before()
    runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def run_composed(folder: Path, arguments: tuple[str, ...], before: Callable[[], object]) -> None:
    """What the command does once Hydra has composed its configuration, which takes as long as a small run."""
    before()
    script, *words = arguments
    if script == "evaluate.py":
        return evaluate(*words)
    done = train(*words)
    print(done.stdout)
    print(done.stderr, file=sys.stderr)
    sys.exit(done.returncode)


def killed_at(folder: Path, moves: int) -> Callable[[], None]:
    """Makes a process kill itself in place of its n-th move of a whole file to its place in a folder."""

    def prepare():
        move, done = os.replace, []

        def replace(source, target):
            if Path(target).parent == folder:
                done.append(target)
            if len(done) == moves:
                os.kill(os.getpid(), signal.SIGKILL)
            move(source, target)

        os.replace = replace

    return prepare


def steps(run: Path) -> int:
    """How many lines a run has measured."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def summary(run: Path) -> dict:
    """What a run's record says."""
    content = json.loads((run / "summary.json").read_text())
    return {key: value for key, value in content.items() if key != DIGEST}


def forge_summary(run: Path, content: dict) -> None:
    """A record in a run's folder, with the digest that whoever writes one can make."""
    (run / "summary.json").write_text(json.dumps(sealed(content)))


def forge_config(run: Path, text: str) -> None:
    """The same for a configuration."""
    lines = (line for line in text.splitlines(keepends=True) if not line.startswith(SEAL))
    (run / "config.yaml").write_text(with_digest("".join(lines)))


def same_weights(run: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "policy" / "model.safetensors") for folder in (run, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
