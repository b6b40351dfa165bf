"""Where a run computes, beside which other ranks, and with which memory."""

import ctypes
import json
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# --- the C library's allocator
# By default glibc returns large blocks to the kernel whenever they are freed, and every training step then pays for
# the page faults of getting them back: up to half of a step on a CPU (benchmarks/step_vs_trl.py reports both). The
# largest blocks, a chunk of logits or a head's gradient, are better returned: glibc 2.36 gives a freed block to no
# aligned one of its size, and the heap would grow by them.


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
NEVER_TRIM = 2**31 - 1
PAD_BYTES = 64 * 2**20
LARGEST_KEPT = 32 * 2**20  # the most that glibc takes


def keep_memory() -> None:
    """Stop trimming, and serve none but the largest blocks by mmap; does nothing where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter, value in ((M_MMAP_THRESHOLD, LARGEST_KEPT), (M_TRIM_THRESHOLD, NEVER_TRIM), (M_TOP_PAD, PAD_BYTES)):
        libc.mallopt(parameter, value)


# --- devices: nothing else asks for them


AUTO, DEVICES = "auto", ("auto", "cuda", "cpu")
_named = [AUTO]  # the last is what is computed on, in every thread


def check_device(name: str) -> None:
    """Raise ValueError for a `device=` that is none. Whether it is here is asked where it is used: a process that has
    looked for a GPU cannot hand it to those it forks."""
    if name == "mps":
        raise ValueError(
            "device=mps: log-probs of responses are summed in float64, which Apple's GPUs do not compute in; use "
            "device=cpu"
        )
    if name not in DEVICES:
        raise ValueError(f"device={name} is none of {', '.join(DEVICES)}")


@contextmanager
def on_device(name: str) -> Iterator[None]:
    """Within, `best_device` is the one of this name; `auto` is CUDA if there is one, else the CPU. Raises
    ValueError."""
    check_device(name)
    _named.append(name)
    try:
        yield
    finally:
        _named.pop()


def best_device() -> torch.device:
    """What is computed on. Raises ValueError for CUDA that was named and is not here."""
    if _named[-1] == "cpu":
        return torch.device("cpu")
    found = torch.cuda.is_available()
    if _named[-1] == "cuda" and not found:
        raise ValueError("device=cuda: there is no CUDA device here, or this build of torch cannot use it")
    return torch.device("cuda" if found else "cpu")


def num_gpus() -> int:
    """How many CUDA devices this process sees."""
    return torch.cuda.device_count()


def on_cuda() -> bool:
    """Whether it is a CUDA device."""
    return best_device().type == "cuda"


# --- ranks: the processes that train one model together


class Ranks:
    """The processes that train one model together, as this one sees them; one of one where torchrun started no others.

    What one of them asks, all ask, in the same order. Values of the host go from host to host, so that no device waits
    for them; tensors go as their device has it.
    """

    def __init__(self, index: int = 0, size: int = 1, store: dist.Store | None = None) -> None:
        self.index, self.size = index, size
        self.store = store  # what they tell each other beside this

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks for all."""
        return self.index == 0

    def gather(self, value: Any) -> list[Any]:
        """A JSON value of every rank, in their order."""
        if self.size == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(content)]))
        return [json.loads(part.numpy().tobytes()) for part in self._joined(content, [int(size) for size in sizes])]

    def _joined(self, own: Tensor, sizes: list[int]) -> list[Tensor]:
        """A one-dimensional tensor of every rank, of which the sizes are known."""
        padded = own.new_zeros(max(sizes))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def columns(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One-dimensional tensors of the same names on every rank, each joined in the order of the ranks."""
        if self.size == 1 or not own:
            return dict(own)
        lengths = self.gather([len(column) for column in own.values()])
        flat = torch.cat([column.double() for column in own.values()])
        parts = self._joined(flat, [sum(of_rank) for of_rank in lengths])
        split = [part.split(of_rank) for part, of_rank in zip(parts, lengths, strict=True)]
        return {
            name: torch.cat(pieces).to(column.dtype)
            for (name, column), *pieces in zip(own.items(), *split, strict=True)
        }

    def before(self, number: int) -> int:
        """The sum of a number over the ranks before this one."""
        return sum(self.gather(number)[: self.index])

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def first(self, call: Callable[[], Any]) -> Any:
        """What a call gives on the first rank, a JSON value; it is not made on the others. Raises ValueError on all of
        them where it raises on the first."""
        if self.size == 1:
            return call()
        value, failure = None, None
        if self.is_first:
            try:
                value = call()
            except (ValueError, OSError) as error:
                failure = error
        value, words = self.gather([value, None if failure is None else str(failure)])[0]
        if failure is not None:
            raise failure
        if words is not None:
            raise ValueError(words)
        return value

    @cached_property
    def background(self) -> Any:
        """A group of the same processes for what is sent between hosts while training goes on; asked for by all."""
        return dist.new_group(backend="gloo")

    def wait(self) -> None:
        """Until all have come here."""
        self.gather(None)


_RANKS = [Ranks()]  # the last is what this process is one of


def ranks() -> Ranks:
    """The processes that train one model together with this one."""
    return _RANKS[-1]


STARTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment variables that torchrun sets


def started_by_torchrun() -> bool:
    """Whether this process is one of several, or one, that torchrun has started."""
    return all(name in os.environ for name in STARTED)


def num_started() -> int:
    """How many processes are to be ranks of one run, this one among them."""
    return int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else 1


def num_beside() -> int:
    """How many ranks work on this machine, this one among them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if started_by_torchrun() else 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """Within, this process and those that torchrun has started beside it are ranks of one run, each with a CUDA device
    of its own where that is what is computed on."""
    cuda = on_cuda()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, index, size = next(dist.rendezvous("env://"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=index, world_size=size)
    _RANKS.append(Ranks(index, size, store))
    try:
        yield ranks()
    finally:
        _RANKS.pop()
        dist.destroy_process_group()


@contextmanager
def own_folder(
    folder: Path, holding: AbstractContextManager[None], copied: Sequence[str], shared: Sequence[str] = ()
) -> Iterator[Path]:
    """Where this rank writes: the first, within `holding`, to the folder; any other to one that stands for it, with
    the `shared` folders of it and copies of the files that fit the patterns `copied`, and gone afterwards."""
    if ranks().is_first:
        with holding:
            ranks().wait()
            ranks().wait()  # until the others have their copies
            yield folder
        return
    ranks().wait()  # until nobody else holds it
    own = Path(tempfile.mkdtemp(prefix=f"rank-{ranks().index}-"))
    try:
        for name in shared:
            (own / name).symlink_to((folder / name).resolve())
        for path in (path for pattern in copied for path in folder.glob(pattern)):
            place = own / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place)
        ranks().wait()
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


# --- how much memory there is


MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")  # of Linux


def resident_bytes() -> int:
    """What this process has in main memory; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0


def available_bytes(device: torch.device) -> int | None:
    """Bytes that this process can have on a device, what it has already among them: of a container no more than its
    limit. Ranks of one machine share its main memory. None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if not MEMINFO.is_file():
        return None
    sizes = dict(line.split()[:2] for line in MEMINFO.read_text().splitlines())
    there = 1024 * int(sizes["MemAvailable:"]) // num_beside() + resident_bytes()
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    return there if limit == "max" else min(there, int(limit) // num_beside())


# --- memory that runs out


class OutOfMemory(ValueError):
    """Memory ran out; says in which work, with the numbers at hand."""


NO_ROOM = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "could not create a memory")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left: CUDA's, Python's, or that of torch's allocator on a CPU."""
    words = str(error)
    told = isinstance(error, RuntimeError) and any(part in words for part in NO_ROOM)
    return told or isinstance(error, (MemoryError, torch.OutOfMemoryError))


@contextmanager
def memory_for(work: str, num_tokens: int | None = None) -> Iterator[None]:
    """Around work on a pack of so many tokens. Raises OutOfMemory naming it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        size = "" if num_tokens is None else f" a pack of {num_tokens:,} tokens"
        raise OutOfMemory(f"memory ran out in {work}{size}") from error


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: the device's if it is CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextmanager
def memory_explained(model: nn.Module, optimizer: torch.optim.Optimizer, remedy: str) -> Iterator[None]:
    """Around a run's work. Raises OutOfMemory with what takes memory, what helps most and `remedy`: how to go on."""
    try:
        yield
    except (ValueError, RuntimeError, MemoryError) as error:
        if not isinstance(error, OutOfMemory) and not ran_out(error):
            raise
        work = error if isinstance(error, OutOfMemory) else "memory ran out"
        raise OutOfMemory(f"{work}, with {_taken(model, optimizer)}. {HELPS}. {remedy}") from error


HELPS = (
    "What helps most: a smaller data.tokens_per_batch (or data.max_length, where one pair fills a pack), "
    "model.gradient_checkpointing=full (on CUDA: offload), and fewer or smaller weights to train: model.lora_rank=16, "
    "optim=adamw_bf16"
)


@contextmanager
def evaluation_memory(work: str, remedies: str) -> Iterator[None]:
    """Around `work` that takes no step. Raises OutOfMemory with the peak and what helps most, where the work that ran
    out has not said so yet."""
    try:
        yield
    except (OutOfMemory, RuntimeError, MemoryError) as error:
        if not isinstance(error, OutOfMemory) and not ran_out(error):
            raise
        said = error if isinstance(error, OutOfMemory) else f"memory ran out in {work}"
        peak = peak_memory_gib(best_device())
        raise OutOfMemory(f"{said}, with a peak of {peak:.2f} GiB so far. What helps most: {remedies}") from error


def _taken(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """The peak so far, and what of it stays from step to step."""
    parameters = list(model.parameters())
    gradients = sum(p.nbytes for p in parameters if p.requires_grad)
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    sizes = {"weights": sum(p.nbytes for p in parameters), "gradients": gradients, "moments": moments}
    peak = peak_memory_gib(parameters[0].device)
    listed = ", ".join(f"{size / 2**30:.2f} GiB of {name}" for name, size in sizes.items())
    return f"a peak of {peak:.2f} GiB so far, of it {listed}"
