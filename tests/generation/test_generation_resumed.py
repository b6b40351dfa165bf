"""A generation that was killed goes on where it was, with the same bits."""

import time
from dataclasses import dataclass
from multiprocessing import get_context

import pytest

from dpo_ref.evaluation.stages import generate_stage
from dpo_ref.generation.engine import PromptSet, Question, Sampling, answer
from dpo_ref.generation.records import read_generations
from dpo_ref.generation.sampling import Local
from dpo_ref.types import silent
from tests.support.command import forked
from tests.support.quick import only
from tests.support.tiny import tiny_model
from tests.support.tokenizers_here import byte_bpe

TOKENIZER = byte_bpe()
ASKED = PromptSet(
    "", tuple(Question(({"role": "user", "content": f"{n} cats" * (n % 4 + 1)},), ("why?",)) for n in range(7))
)


@dataclass
class Counted:
    """Answers that are shown, the first as the engine begins; the power fails where one more is than `last`."""

    last: int | None = None
    done: int = 0

    def __call__(self, items, description, total):
        for item in items:
            if self.done == self.last:
                raise KeyboardInterrupt
            self.done += 1
            yield item


def engine():
    model = tiny_model("llama", vocab_size=len(TOKENIZER))
    return Local(TOKENIZER, Sampling(1.0, 1.0, 9, 2), 4, lambda: model)


def run(folder, counted):
    return generate_stage(folder, "0123456789abcdef-key", lambda kept: answer(engine(), ASKED, 3, counted, kept))


@pytest.mark.parametrize(("last", "left"), only([(0, 28), (5, 24), (13, 16), (14, 14), (20, 10)], (5, 24), (14, 14)))
def test_a_killed_generation_goes_on_with_the_same_bits(last, left, tmp_path):
    whole, first, second = Counted(), Counted(last), Counted()
    expected = run(tmp_path / "whole", whole)
    assert whole.done == 28  # 14 samples of two turns, four at a time
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", first)
    assert not (tmp_path / "killed" / "generations.jsonl").exists()
    assert run(tmp_path / "killed", second) == expected
    assert (first.done, second.done) == (last, left)  # a batch that was cut off is decoded again
    written = [(tmp_path / name / "generations.jsonl").read_bytes() for name in ("whole", "killed")]
    assert written[0] == written[1]
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        "generations.jsonl",
        "generations.key.json",
    ]


def test_a_torn_line_costs_its_batch_alone(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counted(13))
    (partial,) = tmp_path.glob("*.partial.jsonl")
    partial.write_bytes(partial.read_bytes()[:-40])
    second = Counted()
    generations = run(tmp_path, second)
    assert second.done == 20
    assert generations == answer(engine(), ASKED, 3)


def test_other_answers_are_not_taken_over(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counted(13))
    other = Counted()
    generate_stage(tmp_path, "fedcba9876543210", lambda kept: answer(engine(), ASKED, 4, other, kept))
    assert other.done == 28
    assert len(list(tmp_path.glob("*.partial.jsonl"))) == 1  # the first may still go on


def test_a_process_that_is_killed_leaves_what_it_had(tmp_path):
    """SIGKILL in the middle, as by a scheduler."""
    middle = get_context("fork").Event()

    def stuck(items, description, total):
        for index, item in enumerate(items):
            if index == 9:  # of the third batch
                middle.set()
                time.sleep(60)
            yield item

    process = forked(tmp_path, run, tmp_path, stuck)
    assert middle.wait(timeout=60), (tmp_path / "err").read_text()
    process.kill()
    process.join()
    second = Counted()
    assert run(tmp_path, second) == answer(engine(), ASKED, 3, silent)
    assert second.done == 20
    assert read_generations(tmp_path / "generations.jsonl")[0].prompt == ASKED.questions[0].prompt
