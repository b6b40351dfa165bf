"""How much memory there is: a process's own grows by what it takes, and a container's limit counts."""

import mmap
import subprocess
import sys

import pytest
import torch

from dpo_ref import distributed
from tests.support.command import ROOT

MIB = 2**20
CPU = torch.device("cpu")


def test_what_a_process_has_grows_by_what_it_takes():
    before = distributed.resident_bytes()
    with mmap.mmap(-1, 64 * MIB) as taken:
        taken.write(b"x" * 64 * MIB)
        assert 60 * MIB < distributed.resident_bytes() - before < 200 * MIB


@pytest.mark.parametrize(("limit", "expected"), [("max", 1000 * 1024), ("700000", 700_000), ("9999999", 1000 * 1024)])
def test_a_container_has_no_more_than_its_limit(limit, expected, monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 2000 kB\nMemFree: 500 kB\nMemAvailable: 1000 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(distributed, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(distributed, "CGROUP", tmp_path / "memory.max")
    monkeypatch.setattr(distributed, "resident_bytes", lambda: 0)
    assert distributed.available_bytes(CPU) == expected


def test_a_system_that_does_not_say_is_not_guessed(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "MEMINFO", tmp_path / "nowhere")
    assert distributed.available_bytes(CPU) is None


GROWTH = """
import torch
from dpo_ref.distributed import keep_memory, resident_bytes
keep_memory()
like, small = torch.zeros(2**24), []
for turn in range(9):
    block = torch.zeros_like(like)  # 64 MiB, such as a chunk of logits
    small.append(torch.zeros(40))  # what lies behind it in the heap, and stays
    del block
    first = first if turn else resident_bytes()
print((resident_bytes() - first) / 2**20)
"""


def test_large_blocks_that_are_freed_do_not_make_the_heap_grow():
    """In a process of its own: the allocator's settings are the whole process's."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 100
