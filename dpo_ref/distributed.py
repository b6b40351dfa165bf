"""Where a run computes, and with which memory."""

import ctypes
import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

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


# --- how much memory there is


MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")  # of Linux


def resident_bytes() -> int:
    """What this process has in main memory; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0


def available_bytes(device: torch.device) -> int | None:
    """Bytes that this process can have on a device, what it has already among them: of a container no more than its
    limit. None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if not MEMINFO.is_file():
        return None
    sizes = dict(line.split()[:2] for line in MEMINFO.read_text().splitlines())
    there = 1024 * int(sizes["MemAvailable:"]) + resident_bytes()
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    return there if limit == "max" else min(there, int(limit))


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
    "model.gradient_checkpointing=full, and fewer or smaller weights to train: model.lora_rank=16, optim=adamw_bf16"
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
