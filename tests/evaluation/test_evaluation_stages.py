"""The stages: what is stored is reused exactly when it answers the same question, and joined without loss."""

import json
import math
import os
from dataclasses import replace

import pytest

from dpo_ref.evaluation.results import (
    Evaluation,
    Thresholds,
    degeneration,
    read_evaluation,
    read_scores,
    write_evaluation,
    write_scores,
)
from dpo_ref.evaluation.stages import generate_stage, generation_key, measure_stage, read_evaluated, score_stage
from dpo_ref.files.writing import write_json
from dpo_ref.generation.engine import held_out
from tests.support import evaluations as invented

PROMPTS = [({"role": "user", "content": "a"},), ({"role": "user", "content": "b"},)]
ASKED = held_out(PROMPTS)
OPTIONS = {"temperature": 1.0, "max_new_tokens": 8, "batch_size": 4}


def test_the_key_of_generations_changes_with_what_determines_them_and_nothing_else():
    base = generation_key("w", "t", ASKED, 0, OPTIONS)
    assert base == generation_key("w", "t", held_out([list(p) for p in PROMPTS]), 0, OPTIONS | {"batch_size": 99})
    others = [
        generation_key("v", "t", ASKED, 0, OPTIONS),
        generation_key("w", "u", ASKED, 0, OPTIONS),
        generation_key("w", "t", held_out(PROMPTS[:1]), 0, OPTIONS),
        generation_key("w", "t", ASKED, 1, OPTIONS),
        generation_key("w", "t", ASKED, 0, OPTIONS | {"temperature": 0.5}),
    ]
    assert len({base, *others}) == 6


def test_generations_are_made_once_per_key(tmp_path):
    seeds = []

    def make(seed):
        seeds.append(seed)
        return invented.answers(3, 2, 5, 1.0, 0.5, seed=seed)[0]

    first = generate_stage(tmp_path / "run", "k", lambda kept: make(1))
    assert generate_stage(tmp_path / "run", "k", lambda kept: make(2)) == first
    assert generate_stage(tmp_path / "run", "other", lambda kept: make(3)) != first
    assert seeds == [1, 3]
    (tmp_path / "run" / "generations.jsonl").unlink()
    generate_stage(tmp_path / "run", "other", lambda kept: make(4))
    assert seeds == [1, 3, 4]


def test_no_crash_leaves_a_key_beside_other_generations(tmp_path):
    old, new = (invented.answers(2, 1, 5, 1.0, 0.5, seed=seed)[0] for seed in (1, 2))
    generate_stage(tmp_path, "old", lambda kept: old)

    def crash(kept):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_stage(tmp_path, "new", crash)
    assert generate_stage(tmp_path, "old", crash) == old  # nothing was lost
    obstacle = tmp_path / f".generations.key.json.{os.getpid()}"
    obstacle.mkdir()  # the generations will be written, their key will not
    with pytest.raises(OSError, match="directory"):
        generate_stage(tmp_path, "new", lambda kept: new)
    obstacle.rmdir()
    assert generate_stage(tmp_path, "old", lambda kept: old) == old


def test_measurements_are_made_once_per_key_and_leave_out_what_could_not_be_measured(tmp_path):
    metrics = measure_stage(tmp_path, "k", lambda: {"kl/initial": 1.5, "kl/initial_se": math.nan})
    assert metrics == {"kl/initial": 1.5} == measure_stage(tmp_path, "k", lambda: {"kl/initial": 2.0})
    assert measure_stage(tmp_path, "j", lambda: {"kl/initial": 2.0}) == {"kl/initial": 2.0}


def test_scoring_joins_measurements_text_scores_and_comparison(tmp_path):
    baseline = invented.initial(tmp_path / "initial")
    generations, _ = invented.answers(40, 2, 30.0, 0.5, 0.0, seed=3)
    scores = [score + 0.01 for score in baseline.scores]  # above the baseline's where the two were equal
    about = Evaluation("run", "gold", {"kl/initial": 3.25}, objective="dpo", beta=0.1)
    generate_stage(tmp_path / "run", "k", lambda kept: generations)
    evaluated = score_stage(tmp_path / "run", about, generations, scores, baseline, seed=0)
    metrics = evaluated.evaluation.metrics
    assert metrics["kl/initial"] == 3.25
    assert metrics["gold/mean"] == pytest.approx(baseline.evaluation.metrics["gold/mean"] + 0.01)
    assert 0.7 < metrics["winrate/initial_low"] <= metrics["winrate/initial"] <= metrics["winrate/initial_high"]
    assert (evaluated.evaluation.num_prompts, evaluated.evaluation.num_generations) == (40, 80)
    assert [reason[:6] for reason in evaluated.evaluation.degenerate] == ["only 5", "answer"]
    assert read_evaluated(tmp_path / "run") == evaluated
    assert baseline.evaluation.baseline is None
    assert not any(key.startswith("winrate") for key in baseline.evaluation.metrics)


def test_evaluations_survive_the_disk_without_nan(tmp_path):
    evaluation = Evaluation("x", "gold", {"a": 1.0, "b": math.nan, "c": math.inf}, beta=0.3, degenerate=["why"])
    write_evaluation(tmp_path, evaluation)
    assert json.loads((tmp_path / "evaluation.json").read_text())["metrics"] == {"a": 1.0, "b": None, "c": None}
    assert read_evaluation(tmp_path) == replace(evaluation, metrics={"a": 1.0})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "evaluation.json", {"a": math.nan})
    assert read_evaluation(tmp_path) == replace(evaluation, metrics={"a": 1.0})


def test_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"evaluation\.json cannot be read"):
        read_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text("[1]")
    with pytest.raises(ValueError, match="no JSON object"):
        read_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="lacks scorer, metrics"):
        read_evaluation(tmp_path)


def test_scores_of_other_generations_are_refused(tmp_path):
    generations, scores = invented.answers(3, 1, 6, 1.0, 0.5, seed=1)
    write_scores(tmp_path, "gold", generations, scores)
    assert read_scores(tmp_path, generations) == scores
    changed = [replace(generations[0], output="else"), *generations[1:]]
    with pytest.raises(ValueError, match="other generations"):
        read_scores(tmp_path, changed)


@pytest.mark.parametrize(
    ("metrics", "reasons"),
    [
        ({"ended/share": 0.8, "repetition/seq_rep_4": 0.5, "lengths/response": 20.0}, 0),  # at the thresholds: healthy
        ({"ended/share": 0.79}, 1),
        ({"repetition/seq_rep_4": 0.51}, 1),
        ({"lengths/response": 20.1}, 1),
        ({"ended/share": 0.1, "repetition/seq_rep_4": 0.9, "lengths/response": 90.0}, 3),
        ({}, 0),
    ],
)
def test_verdict_at_its_thresholds(metrics, reasons):
    assert len(degeneration(metrics, {"lengths/response": 10.0})) == reasons
    assert len(degeneration(metrics, {})) == reasons - (
        "lengths/response" in metrics and metrics["lengths/response"] > 20
    )


def test_thresholds_are_configuration():
    assert degeneration({"ended/share": 0.79}, {}, Thresholds(min_ended_share=0.5)) == []
    (reason,) = degeneration({"lengths/response": 31.0}, {"lengths/response": 10.0}, Thresholds(max_length_ratio=3.0))
    assert reason == "answers are 3.10 times as long as the initial policy's (above 3)"
