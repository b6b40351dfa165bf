"""Exports as the other tools read them, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_ref.data.tokenise import tokenise
from dpo_ref.generation import prompt_sets
from dpo_ref.generation.engine import PromptSet, Question, answer
from dpo_ref.generation.records import read_generations
from dpo_ref.reports.exports import Answers, RewardedPairs, alpaca_eval, arena_hard, mt_bench
from dpo_ref.reports.exports import rewardbench as rewardbench_rows
from dpo_ref.types import Message, silent, words_of
from tests.support.command import train
from tests.support.evaluate_command import DATA, PLAIN, TRAIN, evaluate, measure, numbers
from tests.support.evaluations import pair
from tests.support.questions import ALPACA, MT_BENCH, TOKENIZER, engine, written
from tests.support.tiny import tiny_model

ARENA = [
    {"uid": "ab12", "category": "hard_prompt", "prompt": "a cat"},
    {"uid": "cd34", "category": "x", "prompt": "b"},
]


def answers(read, rows, tmp_path, **options):
    questions = read(0, silent, path=written(tmp_path / "q.jsonl", rows))
    return Answers("my_run", answer(engine(**options), questions, 7), 1234.5)


def rows_of(export) -> list:
    return [json.loads(line) for line in export.text.splitlines()]


def test_alpaca_eval(tmp_path):
    """Its own reader makes a table of the list and joins it to the reference's by `instruction`."""
    model_answers = answers(prompt_sets.alpaca_eval, ALPACA, tmp_path)
    export = alpaca_eval(model_answers, model_name="mine", sample=1)
    assert export.path == Path("alpaca_eval/model_outputs.json")
    outputs = {g.prompt_index: g.output for g in model_answers.generations if g.sample_index == 1}
    assert json.loads(export.text) == [
        {"instruction": "a cat", "output": outputs[0], "generator": "mine", "dataset": "helpful_base"},
        {"instruction": "the dog ran", "output": outputs[1], "generator": "mine", "dataset": "koala"},
    ]
    assert outputs[0] != outputs[1]


def test_mt_bench(tmp_path):
    """FastChat looks answers up by question and takes `choices[0]["turns"][turn]`."""
    model_answers = answers(prompt_sets.mt_bench, MT_BENCH[::-1], tmp_path)
    export = mt_bench(model_answers)
    assert export.path == Path("mt_bench/model_answer/my_run.jsonl")
    by_id = {row["question_id"]: row for row in rows_of(export)}
    assert list(by_id) == [81, 111]
    for g in model_answers.generations:
        row = by_id[g.question_id]
        assert row["choices"][g.sample_index]["index"] == g.sample_index
        assert row["choices"][g.sample_index]["turns"][g.turn - 1] == g.output
        assert (row["model_id"], row["tstamp"], len(row["answer_id"])) == ("my_run", 1234.5, 22)
    assert len({row["answer_id"] for row in by_id.values()}) == 2


def test_arena_hard(tmp_path):
    """Its tools look answers up by uid and take `messages[-1]["content"]["answer"]`."""
    model_answers = answers(prompt_sets.arena_hard, ARENA, tmp_path)
    export = arena_hard(model_answers)
    assert export.path == Path("arena_hard/model_answer/my_run.jsonl")
    by_uid = {row["uid"]: row for row in rows_of(export)}
    first = {g.question_id: g for g in model_answers.generations if g.sample_index == 0}
    assert list(by_uid) == ["ab12", "cd34"]
    for uid, row in by_uid.items():
        assert row["messages"] == [
            {"role": "user", "content": first[uid].prompt[0]["content"]},
            {"role": "assistant", "content": {"answer": first[uid].output}},
        ]
        assert row["model"] == "my_run"


def test_rewardbench_reads_whole_conversations(tmp_path):
    """Its reader takes the prompt to be all of `chosen` but the last message, and drops our `prompt` for it."""
    datasets = pytest.importorskip("datasets")
    pairs = [pair(), pair(chosen_reward=-0.25), pair(chosen_reward=-0.5)]
    export = rewardbench_rows(RewardedPairs("my_run", "lab", pairs))
    path = tmp_path / "pairs.jsonl"
    path.write_text(export.text)
    table = datasets.load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"))["train"]
    assert table["results"][:] == [1, 0, 0]
    assert (table["scores_chosen"][0], table["scores_rejected"][0], table["subset"][0]) == (0.5, -0.25, "lab")
    for row in table:
        assert row["chosen"][:-1] == row["rejected"][:-1] == list(pair().prompt)
        assert (row["chosen"][-1]["content"], row["rejected"][-1]["content"]) == ("good", "bad")
        assert row["prompt"] == "a cat"


def several_turns():
    question = Question((Message(role="user", content="a"),), ("b",))
    return Answers("r", answer(engine(), PromptSet("jsonl", (question,)), 7), 0.0)


def one_turn():
    question = Question((Message(role="user", content="a"),), (), 5)
    return Answers("r", answer(engine(), PromptSet("mt_bench", (question,)), 7), 0.0)


def with_system():
    question = Question((Message(role="system", content="s"), Message(role="user", content="a")))
    return Answers("r", answer(engine(), PromptSet("jsonl", (question,)), 7), 0.0)


REFUSED = {
    "other questions": (
        lambda: mt_bench(several_turns()),
        "export=mt_bench wants answers to the questions of mt_bench; these are to jsonl: generate them with "
        "prompts=mt_bench prompts.path=<its question file>",
    ),
    "data": (
        lambda: arena_hard(Answers("r", [replace(several_turns().generations[0], prompt_set="")], 0.0)),
        "these are to the data's prompts",
    ),
    "several turns": (lambda: alpaca_eval(several_turns()), "prompt 0 has user, assistant, user: ask such questions"),
    "system": (lambda: alpaca_eval(with_system()), "prompts of one message by the user; prompt 0 has system, user"),
    "one turn": (lambda: mt_bench(one_turn()), "wants two answers to every question; question 5 has another number"),
    "sample": (lambda: alpaca_eval(one_turn(), sample=2), "wants sample 2 of every prompt; prompt 0 has none"),
    "negative": (lambda: alpaca_eval(one_turn(), sample=-1), "export.sample counts from 0 and stays below"),
    "name": (lambda: alpaca_eval(one_turn(), model_name="my/model"), "export.model_name=my/model becomes a file"),
    "no pairs": (lambda: rewardbench_rows(RewardedPairs("r", "d", [])), "wants held-out pairs; there are none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_the_remedy(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "my_run"
    assert train(*TRAIN, f"output_dir={folder}", "beta=0.1", "trainer.max_steps=2").returncode == 0
    return folder


def test_the_rewards_are_those_the_evaluation_measures(run):
    """Accuracy and margins of the exported pairs are the evaluation's, which another function computes."""
    measure(f"policy={run}", *PLAIN)
    evaluate(f"policy={run}", "stage=export", "export=rewardbench")
    path = run / "evaluation" / "exports" / "rewardbench" / "pairs.jsonl"
    rows, metrics = list(map(json.loads, path.read_text().splitlines())), numbers(run / "evaluation")["metrics"]
    assert len(rows) == metrics["rewards/num_pairs"] == 12
    assert sum(row["results"] for row in rows) / 12 == pytest.approx(metrics["rewards/accuracies"], abs=1e-9)
    margins = [row["scores_chosen"] - row["scores_rejected"] for row in rows]
    assert sum(margins) / 12 == pytest.approx(metrics["rewards/margins"], abs=1e-6)
    assert {row["subset"] for row in rows} == {"lab"}
    before = path.read_bytes()
    evaluate(f"policy={run}", "stage=export", "export=rewardbench")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["pairs.jsonl"]


def test_rows_belong_to_their_pairs():
    """Groups of several pairs and one that is too long: each row has the texts that its rewards are of."""
    from dpo_ref.cli.exports import rewarded_pairs
    from dpo_ref.evaluation.heldout import score_pairs
    from dpo_ref.types import PromptGroup

    texts = [("a cat", ("yes", "no", "maybe a cat"), ((0, 1), (2, 0))), ("b", ("x" * 300, "y"), ((0, 1),)),
             ("the dog ran", ("what is it?", "of course!"), ((1, 0),))]  # fmt: skip
    held_out = [PromptGroup((Message(role="user", content=p),), r, pairs) for p, r, pairs in texts]
    groups = tokenise(held_out, TOKENIZER, max_length=80).groups
    model = tiny_model("llama", vocab_size=len(TOKENIZER))
    policy = score_pairs(model, groups, {TOKENIZER.eos_token_id})
    rows = rewarded_pairs(
        held_out, groups, policy, replace(policy, chosen=policy.chosen * 0, rejected=policy.rejected * 0)
    )
    assert [(words_of(row.chosen), words_of(row.rejected)) for row in rows] == [
        ("yes", "no"), ("maybe a cat", "yes"), ("of course!", "what is it?"),
    ]  # fmt: skip
    assert rows[0].chosen_reward == rows[1].rejected_reward != rows[0].rejected_reward


def test_answers_are_exported_by_the_command(run, tmp_path):
    path = written(tmp_path / "alpaca_eval.json", ALPACA)
    folder = tmp_path / "alpaca"
    asked = ["prompts=alpaca_eval", f"prompts.path={path}", "stage=generate", f"output_dir={folder}"]
    evaluate(f"policy={run}", *PLAIN[:-1], *DATA, *asked)
    evaluate(f"policy={run}", "stage=export", "export=alpaca_eval", "export.sample=1", f"output_dir={folder}")
    rows = json.loads((folder / "exports" / "alpaca_eval" / "model_outputs.json").read_text())
    stored = [g for g in read_generations(folder / "generations.jsonl") if g.sample_index == 1]
    assert [row["output"] for row in rows] == [g.output for g in stored]
    assert {row["generator"] for row in rows} == {"my_run"}
    with pytest.raises(ValueError, match="these are to alpaca_eval: generate them with prompts=mt_bench"):
        evaluate(f"policy={run}", "stage=export", "export=mt_bench", f"output_dir={folder}")


WORDS = {
    "no format": (["policy={run}", "stage=export"], "stage=export needs export=<format>, such as export=alpaca_eval"),
    "no policy": (["stage=export", "export=mt_bench"], "stage=export needs policy=<run or model folder>"),
    "elsewhere": (
        ["policy={run}", "export=mt_bench"],
        "export has no effect on stage=all: it belongs to stage=export",
    ),
    "temperature": (
        ["policy={run}", "stage=export", "export=mt_bench", "generation.temperature=0"],
        "generation has no effect on stage=export export=mt_bench; leave it out",
    ),
    "data": (
        ["policy={run}", "stage=export", "export=mt_bench", *DATA],
        "data has no effect on stage=export export=mt",
    ),
    "sweep": (["stage=export", "export=mt_bench", "sweep=x", "policy={run}"], "sweep has no effect on stage=export"),
    "not evaluated": (
        ["policy=lab:tiny", "stage=export", "export=mt_bench", "output_dir={run}/nowhere"],
        "generations.jsonl does not exist; make it with stage=generate",
    ),
    "no run": (["policy=lab:tiny", "stage=export", "export=rewardbench", *DATA], "policy=lab:tiny is no run"),
}


@pytest.mark.parametrize("case", WORDS)
def test_words_without_effect_are_refused(case, run):
    overrides, message = WORDS[case]
    with pytest.raises(ValueError) as error:
        evaluate(*(override.format(run=run) for override in overrides))
    assert message in str(error.value)


def test_turns_are_not_judged_as_single_answers(tmp_path):
    from dpo_ref.evaluation.judging.judge import answer_pairs

    generations = answers(prompt_sets.mt_bench, MT_BENCH, tmp_path).generations
    with pytest.raises(ValueError, match="these questions have further turns; stage=export export=mt_bench hands"):
        answer_pairs(generations, generations)
    assert len(answer_pairs([g for g in generations if g.turn == 1], [g for g in generations if g.turn == 1])) == 4
