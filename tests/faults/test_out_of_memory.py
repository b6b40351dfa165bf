"""Memory that runs out on a CPU: the kernel refuses an allocation, as `ulimit -v` has it refuse them."""

import re
import resource
import shutil
from pathlib import Path

import pytest
import torch

from dpo_ref.distributed import OutOfMemory, memory_for, ran_out
from dpo_ref.references import table
from tests.support.command import forked, train, typed_here
from tests.support.faults import summary

QUIET = ["tracking=none"]
ROOM = 3 * 2**28  # bytes above what the process has when it begins
LARGE = "data.tokens_per_batch=10000000"
MANY = {
    "training": ["data.num_pairs=6000", "data.num_eval_pairs=8", "trainer.batch_size=6000", LARGE],
    "the reference's pass": ["data.num_pairs=6000", "data.num_eval_pairs=8", LARGE],
}
SAYS = {
    "training": r"memory ran out in the forward and backward pass of a pack of [\d,]{6,} tokens",
    "the reference's pass": r"memory ran out in the reference's pass over a pack of [\d,]{6,} tokens",
}


def with_little_room(window, *arguments):
    table.WINDOW = window
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    typed_here(*arguments)


def ended_with(folder, window, *arguments):
    folder.mkdir()
    process = forked(folder, with_little_room, window, "train.py", *arguments)
    process.join(timeout=200)
    assert process.exitcode == 1, (folder / "err").read_text()[-2000:]
    return (folder / "err").read_text()


@pytest.mark.parametrize("work", MANY)
def test_memory_that_runs_out_is_one_sentence(work, tmp_path, tell):
    window = 256 if work == "training" else 6000
    options = [*QUIET, *MANY[work], "data.num_test_prompts=4", "model.path=lab:tiny", f"output_dir={tmp_path / 'run'}"]
    said = ended_with(tmp_path / "said", window, *options)
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.search(SAYS[work], sentence)
    assert re.search(
        r"a peak of \d+\.\d\d GiB so far, of it 0\.\d\d GiB of weights, 0\.\d\d GiB of gradients", sentence
    )
    for option in ("data.tokens_per_batch", "model.gradient_checkpointing=full", "model.lora_rank=16"):
        assert option in sentence
    assert "Traceback" not in said
    assert summary(tmp_path / "run")["status"] == "failed"
    tell("untidy", f"no memory left in {work}", seen=sentence, survived="checkpoints, and what the reference scored")


def test_a_run_goes_on_with_smaller_packs(tmp_path):
    """Packs change nothing that a run is known by."""
    options = [*QUIET, "data.num_pairs=32", "data.num_eval_pairs=8", "data.num_test_prompts=4", "model.path=lab:tiny"]
    folder = tmp_path / "run"
    assert train(*options, "trainer.batch_size=8", "trainer.max_steps=2", f"output_dir={folder}").returncode == 0
    shutil.rmtree(folder / "policy")
    smaller = ["data.tokens_per_batch=200", "model.gradient_checkpointing=full", "trainer.max_steps=4"]
    done = train(f"resume={folder}", *QUIET, *smaller)
    assert done.returncode == 0, done.stderr
    assert summary(folder)["steps"] == 4


ERRORS = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_says_that_memory_ran_out(name):
    assert ran_out(ERRORS[name])
    with (
        pytest.raises(OutOfMemory, match="memory ran out in the evaluation of a pack of 8,192 tokens"),
        memory_for("the evaluation of", 8192),
    ):
        raise ERRORS[name]


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match=r"^expected dtype"), memory_for("the evaluation of", 8192):
        raise RuntimeError("expected dtype float but got double")
