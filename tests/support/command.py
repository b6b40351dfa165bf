"""`train.py` as a user types it: in a process of its own, or composed and run in this one.

A process of its own is a copy of this one, which has imported everything: that saves three seconds of imports.
"""

import copy
import io
import os
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from dpo_ref.cli import command_line, resolve, schemas
from dpo_ref.cli.run_folder import Job
from dpo_ref.cli.train import run_job

ROOT = Path(__file__).parents[2]
schemas.register()


def _reading_once(load: Callable) -> Callable:
    """Hydra reads and parses 30 files for each composition: here each once."""
    kept = {}

    def load_config(repository: ConfigRepository, config_path: str):
        key = (*(source.path for source in repository.get_sources()), config_path)
        if key not in kept:
            kept[key] = load(repository, config_path)
        return copy.deepcopy(kept[key])

    return load_config


ConfigRepository.load_config = _reading_once(ConfigRepository.load_config)


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def _copy(call: Callable[..., object], arguments: tuple, out: Path, err: Path):
    """What runs in the copy of this process: it writes where it is told, and is stopped as any other."""
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    call(*arguments)


def forked(folder: Path, call: Callable[..., object], *arguments) -> ForkProcess:
    """A call in a process of its own; what it writes goes to `folder`/out and err."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else they warn of the copy
    process = get_context("fork").Process(target=_copy, args=(call, arguments, folder / "out", folder / "err"))
    process.start()
    return process


def typed_here(*arguments: str):
    """What `python <arguments>` does, from the project's folder."""
    os.chdir(ROOT)
    sys.argv = list(arguments)
    GlobalHydra.instance().clear()
    runpy.run_path(arguments[0], run_name="__main__")


def started(folder: Path, *arguments: str) -> ForkProcess:
    """A command in a process of its own."""
    return forked(folder, typed_here, *arguments)


def typed(*arguments: str) -> Done:
    """Run a command in a process of its own."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        process = started(folder, *arguments)
        process.join(timeout=300)
        if process.is_alive():
            process.kill()
        process.join()
        return Done(process.exitcode, (folder / "out").read_text(), (folder / "err").read_text())


class Forked:
    """What a command starts in a process of its own by `Popen([sys.executable, ...])`, with what is imported here."""

    def __init__(self, words: list[str]):
        self._process = get_context("fork").Process(target=typed_here, args=tuple(words[1:]))
        self._process.start()

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


def typed_afresh(*arguments: str) -> Done:
    """Run a command as a user does, who has imported nothing before."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


@cache
def _composed(kind: str, overrides: tuple[str, ...]):
    """The composed tree, closed as Hydra leaves it, and the choices."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(schemas.CONF)):
        cfg = compose(kind, overrides=list(overrides), return_hydra_config=True)
    chosen = cfg.hydra.runtime.choices.items()
    choices = {key: value for key, value in chosen if value is not None and not key.startswith("hydra/")}
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def _chooses(override) -> bool:
    """Whether an override changes which files are composed, or means what only Hydra's `compose` looks after."""
    group = schemas.CONF / override.key_or_group
    return override.is_hydra_override() or override.is_sweep_override() or group.is_dir()


def composed(*overrides: str, kind: str = "train"):
    """The composed tree and the choices, as Hydra hands them to the entry point.

    Which files are composed takes Hydra far longer than what is typed over them: once for all that choose the same.
    """
    command_line.check_command_line(overrides, kind)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    choosing = tuple(override.input_line for override in parsed if _chooses(override))
    cfg, choices = copy.deepcopy(_composed(kind, choosing))
    ConfigLoaderImpl._apply_overrides_to_config([override for override in parsed if not _chooses(override)], cfg)
    OmegaConf.set_struct(cfg, False)
    return cfg, choices


def resolved(*overrides: str, kind: str = "train"):
    """Composed and checked as the entry points do."""
    cfg, choices = composed(*overrides, kind=kind)
    if kind == "evaluate":
        return resolve.components(cfg, choices, kind)
    return resolve.resolve(cfg, choices, overrides)


def train(*overrides: str) -> Done:
    """`python train.py ...` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        cfg, choices = composed(*overrides)
        directory = schemas.run_directory(cfg.output_dir, "default", overrides)
        ended = run_job(cfg, Job(directory, list(overrides), choices, sweep=None))
    return Done(ended.code, out.getvalue(), err.getvalue())


EVALUATE_ONLY = {"diagnostic", "export", "generation", "judge", "prompts", "scorer"}
INSIDE = {"scorer=judge": ["data=on_policy", "scorer@data.scorer=judge", "data.scorer.judge.model=big"]}


def files_of(*groups: str) -> list[str]:
    """The choices of some groups as one types them, `objective=dpo`."""
    return [
        f"{path.parent.name}={path.stem}" for name in groups for path in sorted(schemas.CONF.glob(f"{name}/*.yaml"))
    ]


def file_composes(choice: str):
    """Raises what keeps a file of a group from being composed and resolved with what it requires."""
    group, _, name = choice.partition("=")
    if inside := INSIDE.get(choice):  # a choice that only has a place in another
        resolved(*inside)
        return
    required = REQUIRED.get(name, [])
    words = [f"+{choice}" if group in ("experiment", "recipe", "search") else choice]
    words += required[group] if isinstance(required, dict) else required
    resolved(*words, kind="evaluate" if group in EVALUATE_ONLY else "train")


def composes(command):
    """Raises what keeps a documented command line from being composed and resolved, with each value that it sweeps
    over."""
    _, script, *arguments = shlex.split(command)
    kind = script.removesuffix(".py")
    overrides = [command_line.spelled(a) if kind == "train" else a for a in arguments if a != "-m"]
    varied = [a for a in overrides if "-m" in arguments and "," in a]
    fixed = [a for a in overrides if a not in varied]
    sweeps = [a.split("=", 1)[0] + "=" + value for a in varied for value in a.split("=", 1)[1].split(",")]
    for override in sweeps or [None]:
        resolved(*fixed, *([] if override is None else [override]), kind=kind)


REQUIRED = {
    "jsonl": {"data": ["data.path=pairs.jsonl"], "prompts": ["prompts.path=questions.jsonl"]},
    "alpaca_eval": {"export": [], "judge": ["judge.model=big"], "prompts": ["prompts.path=alpaca_eval.json"]},
    "mt_bench": {"export": [], "judge": ["judge.model=big"], "prompts": ["prompts.path=question.jsonl"]},
    "arena_hard": {"export": [], "prompts": ["prompts.path=question.jsonl"]},
    "other": ["reference.path=lab:strong"],
    "delta": ["recipe.stronger=lab:strong", "recipe.weaker=lab:initial"],
    "trajectory": ["reference.path=outputs/default/my_run"],
    "interpolate": ["reference.path=lab:strong", "reference.share=0.5"],
    "pretrained": ["model.path=lab:tiny"],
    "reward_model": {"objective": [], "scorer": ["scorer.path=some/reward-model"]},
    "length": ["scorer.target=4"],
    "real_model": ["data.path=pairs.jsonl"],
    "adapter_base": ["model.lora_rank=4"],
    "columns": ["reference.provenance=lab:tiny"],
    **{name: ["judge.model=big"] for name in ("dialogue", "local")},
    "template": ["judge.model=big", "judge.template=tldr"],
    "tldr": {"data": [], "judge": ["judge.model=big"]},
    "served": {
        "generation": ["generation.url=http://host:8000/v1"],
        "reference": ["reference.url=http://host:8000/v1", "reference.model=big", "reference.tokenizer=lab:tiny"],
    },
    "mixture": {
        "data": ["data.sources=[{path: a.jsonl}]"],
        "reference": ["reference.parts=[{reference: initial}, {reference: prior}]"],
    },
}
