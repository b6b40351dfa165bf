"""Several processes as the ranks of one run, copies of this one: as torchrun starts them, without its imports."""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

from dpo_ref.distributed import joined
from tests.support.command import Done, forked, typed_here


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _as_rank(environment: dict[str, str], call: Callable[..., object], arguments: tuple):
    os.environ.update(environment)
    call(*arguments)


def ranks_started(folder: Path, size: int, call: Callable[..., object], *arguments):
    """Processes that make the call, each as a rank of so many; what rank r writes goes to `folder`/r."""
    port, processes = _free_port(), []
    for index in range(size):
        environment = {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(size)}
        environment["LOCAL_WORLD_SIZE"] = str(size)
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        (folder / str(index)).mkdir(parents=True, exist_ok=True)
        processes.append(forked(folder / str(index), _as_rank, environment, call, arguments))
    return processes


def ended(folder: Path, processes: list, seconds: float = 240) -> list[Done]:
    """What became of the processes."""
    done = []
    for index, process in enumerate(processes):
        process.join(timeout=seconds)
        if process.is_alive():
            process.kill()
        process.join()
        said = [(folder / str(index) / name).read_text() for name in ("out", "err")]
        done.append(Done(process.exitcode, *said))
    return done


def _together(call: Callable[..., object], arguments: tuple):
    try:
        with joined():
            call(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # what others wait for would be waited for here as well


def on_ranks(folder: Path, size: int, call: Callable[..., object], *arguments) -> None:
    """Make a call on several ranks; raises what one of them said if one fails."""
    for done in ended(folder, ranks_started(folder, size, _together, call, arguments)):
        assert done.returncode == 0, done.stderr


def typed_on_ranks(folder: Path, size: int, *arguments: str) -> list[Done]:
    """What `torchrun --nproc-per-node <size> <arguments>` does."""
    return ended(folder, ranks_started(folder, size, typed_here, *arguments))
