"""Studies ask for what can be run, choose by their rule, and their pages say what is committed."""

import gzip
import json
import math
import re
import signal
import threading
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from dpo_ref.files.writing import write_text
from dpo_ref.lab.conversations import read_prompt
from dpo_ref.lab.preferences import draw_prompts
from studies import beyond, frontier, likelihood, necessity, on_policy, real_model, records, runner, stronger, tuning
from studies.__main__ import STUDIES, _time_is_over
from studies.intervals import Interval
from studies.records import INDEX, PAGES, Finding, Record, differences, filled, read, write
from studies.runner import Run, Runs
from tests.support.command import composes, resolved, train
from tests.support.faults import SMALL


def run_of(gold, initial="lab:initial", seed=0, degenerate=False, **words):
    """A policy whose answers to each prompt are worth this."""
    metrics = {"gold": float(np.mean(gold)), "tokens": 10.0 + seed}
    return Run(words, initial, seed, metrics, degenerate, np.array(gold), Path("nowhere"))


# --- plans


STUDIED = {"necessity": (*necessity.METHODS, necessity.AFTERWARDS), "likelihood": likelihood.METHODS}
STUDIED |= {"stronger": stronger.METHODS, "beyond": beyond.METHODS}
STUDIED |= {"frontier": frontier.ON_PAIRS, "on_policy": frontier.ON_SAMPLES}
COMPARED = [(experiment, method) for experiment, methods in STUDIED.items() for method in methods]


@pytest.mark.parametrize(("experiment", "method"), COMPARED, ids=lambda each: getattr(each, "name", each))
def test_what_a_study_compares_composes(experiment, method, tmp_path):
    made_by_it = "data.scorer.path="  # the reward models are not there yet
    (tmp_path / "config.json").write_text("{}")
    own = [f"{made_by_it}{tmp_path}" if word.startswith(made_by_it) else word for word in method.words]
    values = [float(value) for value in method.strengths]
    assert values == sorted(values)
    assert len(values) == len(necessity.METHODS[0].strengths)  # the same chances for all
    for value in method.strengths:
        words = [f"+experiment={experiment}", "model.path=lab:initial", "seed=0", *own]
        resolved(*words, f"{method.key}={value}", f"optim.lr={tuning.LRS[0]}")


@pytest.mark.parametrize("reward", on_policy.REWARDS)
@pytest.mark.parametrize("method", on_policy.METHODS)
def test_what_is_sampled_anew_composes(method, reward):
    for data in on_policy.DATA.values():
        resolved(
            "+experiment=on_policy", *on_policy.METHODS[method], *data, *on_policy.REWARDS[reward], "optim.lr=1e-4"
        )


@pytest.mark.parametrize("name", on_policy.WORLDS | on_policy.AGAIN)
def test_bandits_compose_and_share_no_seed(name):
    world = (on_policy.WORLDS | on_policy.AGAIN)[name]
    for words in world.methods.values():
        resolved(f"+experiment={world.experiment}", *words, f"bandit.lr={world.lrs[-1]}", "bandit.beside=[]")
    assert [float(lr) for lr in world.lrs] == sorted(map(float, world.lrs))
    earlier = on_policy.WORLDS.get(name.split()[0], world)
    used = {*range(earlier.num_seeds), *range(earlier.tuned_on, earlier.tuned_on + 3)}
    own = {*range(world.first_seed, world.first_seed + world.num_seeds)}
    assert not own & set(range(world.tuned_on, world.tuned_on + 3))
    assert world is earlier or not own & used


def test_halves_of_pairs_share_no_prompt(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"question {index % 5}"}], "n": index} for index in range(12)]
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
    own, other = (list(map(json.loads, lines)) for lines in real_model.halves(tmp_path / "pairs.jsonl.gz"))
    prompts = [{row["prompt"][0]["content"] for row in half} for half in (own, other)]
    assert prompts == [{"question 0", "question 2", "question 4"}, {"question 1", "question 3"}]
    assert sorted(row["n"] for row in own + other) == list(range(12))


def test_without_a_model_it_is_told_what_is_missing(monkeypatch):
    monkeypatch.delenv(real_model.MODEL, raising=False)
    with pytest.raises(ValueError, match="DPO_REF_REAL_MODEL must name a folder"):
        real_model._folder(real_model.MODEL)


def test_the_best_place_is_not_degenerate_unless_all_are():
    grid = {
        ("1e-4", "0.1"): Runs([run_of([0.9, 0.9], degenerate=True)]),
        ("1e-4", "0.3"): Runs([run_of([0.5, 0.7])]),
        ("2e-4", "0.3"): Runs([run_of([0.4, 0.6])]),
    }
    assert tuning.best_of(grid) == ("1e-4", "0.3")
    assert tuning.best_of({place: Runs([run_of([0.1], degenerate=True)]) for place in grid}) == ("1e-4", "0.1")


def test_neighbours_and_what_lies_beyond():
    assert tuning._around(["1", "3", "10"], "3") == ["1", "3", "10"]
    assert tuning._around(["1", "3", "10"], "10") == ["3", "10"]
    assert tuning._axes({("1e-3", "10"): 0, ("2e-4", "3"): 0}) == (["2e-4", "1e-3"], ["3", "10"])
    assert [tuning._rounded(10**2 / 3), tuning._rounded(1e-4**2 / 2e-4)] == [30, 5e-5]


def test_where_the_end_token_stops_a_run():
    curve = beyond.Curve(np.array([0.5, 0.6, 0.7, 0.6]), np.array([0.1, -0.2, -0.5, -0.9]))
    assert [curve.stops_at(threshold) for threshold in (0.1, 0.2, 0.5, 2.0)] == [1, 2, 3, 3]


def test_a_curve_is_read_from_what_a_run_noted(tmp_path):
    words = [*SMALL, "beta=1", "trainer.eval_every=2", "evaluation.every=2", "evaluation.num_prompts=2"]
    assert train(*words, "evaluation.max_new_tokens=4", f"output_dir={tmp_path}").returncode == 0
    curve = beyond.curve_of(replace(run_of([0.0]), folder=tmp_path / "evaluation"))
    assert len(curve.gold) == len(curve.end) == 3  # before, after two of four steps, and after the last
    assert curve.end[0] == pytest.approx(0, abs=1e-6)
    assert curve.end[-1] != 0


def test_gold_is_read_off_at_equal_kl():
    kl = np.array([[4.0, 1.0], [9.0, 1.0]])
    line = frontier.Line(["a", "a"], kl, np.array([[0.8, 0.4], [0.7, 0.5]]))
    assert line.at(2.0).tolist() == pytest.approx([0.6, 0.5 + 0.2 * np.log(2) / np.log(9)])
    assert [line.reaches(value) for value in (0.9, 1.0, 4.0, 4.1)] == [False, True, True, False]
    assert frontier._kl_of_best("4") == pytest.approx(np.log(4) - 3 / 4, abs=1e-6)


def test_prompts_of_some_families_are_where_the_lab_has_them():
    prompts = draw_prompts("test", 30)
    mask = frontier.of_families(30, ("sort", "reverse"))
    assert [read_prompt(prompt).family in ("sort", "reverse") for prompt in prompts] == mask.tolist()


# --- policies


def test_runs_are_found_by_their_words_and_paired_by_seed():
    runs = Runs([run_of([1, 2], seed=1, beta="0.10"), run_of([3, 5], seed=0, beta="0.1"), run_of([0, 0], beta="1")])
    weak, strong = runs.at(beta="1e-1"), runs.at(beta="1")
    assert weak.units == [("lab:initial", 0), ("lab:initial", 1)]
    assert weak.where(lambda run: run.seed == 0).less(strong).tolist() == [[3, 5]]
    with pytest.raises(ValueError, match="paired by initial policy and seed"):
        weak.less(strong)
    with pytest.raises(ValueError, match="no run is left"):
        runs.at(beta="2")


def test_a_folder_of_another_command_is_refused(tmp_path):
    write_text(tmp_path / runner.FINISHED, "python train.py -m beta=1")
    runner.run(tmp_path, "train.py", "-m", "beta=1")  # runs nothing
    with pytest.raises(ValueError, match=r"is the result of\n  python train.py -m beta=1\nand not of"):
        runner.run(tmp_path, "train.py", "-m", "beta=2")
    unfinished = tmp_path / "unfinished"
    with pytest.raises(ValueError, match="ended with status"):
        runner.run(unfinished, "-c", "raise SystemExit(3)")
    with pytest.raises(ValueError, match="is the result of"):
        runner.run(unfinished, "-c", "raise SystemExit(0)")


SAVES_ITSELF = """
import pathlib, sys, time
try:
    pathlib.Path(sys.argv[1], "began").touch()
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[1], "saved").touch()
"""


def test_a_command_saves_itself_when_the_time_is_over(tmp_path):
    before = signal.signal(signal.SIGALRM, _time_is_over)
    try:
        threading.Thread(target=_alarm_once_begun, args=(tmp_path / "began",)).start()
        with pytest.raises(TimeoutError):
            runner._typed(["-c", SAVES_ITSELF, str(tmp_path)], {})
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "saved").exists()


def _alarm_once_begun(began):
    while not began.exists():
        time.sleep(0.02)
    time.sleep(0.1)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)


@pytest.mark.slow
def test_a_sweep_is_run_once_and_read(tmp_path):
    words = [*SMALL, "beta=0.1,1", "seed=3,4", "hydra/launcher=side_by_side"]
    runs = runner.sweep(tmp_path, *words)
    assert runs.at(beta="1").units == [("lab:tiny", 3), ("lab:tiny", 4)]
    run = runs.at(beta="1").runs[0]
    assert run.gold.mean() == pytest.approx(run.metrics["gold"])
    assert {bucket.name for bucket in run.classes("chosen")} >= {"end of the answer", "other"}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    runner.sweep(tmp_path, *words)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


# --- records and pages

FOUND = Record(
    {"curve": [{"beta": "0.1", "runs": 10, "degenerate": 2, "gold": Interval(0.5, 0.4, 0.6)}]},
    [Finding("gold is above", Interval(0.5, 0.4, 0.6), True)],
    {"edges": {"dpo": ["beta"]}},
)


def test_a_record_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert read("some") is None
    write("some", FOUND)
    assert read("some") == FOUND
    assert len((tmp_path / "some.json").read_text().splitlines()) < 30
    write("alone", Record({"curve": [{"runs": 1, "kl": Interval(0.5, math.nan, math.nan)}]}, []))
    (row,) = read("alone").rows["curve"]
    assert row["kl"].mean == 0.5
    assert math.isnan(row["kl"].low)
    assert "NaN" not in (tmp_path / "alone.json").read_text()


def test_what_is_not_repeated_is_named():
    def with_gold(value, holds=True):
        rows = [{**FOUND.rows["curve"][0], "gold": Interval(value, value - 0.01, value + 0.01)}]
        return Record({"curve": rows}, [Finding("gold is above", Interval(value, 0, 0), holds)])

    assert differences(FOUND, FOUND) == differences(FOUND, with_gold(0.41)) == []
    assert differences(FOUND, with_gold(0.61)) == [
        "curve, beta=0.1: gold 0.61 is outside of 0.500 [0.400, 0.600]",
    ]
    assert differences(FOUND, with_gold(0.5, holds=False)) == ["test: gold is above"]
    assert differences(FOUND, Record({"curve": []}, FOUND.findings)) == ["curve, beta=0.1: lacking"]
    untested = Record(FOUND.rows, [])
    assert differences(untested, FOUND) == differences(FOUND, untested) == ["test: gold is above"]


COMMITTED = [name for name in STUDIES if read(name)]


@pytest.mark.parametrize("name", COMMITTED)
def test_pages_say_what_is_committed(name):
    page, found = PAGES / f"{name}.md", read(name)
    study, again = import_module(f"studies.{name}"), f"python -m studies {name} --pages"
    assert page.read_text() == filled(page, study.parts(found)), again
    assert INDEX.read_text() == filled(INDEX, {f"{name} answer": study.answer(found)}), again
    assert (PAGES / f"{name}.png").stat().st_size > 10_000


TYPED = {
    line
    for page in PAGES.glob("*.md")
    for line in re.findall(r"^python train\.py .*?(?= +#|$)", page.read_text(), re.M)
}


@pytest.mark.parametrize("command", sorted(TYPED))
def test_what_a_page_types_composes(command):
    composes(command)


def test_a_page_without_a_place_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- a -->\nold\n<!-- end -->\n")
    assert filled(page, {"a": "new"}) == "<!-- a -->\nnew\n<!-- end -->\n"
    with pytest.raises(ValueError, match="has no place <!-- b -->"):
        filled(page, {"b": "new"})
