"""The group `export`: answers, and held-out pairs, in the files that other evaluations read."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from dpo_ref.generation.records import Generation
from dpo_ref.types import Message, digest


@dataclass(frozen=True, slots=True)
class Answers:
    """A policy's stored answers; `written` is when, in seconds since 1970."""

    name: str
    generations: Sequence[Generation]
    written: float


class RewardedPair(NamedTuple):
    """A held-out pair and its implicit rewards, log policy - log reference of whole responses in nats."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    chosen_reward: float
    rejected_reward: float
    origin: str


@dataclass(frozen=True, slots=True)
class RewardedPairs:
    """A policy's pairs; `subset` is the data's name."""

    name: str
    subset: str
    pairs: Sequence[RewardedPair]


class Export(NamedTuple):
    """A file to write, by its path below the folder of exports."""

    path: Path
    text: str
    num_rows: int


def _refuse(export: str, wants: str, observed: str, remedy: str) -> ValueError:
    return ValueError(f"export={export} wants {wants}; {observed}: {remedy}")


def _checked_name(model_name: str | None, otherwise: str) -> str:
    """The name under which other tools list the policy."""
    name = otherwise if model_name is None else model_name
    if not name or set(name) & set('/\\:*?"<>|') or name.startswith("."):
        raise ValueError(f"export.model_name={name} becomes a file's name; choose one of letters, digits, -, _ and .")
    return name


def _of_prompt_set(export: str, answers: Answers) -> Sequence[Generation]:
    """The answers, which must be to the questions of that name."""
    sets = sorted({generation.prompt_set or "the data's prompts" for generation in answers.generations})
    if sets != [export]:
        remedy = f"generate them with prompts={export} prompts.path=<its question file>"
        raise _refuse(export, f"answers to the questions of {export}", f"these are to {', '.join(sets)}", remedy)
    return answers.generations


def _one_each(export: str, generations: Sequence[Generation], sample: int) -> list[Generation]:
    """One single answer to every prompt of one message."""
    answers = [generation for generation in generations if generation.sample_index == sample]
    lacking = {generation.prompt_index for generation in generations} - {answer.prompt_index for answer in answers}
    if lacking or sample < 0:
        raise _refuse(
            export, f"sample {sample} of every prompt", f"prompt {min(lacking, default=0)} has none",
            "export.sample counts from 0 and stays below generation.samples_per_prompt",
        )  # fmt: skip
    for answer in answers:
        if answer.turn > 1 or [message["role"] for message in answer.prompt] != ["user"]:
            roles = ", ".join(message["role"] for message in answer.prompt)
            remedy = "ask such questions, as prompts=alpaca_eval or prompts=jsonl do"
            raise _refuse(
                export, "prompts of one message by the user", f"prompt {answer.prompt_index} has {roles}", remedy
            )
    return answers


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def alpaca_eval(answers: Answers, *, model_name: str | None = None, sample: int = 0) -> Export:
    """AlpacaEval's `model_outputs.json` (Li et al. 2023): {instruction, output, generator, dataset} for each prompt.

    Any prompts of one message will do; its own comparison, baseline and leaderboard need its 805. `sample` is which
    of several answers. Raises ValueError for other prompts, and for a sample that is not there.
    """
    name = _checked_name(model_name, answers.name)
    rows = [
        {
            "instruction": answer.prompt[0]["content"],
            "output": answer.output,
            "generator": name,
            "dataset": answer.category or answer.prompt_set,
        }
        for answer in _one_each("alpaca_eval", answers.generations, sample)
    ]
    return Export(Path("alpaca_eval/model_outputs.json"), json.dumps(rows, indent=2, ensure_ascii=False), len(rows))


def arena_hard(answers: Answers, *, model_name: str | None = None, sample: int = 0) -> Export:
    """Arena-Hard's `model_answer/<model>.jsonl` (Li et al. 2024, arXiv:2406.11939), as its tools read it for both
    versions: {uid, ans_id, model, messages, tstamp}.

    The `metadata` that its style control asks for counts tokens of a tokenizer of its own: its `add_markdown_info.py`
    adds it. `sample` is which of several answers. Raises ValueError for answers to other questions.
    """
    name = _checked_name(model_name, answers.name)
    rows = [
        {
            "uid": answer.question_id,
            "ans_id": digest([name, answer.question_id, answer.output])[:22],
            "model": name,
            "messages": [dict(answer.prompt[0]), {"role": "assistant", "content": {"answer": answer.output}}],
            "tstamp": answers.written,
        }
        for answer in _one_each("arena_hard", _of_prompt_set("arena_hard", answers), sample)
    ]
    return Export(Path(f"arena_hard/model_answer/{name}.jsonl"), _lines(rows), len(rows))


def mt_bench(answers: Answers, *, model_name: str | None = None) -> Export:
    """MT-Bench's `model_answer/<model>.jsonl` (Zheng et al. 2023, arXiv:2306.05685) as FastChat reads it: a line per
    question, {question_id, answer_id, model_id, choices, tstamp}; a choice per sample, with the answers of all turns.
    Raises ValueError for answers to other questions, and for a question without its second turn."""
    name, rows = _checked_name(model_name, answers.name), []
    by_question = defaultdict(list)
    for generation in _of_prompt_set("mt_bench", answers):
        by_question[generation.question_id].append(generation)
    for id, members in sorted(by_question.items()):
        members.sort(key=lambda generation: (generation.sample_index, generation.turn))
        choices = [
            {"index": sample, "turns": [generation.output for generation in turns]}
            for sample, turns in groupby(members, key=lambda generation: generation.sample_index)
        ]
        if any(len(choice["turns"]) != 2 for choice in choices):
            wants = "two answers to every question"
            raise _refuse("mt_bench", wants, f"question {id} has another number", "give it FastChat's question.jsonl")
        answer = {"question_id": id, "answer_id": digest([name, id, choices])[:22], "model_id": name}
        rows.append(answer | {"choices": choices, "tstamp": answers.written})
    return Export(Path(f"mt_bench/model_answer/{name}.jsonl"), _lines(rows), len(rows))


def rewardbench(pairs: RewardedPairs, *, model_name: str | None = None) -> Export:
    """The held-out pairs in RewardBench's layout (Lambert et al. 2024, arXiv:2403.13787): {prompt, chosen, rejected,
    subset, id}, both responses as whole conversations, with the implicit rewards that the policy gives them.

    `scores_chosen` and `scores_rejected` are log policy - log reference in nats, without beta, as RewardBench has them
    for DPO models; `results` is 1 where chosen has the higher one, 0 elsewhere, ties included. Raises ValueError for
    no pairs.
    """
    name = _checked_name(model_name, pairs.name)
    if not pairs.pairs:
        raise _refuse("rewardbench", "held-out pairs", "there are none", "hold some out with data.eval_fraction")
    rows = [
        {
            "id": index,
            "subset": pairs.subset,
            "prompt": pair.prompt[-1]["content"],
            "chosen": [*pair.prompt, *pair.chosen],
            "rejected": [*pair.prompt, *pair.rejected],
            "model": name,
            "scores_chosen": pair.chosen_reward,
            "scores_rejected": pair.rejected_reward,
            "results": int(pair.chosen_reward > pair.rejected_reward),
            "origin": pair.origin,
        }
        for index, pair in enumerate(pairs.pairs)
    ]
    return Export(Path("rewardbench/pairs.jsonl"), _lines(rows), len(rows))
