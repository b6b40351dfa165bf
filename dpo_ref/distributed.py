"""Where a run computes, and with which memory."""

import ctypes
import platform

import torch

# --- the C library's allocator
# By default glibc returns large blocks to the kernel whenever they are freed, and every training step then pays for
# the page faults of getting them back: up to half of a step on a CPU (benchmarks/step_vs_trl.py reports both).


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
NEVER_TRIM = 2**31 - 1
PAD_BYTES = 64 * 2**20


def keep_memory() -> None:
    """Stop trimming and stop serving large blocks by mmap; does nothing where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER_TRIM), (M_TOP_PAD, PAD_BYTES)):
        libc.mallopt(parameter, value)


def best_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
