"""`train.py` on several ranks: what a run leaves, how it goes on with other numbers of ranks, what is refused, and
what becomes of the rest when a rank is gone."""

import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.command import train, typed_here
from tests.support.on_policy import SMALL as ON_POLICY
from tests.support.quick import only
from tests.support.ranks import ended, ranks_started, typed_on_ranks

SMALL = ["model.path=lab:tiny", "data.num_pairs=48", "data.num_eval_pairs=8", "data.num_test_prompts=4"]
RUN = [
    *SMALL,
    "tracking=none",
    "trainer.batch_size=7",
    "data.tokens_per_batch=256",
    "optim.lr=1e-3",
    "optim.schedule=constant",
]
RUN += ["optim.warmup_ratio=0"]
FLOAT32 = 2e-5  # of weights of a few steps with lr 1e-3: what sums in another order come to


def lines_of(run: Path):
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = (
        "train/throughput",
        "train/memory",
        "on_policy/sample_seconds",
        "on_policy/score_seconds",
        "evaluation/seconds",
    )
    return [{name: value for name, value in line.items() if not name.startswith(own)} for line in kept]


def check_same(run: Path, other: Path, bound: float = FLOAT32):
    for ours, theirs in zip(lines_of(run), lines_of(other), strict=True):
        assert ours == pytest.approx(theirs, abs=bound * 10, rel=1e-4)
    weights, same = (load_file(folder / "policy" / "model.safetensors") for folder in (run, other))
    assert weights.keys() == same.keys()
    for name, value in same.items():
        assert (weights[name] - value).abs().max() <= bound, name


def on_two(folder: Path, *words: str, ranks: int = 2):
    done = typed_on_ranks(folder, ranks, "train.py", *words)
    assert [each.returncode for each in done] == [0] * ranks, "\n".join(each.stderr for each in done)
    return done


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, to the end, with a reference that moves."""
    run = tmp_path_factory.mktemp("alone") / "run"
    done = train(*RUN, *MOVING, f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    return run


MOVING = ["objective=kto", "reference=moving", "reference.every=2", "trainer.max_steps=5", "trainer.eval_every=3"]


def test_two_ranks_leave_what_one_leaves(tmp_path, alone):
    run = tmp_path / "run"
    first, other = on_two(tmp_path, *RUN, *MOVING, f"output_dir={run}", "parallel=fsdp")
    check_same(run, alone)
    assert {path.name for path in run.iterdir()} == {path.name for path in alone.iterdir()}
    assert {path.name for path in (run / "policy").iterdir()} == {path.name for path in (alone / "policy").iterdir()}
    assert f"next:\n  torchrun --nproc-per-node 2 evaluate.py policy={run}" in first.stdout
    assert other.stdout == other.stderr == ""
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert 1 <= line["train/throughput/rank_imbalance"] < 1.6


WAYS = [(1, "none", 2, "fsdp"), (2, "fsdp", 1, "none"), (2, "fsdp", 3, "ddp"), (2, "ddp", 2, "fsdp")]


@pytest.mark.parametrize(("before", "held", "after", "then"), only(WAYS, WAYS[1]))
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, alone, before, held, after, then):
    run = tmp_path / "run"
    begun = [*RUN, *MOVING, f"output_dir={run}", "trainer.max_steps=3", f"parallel={held}"]
    going = [f"resume={run}", "trainer.max_steps=5", f"parallel={then}"]
    for count, words in ((before, begun), (after, going)):
        if count == 1:
            done = train(*words)
            assert done.returncode == 0, done.stderr
        else:
            on_two(tmp_path / str(count), *words, ranks=count)
    check_same(run, alone)


@pytest.mark.slow
def test_it_goes_on_bit_for_bit_with_as_many(tmp_path):
    """What two ranks saved two ranks go on from as if nothing had been."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    on_two(tmp_path / "1", *RUN, *MOVING, f"output_dir={whole}", "parallel=fsdp")
    on_two(tmp_path / "2", *RUN, *MOVING, f"output_dir={parts}", "parallel=fsdp", "trainer.max_steps=3")
    on_two(tmp_path / "3", f"resume={parts}", "trainer.max_steps=5", "parallel=fsdp")
    assert lines_of(parts) == lines_of(whole)
    check_same(parts, whole, bound=0)


def test_an_adapter_above_weights_in_bfloat16(tmp_path):
    """Sharded with them, and what is below is known by the same digest: one table serves both ways of holding it."""
    words = [*RUN, "model.lora_rank=4", "model.weights=bfloat16", "trainer.max_steps=3"]
    one, two = tmp_path / "one", tmp_path / "two"
    done = train(*words, f"output_dir={one}")
    assert done.returncode == 0, done.stderr
    on_two(tmp_path, *words, f"output_dir={two}", "parallel=fsdp")
    check_same(two, one)
    ours, theirs = (json.loads((run / "summary.json").read_text())["identities"] for run in (two, one))
    assert ours == theirs


# --- what is refused


def test_several_processes_and_parallel_go_together(tmp_path):
    alone = train(*RUN, "parallel=fsdp", f"output_dir={tmp_path / 'run'}")
    assert alone.returncode == 1
    assert "torchrun --nproc-per-node 2 train.py" in alone.stderr
    assert "parallel=fsdp" in alone.stderr
    first, other = typed_on_ranks(tmp_path, 2, "train.py", *RUN, f"output_dir={tmp_path / 'run'}")
    assert first.returncode == other.returncode == 1
    assert "torchrun started 2 processes, and parallel=none trains in one: add parallel=ddp" in first.stderr
    few = typed_on_ranks(tmp_path / "few", 2, "train.py", *RUN, "parallel=ddp", "trainer.batch_size=1")[0]
    assert "trainer.batch_size=1 cannot feed 2 ranks" in few.stderr
    whole = typed_on_ranks(tmp_path / "whole", 2, "train.py", *RUN, "parallel=fsdp", "optim=muon")[0]
    assert "optim=muon orthogonalises whole matrices" in whole.stderr
    words = ["parallel=fsdp", "model.lora_rank=4", "model.weights=nf4"]
    small = typed_on_ranks(tmp_path / "small", 2, "train.py", *RUN, *words)[0]
    assert "model.weights=nf4 is quantised, and parallel=fsdp gives a rank parts of weights" in small.stderr
    page = typed_on_ranks(tmp_path / "page", 2, "train.py", *RUN, "stage=data", "parallel=ddp")[0]
    assert "stage=data is the work of one process" in page.stderr
    assert not (tmp_path / "run").exists()


def _own_words(*of_rank: list[str]):
    typed_here("train.py", *of_rank[int(os.environ["RANK"])])


def test_ranks_that_were_asked_for_different_things_say_which(tmp_path):
    words = [*RUN, f"output_dir={tmp_path / 'run'}", "parallel=ddp"]
    started = ranks_started(tmp_path, 2, _own_words, words, [*words, "beta=0.7", "seed=3"])
    first, other = ended(tmp_path, started)
    assert first.returncode == other.returncode == 1
    assert "beta is 0.7 on rank 1 and None on rank 0" in first.stderr
    assert "seed is 3 on rank 1 and 0 on rank 0" in first.stderr
    assert other.stderr == ""  # it is said once
    assert not (tmp_path / "run").exists()


def test_ranks_with_other_data_say_so(tmp_path):
    """Each reads its own file, as on two nodes whose folders are not the same."""
    row = {"prompt": "two plus two?", "chosen": "four", "rejected": "five"}
    for index in range(2):
        (tmp_path / str(index)).mkdir()
        lines = [json.dumps(row | {"chosen": f"four {number + index}"}) for number in range(8)]
        (tmp_path / str(index) / "rows.jsonl").write_text("\n".join(lines))
    words = [*SMALL[:1], "data=jsonl", "data.path='~/rows.jsonl'", "tracking=none", "parallel=ddp"]
    words.append(f"output_dir={tmp_path / 'run'}")
    first, _ = ended(tmp_path / "said", ranks_started(tmp_path / "said", 2, _at_home, tmp_path, words))
    assert first.returncode == 1
    assert "the training data is" in first.stderr
    assert "on rank 1" in first.stderr


def _at_home(folder: Path, words: list[str]):
    os.environ["HOME"] = str(folder / os.environ["RANK"])
    typed_here("train.py", *words)


# --- a rank that is gone, and a stop


def _wait_for(path: Path, text: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < until, f"{path} never said {text}"
        time.sleep(0.05)


LONG = ["objective=dpo", "trainer.max_steps=4000", "trainer.epochs=1000", "trainer.save_every=5", "parallel=ddp"]


@pytest.mark.parametrize("dead", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_when_a_rank_dies_the_others_end_and_say_which(tmp_path, dead):
    """Also where that is the first, which keeps what they tell each other."""
    run = tmp_path / "run"
    started = ranks_started(tmp_path, 2, typed_here, "train.py", *RUN, *LONG, f"output_dir={run}")
    _wait_for(run / "metrics.jsonl", '{"step": 12,')
    os.kill(started[dead].pid, signal.SIGKILL)
    killed = time.monotonic()
    other = ended(tmp_path, started, seconds=60)[1 - dead]
    assert time.monotonic() - killed < 60
    assert other.returncode == 1
    assert f"rank {dead} has died" in other.stderr
    assert f"train.py resume={run}" in other.stderr
    on_two(tmp_path / "again", f"resume={run}", "trainer.max_steps=14")
    assert lines_of(run)[-1]["step"] == 14


def _full_after_one(words: list[str]):
    """The disk of the second rank has room for one checkpoint."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    whole, left = HuggingFaceStorageWriter.write_data, [1]

    def write_data(self, plan, planner):
        if os.environ["RANK"] == "1" and not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left.clear()
        return whole(self, plan, planner)

    HuggingFaceStorageWriter.write_data = write_data
    typed_here("train.py", *words)


def test_a_checkpoint_that_one_rank_cannot_write_is_told_and_the_last_one_stays(tmp_path):
    """It is written while training goes on, so that the steps behind it are told of too."""
    run = tmp_path / "run"
    words = [*RUN, "objective=dpo", "parallel=fsdp", "trainer.save_every=2", f"output_dir={run}"]
    first, other = ended(tmp_path, ranks_started(tmp_path, 2, _full_after_one, words))
    assert first.returncode == other.returncode == 1
    assert "the checkpoint of step 4 was not written" in first.stderr
    assert "No space left on device" in first.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    on_two(tmp_path / "again", f"resume={run}", "parallel=fsdp")
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"


def test_a_stop_of_one_rank_stops_all_which_save_themselves(tmp_path):
    run = tmp_path / "run"
    started = ranks_started(tmp_path, 2, typed_here, "train.py", *RUN, *LONG, f"output_dir={run}")
    _wait_for(run / "metrics.jsonl", '{"step": 7,')
    os.kill(started[1].pid, signal.SIGTERM)
    first, other = ended(tmp_path, started, seconds=60)
    assert first.returncode == other.returncode == 130
    assert f"go on with torchrun --nproc-per-node 2 train.py resume={run}" in first.stdout
    last = lines_of(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{last:08d}" / "digests.json").is_file()


# --- what is sampled


SAMPLED = [*ON_POLICY, "objective=ppo_clip", "data.rounds=2", "data.prompts_per_round=5", "data.samples_per_prompt=2"]
SAMPLED += ["data.max_new_tokens=6", "data.generation_batch_size=4", "data.prompts.num_test_prompts=5"]
SAMPLED += ["trainer.batch_size=3", "evaluation.every=1", "evaluation.num_prompts=5", "evaluation.max_new_tokens=6"]
SAMPLED += ["evaluation.batch_size=3"]


@pytest.mark.parametrize("held", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_on_policy_rounds_and_evaluations_of_two_ranks_are_those_of_one(tmp_path, held):
    """Each rank decodes its batches and scores its prompts; all have the answers of all."""
    done = train(*SAMPLED, f"output_dir={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr
    on_two(tmp_path, *SAMPLED, f"output_dir={tmp_path / 'two'}", f"parallel={held}")
    check_same(tmp_path / "two", tmp_path / "one")
    for name in ("rounds/0002/generations.jsonl", "training_evaluation/step_00000004.jsonl"):
        ours, theirs = ((tmp_path / run / name).read_text().splitlines() for run in ("two", "one"))
        assert [json.loads(line)["token_ids"] for line in ours] == [json.loads(line)["token_ids"] for line in theirs]
