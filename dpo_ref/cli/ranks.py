"""Several processes as the ranks of one run: how they come together, that they were asked for the same, where each of
them writes, and what becomes of the others when one is gone.
"""

import io
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from dpo_ref.cli.command_line import python
from dpo_ref.cli.run_folder import Job, in_words, options_in, provenance
from dpo_ref.cli.saved_run import read_summary
from dpo_ref.distributed import joined, num_started, ranks, started_by_torchrun

ALONE = "none"  # the member of `parallel` for one process


# --- coming together


@contextmanager
def together(cfg: DictConfig, job: Job) -> Iterator[None]:
    """Within, this process is a rank of the run that was asked for, where torchrun started it; the first of them
    speaks for all.

    Raises ValueError where processes and `parallel` do not go together, and where ranks were asked for different
    things.
    """
    with _told_once():
        asked = _is_asked(cfg, job)
    with _as_rank(cfg) if asked else nullcontext():
        yield


@contextmanager
def _told_once() -> Iterator[None]:
    """What all processes of a machine would say alike, the first of them says."""
    try:
        yield
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SaidByFirst(str(error)) from error
        raise


@contextmanager
def _as_rank(cfg: DictConfig) -> Iterator[None]:
    with joined(), ExitStack() as stack:
        if not ranks().is_first:
            stack.enter_context(_quietly())
        stack.enter_context(_watched())
        agree({**_versions(), **dict(options_in(OmegaConf.to_container(cfg, resolve=True)))})
        yield


SHARED = ("all", "generate")  # stages of an evaluation that several ranks share


@contextmanager
def evaluating(cfg: DictConfig) -> Iterator[None]:
    """Within, this process is a rank of the evaluation that was asked for, where torchrun started several.

    Raises ValueError for what is the work of one process, where ranks were asked for different things, and where
    another rank is gone.
    """
    if num_started() == 1:
        yield
        return
    with _told_once():
        _check_evaluation(cfg)
    with _as_rank(cfg):
        try:
            yield
        except RuntimeError as error:
            if gone := lost_another(error):
                raise ValueError(f"{gone}. Answers that were written are kept: the same command goes on") from error
            raise


def _check_evaluation(cfg: DictConfig) -> None:
    if cfg.stage not in SHARED:
        raise ValueError(f"stage={cfg.stage} is the work of one process: type {python()} evaluate.py ...")
    if cfg.sweep is not None:
        raise ValueError(
            "torchrun starts the ranks of one evaluation, and sweep= asks for several: evaluate one policy=... at a "
            f"time, or several beside each other with {python()} evaluate.py sweep=... n_jobs=..."
        )
    if cfg.judge is not None:
        raise ValueError(
            "a judge is asked by one process: leave judge out, and then type "
            f"{python()} evaluate.py stage=judge judge=... policy={cfg.policy}"
        )


def _is_asked(cfg: DictConfig, job: Job) -> bool:
    """Whether this is one of several. Raises ValueError where the command says otherwise than torchrun."""
    chosen = _chosen(cfg, job)
    words = shlex.join(["train.py", *job.overrides])
    if not started_by_torchrun():
        if chosen == ALONE:
            return False
        start = f"torchrun --nproc-per-node 2 {words} (as many as there are devices)"
        if job.sweep is not None:
            start = "a command of its own, or in jobs of hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node=2"
        raise ValueError(f"parallel={chosen} is for several processes, which torchrun starts: {start}")
    if num_started() == 1 and chosen == ALONE:
        return False
    if chosen == ALONE:
        raise ValueError(
            f"torchrun started {num_started()} processes, and parallel=none trains in one: add "
            f"parallel=ddp or parallel=fsdp, or type {python()} {words}"
        )
    if cfg.stage not in TOGETHER or cfg.get("bandit") is not None or cfg.get("recipe") is not None:
        what = f"stage={cfg.stage}" if cfg.stage not in TOGETHER else "a bandit or a recipe"
        raise ValueError(f"{what} is the work of one process: leave parallel out, and type {python()} {words}")
    return True


def check_batch(batch_size: int) -> None:
    """Raise ValueError where there are more ranks than pairs of an optimiser step."""
    size = ranks().size
    if batch_size < size:
        raise ValueError(
            f"trainer.batch_size={batch_size} cannot feed {size} ranks, of which {size - batch_size} would have no "
            f"pair in any step: use trainer.batch_size={size} or more, or start fewer processes"
        )


def _chosen(cfg: DictConfig, job: Job) -> str:
    """The member of `parallel`: of a run that goes on its own, unless the command says another."""
    said = any(word.startswith("parallel=") for word in job.overrides)
    if cfg.resume and not said:
        with suppress(ValueError, OSError):  # which is told where it is read to go on
            key = f"resume={cfg.resume}"
            return read_summary(Path(cfg.resume).expanduser(), key)["choices"].get("parallel", ALONE)
    return job.choices.get("parallel", ALONE)


TOGETHER = ("train", "cache_reference", "check")  # stages that several ranks share


# --- asked for the same


def _versions() -> dict[str, Any]:
    made_with = provenance()
    versions = {f"the version of {name}": value for name, value in made_with["versions"].items()}
    return versions | {f"git {name}": value for name, value in made_with["git"].items()}


def agree(said: Mapping[str, Any]) -> None:
    """Raise ValueError naming what differs on which rank, unless all ranks say the same."""
    of_all = ranks().gather({key: str(value) for key, value in said.items()})
    first, *others = of_all
    differing = [
        f"{key} is {other.get(key)} on rank {index} and {first.get(key)} on rank 0"
        for index, other in enumerate(others, 1)
        for key in sorted(first.keys() | other.keys())
        if first.get(key) != other.get(key)
    ]
    if differing:
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise ValueError(
            f"the ranks of a run must all be asked for the same, with the same versions: {'; '.join(differing[:3])}"
            f"{more}"
        )


# --- what a rank says last, and who is gone


class LastLine(io.TextIOBase):
    """Standard output of a rank that does not speak: its last line is remembered."""

    def __init__(self) -> None:
        self.line = "starting"

    def write(self, text: str) -> int:
        """Remember it."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        self.line = lines[-1] if lines else self.line
        return len(text)

    def writable(self) -> bool:
        """It is."""
        return True

    def isatty(self) -> bool:
        """It is no terminal."""
        return False


LAST_LINE = LastLine()


@contextmanager
def _quietly() -> Iterator[None]:
    """Within, what is said is remembered, and not shown."""
    before, sys.stdout = sys.stdout, LAST_LINE
    try:
        yield
    finally:
        sys.stdout = before


FIRST_GONE = "rank 0 has died, or its machine is not reached any more"  # which keeps what ranks tell each other
BEAT, GONE = 1.0, 30.0  # seconds between signs of life, and without one after which a rank is gone


class Watch:
    """Tells the other ranks that this one lives, and ends this one, with a word about it, where another is gone: what
    waits for a rank that is no more would wait for ever."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._seen: dict[int, tuple[str, float]] = {}  # of each rank its last sign, and when it came
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def start(self) -> None:
        """From here on."""
        self._sign()
        self._thread.start()

    def stop(self, words: str = "") -> None:
        """This rank has ended: by an error, if there are words."""
        self._over.set()
        self._thread.join()
        with suppress(RuntimeError):  # who keeps it may be gone
            self._store.set(_key("end", ranks().index), words)
            if words:  # others look whether they have to say the same
                self._wait_for_others()

    def _wait_for_others(self) -> None:
        until = time.monotonic() + 2 * BEAT
        while time.monotonic() < until and not all(self._has("end", index) for index in range(ranks().size)):
            time.sleep(BEAT / 20)

    def _sign(self) -> None:
        self._store.set(_key("beat", ranks().index), json.dumps([time.time(), LAST_LINE.line]))

    def _go_on(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self._sign()
                gone = self.gone(GONE)
            except RuntimeError:
                gone = FIRST_GONE
            if gone and not self._over.wait(3 * BEAT):  # whoever is told by what it waits for says more
                os.write(2, f"error: {of_rank()}{gone}\n".encode())
                os._exit(1)

    def gone(self, after: float) -> str | None:
        """Which rank is gone, and what it said last."""
        for index in (index for index in range(ranks().size) if index != ranks().index):
            if self._has("end", index):
                if words := self._store.get(_key("end", index)).decode():
                    return f"rank {index} ended: {words}"
                continue
            if not self._has("beat", index):
                continue
            sign, now = self._store.get(_key("beat", index)).decode(), time.monotonic()
            if self._seen.get(index, ("", 0.0))[0] != sign:
                self._seen[index] = sign, now
            elif now - self._seen[index][1] > after:
                return f"rank {index} has died; the last that was heard of it: {json.loads(sign)[1]}"
        return None

    def _has(self, kind: str, index: int) -> bool:
        return self._store.check([_key(kind, index)])


def _key(kind: str, index: int) -> str:
    return f"dpo_ref/{kind}/{index}"


_WATCHES: list[Watch] = []  # of this process, while it is a rank
LOST = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "NCCL", "heartbeat", "Timed out waiting")


def lost_another(error: BaseException) -> str | None:
    """Which rank is gone, where an error says that one no longer answers."""
    if not _WATCHES or not any(words in str(error) for words in LOST):
        return None
    until = time.monotonic() + 5 * BEAT
    try:
        while time.monotonic() < until:
            if gone := _WATCHES[-1].gone(3 * BEAT):
                return gone
            time.sleep(BEAT / 4)
    except RuntimeError:
        return FIRST_GONE
    return "another rank no longer answers"


def said_by_first(words: str) -> bool:
    """Whether the first rank, which is not this one, ends with the same words, and has told them."""
    if not _WATCHES or ranks().is_first:
        return False
    store, until = ranks().store, time.monotonic() + 3 * BEAT
    assert store is not None
    with suppress(RuntimeError):
        while time.monotonic() < until:
            if store.check([_key("end", 0)]):
                return store.get(_key("end", 0)).decode() == words
            time.sleep(BEAT / 20)
    return False


def of_rank() -> str:
    """Which rank speaks, before what it says, where it is not the first."""
    return "" if ranks().is_first else f"rank {ranks().index}: "


def note_end(words: str) -> None:
    """Tell the other ranks why this one ends."""
    if _WATCHES:
        _WATCHES.pop().stop(words)


@contextmanager
def _watched() -> Iterator[None]:
    store = ranks().store
    assert store is not None
    _WATCHES.append(Watch(store.clone()))  # pyright: ignore[reportAttributeAccessIssue]  (a wait would hold one)
    _WATCHES[-1].start()
    try:
        yield
    except (ValueError, OSError) as error:
        said = said_by_first(in_words(error))
        note_end(in_words(error))
        if said:
            raise SaidByFirst(str(error)) from error
        if isinstance(error, ValueError) and not ranks().is_first:
            raise ValueError(f"{of_rank()}{error}") from error
        raise
    except BaseException as error:
        note_end(f"{type(error).__name__}: {error}")
        raise
    note_end("")


class SaidByFirst(ValueError):
    """What the first rank has said already."""
