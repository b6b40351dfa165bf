"""Memory that runs out on a CPU: the kernel refuses an allocation, as `ulimit -v` has it refuse them."""

import importlib
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_ref.data import packing
from dpo_ref.distributed import OutOfMemory, memory_for, ran_out
from dpo_ref.evaluation import heldout
from dpo_ref.references import table
from dpo_ref.training import trainer
from tests.support.command import ROOT, train, typed_here
from tests.support.faults import summary

QUIET = ["tracking=none"]
ROOM = 2**25  # bytes above what the process has when it lays out its first pack of this kind
PAIRS = ["data.num_pairs=1200", "trainer.batch_size=1200", "data.tokens_per_batch=10000000"]
MANY = {  # whose packs, how much is held out
    # without a table, whose pass would leave room in the heap
    "the forward and backward pass of": (trainer, ["data.num_eval_pairs=0", "reference=none"]),
    "the evaluation of": (trainer, ["data.num_eval_pairs=1200", "reference=none"]),
    "the reference's pass over": (table, ["seed=7"]),  # whose table no other test has filled
}


def with_little_room(name, *arguments, room=ROOM):
    module = importlib.import_module(name)
    collate = module.collate
    table.WINDOW = packing.WINDOW = 1200
    heldout.pack = lambda groups, tokens_per_batch: packing.pack(groups, tokens_per_batch=10_000_000)

    def limited(groups):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
        module.collate = collate
        return collate(groups)

    module.collate = limited
    typed_here(*arguments)


def sentence_of(module, *words, room=ROOM):
    """The error that a process ends with that is none of pytest's: the room that other tests left in its heap is
    much. `module` lays out the packs."""
    arguments = [module.__name__, *words]
    call = f"with_little_room(*{arguments!r}, room={room})"
    program = f"from tests.faults.test_out_of_memory import with_little_room; {call}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stdout[-1000:] + done.stderr[-1000:]
    assert "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return sentence


WORKS = [pytest.param(work, marks=[pytest.mark.slow] if index else []) for index, work in enumerate(MANY)]


@pytest.mark.parametrize("work", WORKS)
def test_memory_that_runs_out_is_one_sentence(work, tmp_path, tell):
    module, words = MANY[work]
    options = [*QUIET, *PAIRS, *words, "data.num_test_prompts=4", "model.path=lab:tiny"]
    sentence = sentence_of(module, "train.py", *options, f"output_dir={tmp_path / 'run'}")
    assert re.search(rf"memory ran out in {work} a pack of [\d,]{{6,}} tokens", sentence)
    assert re.search(
        r"a peak of \d+\.\d\d GiB so far, of it 0\.\d\d GiB of weights, 0\.\d\d GiB of gradients", sentence
    )
    for option in ("data.tokens_per_batch", "model.gradient_checkpointing=full", "model.lora_rank=16"):
        assert option in sentence
    assert summary(tmp_path / "run")["status"] == "failed"
    left = "checkpoints, and what the reference scored"
    tell("untidy", f"no memory left in {work} a pack", seen=sentence, survived=left)


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


@pytest.mark.slow
def test_an_evaluation_that_runs_out_says_what_helps(tmp_path, tell):
    options = [*QUIET, "data.num_pairs=8", "data.num_eval_pairs=1200", "data.num_test_prompts=4"]
    run = tmp_path / "run"
    assert train(*options, "model.path=lab:tiny", "trainer.max_steps=1", f"output_dir={run}").returncode == 0
    words = ["evaluate.py", *QUIET, f"policy={run}", "generation.max_new_tokens=8"]
    sentence = sentence_of(heldout, *words, room=2**20)
    assert re.search(r"memory ran out in the evaluation, with a peak of \d+\.\d\d GiB so far", sentence)
    assert "generation.batch_size" in sentence
    assert (run / "evaluation" / "generations.jsonl").is_file()  # what was answered is kept
    tell("untidy", "no memory left in an evaluation", seen=sentence, survived="the answers")


@pytest.mark.slow
def test_a_look_at_references_that_runs_out_says_what_helps(tmp_path, tell):
    data = ["data.num_pairs=1200", "data.num_eval_pairs=8", "data.tokens_per_batch=10000000", "seed=8"]
    look = ["evaluate.py", *QUIET, "stage=compatibility", "policy=lab:tiny", "references=[none]", *data]
    sentence = sentence_of(table, *look, "compatibility.num_pairs=1200", f"output_dir={tmp_path}")
    assert re.search(r"memory ran out in the reference's pass over a pack of [\d,]{6,} tokens, with a peak", sentence)
    assert "data.tokens_per_batch" in sentence
    assert not list(tmp_path.glob("*.json"))
    tell("untidy", "no memory left in a look at references", seen=sentence, survived="tables that were full")


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
