"""`python evaluate.py stage=winrate` as a user runs it: what it reads, what it writes, and what it refuses."""

import csv
import json
import re
import shlex

import numpy as np
import pytest

from tests.support.annotations import evaluate, preferences, rows, written
from tests.support.command import ROOT, composed

PAGE = (ROOT / "docs" / "winrates.md").read_text()


@pytest.fixture
def folder(tmp_path):
    """Three models against one baseline, as AlpacaEval leaves them."""
    for seed, (model, mean) in enumerate({"good": 0.7, "fair": 0.5, "poor": 0.2}.items()):
        written(tmp_path / "in" / model / "annotations.json", rows(model, preferences(seed, mean)))
    return tmp_path


def test_a_folder_of_annotations(folder, capsys):
    evaluate("stage=winrate", f"annotations={folder / 'in'}", f"output_dir={folder / 'out'}")
    shown = capsys.readouterr().out
    winrates = json.loads((folder / "out" / "winrates.json").read_text())
    assert [rate["model"] for rate in winrates["rates"]] == ["good", "fair", "poor"]
    good = winrates["rates"][0]["metrics"]
    assert good["win_rate"] == pytest.approx(np.mean(preferences(0, 0.7)) - 1)
    assert good["win_rate_se"] == pytest.approx(good["standard_error"])  # each prompt once
    assert (good["n_wins"] + good["n_wins_base"], good["num_compared"], good["num_missing"]) == (60, 60, 0)
    assert winrates["rates"][0]["fitted"] is None
    assert "length_controlled" not in good
    first = winrates["versus"][0]
    assert (first["model"], first["other"]) == ("good", "fair")
    gaps = np.array(preferences(0, 0.7)) - np.array(preferences(1, 0.5))
    assert first["difference"]["mean"] == pytest.approx(gaps.mean())
    (strengths,) = winrates["strengths"]["someone"]
    assert strengths["anchor"] == "base"
    assert [strength["model"] for strength in strengths["strengths"]] == ["good", "fair", "base", "poor"]
    table = list(csv.DictReader((folder / "out" / "winrates.csv").read_text().splitlines()))
    assert float(table[0]["win_rate"]) == good["win_rate"]
    assert float(table[2]["strength"]) == strengths["strengths"][3]["value"]
    assert (folder / "out" / "winrates.png").read_bytes().startswith(b"\x89PNG")
    assert "good is better than fair against base: +" in shown
    assert re.search(r"good +\d\d\.\d±\d\.\d", shown)
    assert "Bradley–Terry, judged by someone" in shown


def test_twice_is_the_same(folder):
    for out in ("one", "two"):
        evaluate("stage=winrate", f"annotations={folder / 'in'}", f"output_dir={folder / out}")
    for name in ("winrates.json", "winrates.csv"):
        assert (folder / "one" / name).read_text() == (folder / "two" / name).read_text()


def test_missing_preferences_are_counted_and_a_single_model_has_no_strengths(tmp_path, capsys):
    path = written(tmp_path / "mine.json", rows("mine", [2.0, 1.0, None, 1.75, float("nan")]))
    evaluate("stage=winrate", f"annotations=[{path}]", f"output_dir={tmp_path / 'out'}")
    winrates = json.loads((tmp_path / "out" / "winrates.json").read_text())
    metrics = winrates["rates"][0]["metrics"]
    assert (metrics["num_compared"], metrics["num_missing"]) == (3, 2)
    assert metrics["win_rate"] == pytest.approx(1.75 / 3)
    assert winrates["strengths"] == {}
    assert "mine wins 58.3 [" in capsys.readouterr().out


def test_baselines_of_one_name_with_other_answers_are_kept_apart(tmp_path, capsys):
    for model, answer in (("a", "b" * 40), ("b", "c" * 40)):
        written(tmp_path / model / "annotations.json", rows(model, preferences(1, 0.5), "initial", answer=answer))
    evaluate("stage=winrate", f"annotations={tmp_path}", f"output_dir={tmp_path / 'out'}")
    winrates = json.loads((tmp_path / "out" / "winrates.json").read_text())
    assert {rate["baseline"] for rate in winrates["rates"]} == {"initial of a", "initial of b"}
    assert (winrates["versus"], winrates["strengths"]) == ([], {})
    assert "initial is not the same model everywhere" in capsys.readouterr().out


def judgments(folder, lines, name="run", baseline="initial"):
    """What our judge leaves in an evaluation's folder."""
    written(folder / "evaluation.json", {"name": name, "baseline": baseline, "scorer": "none", "metrics": {}})
    written(folder / "judge.json", {"judge": {"name": "alpaca_eval", "model": "some-model"}, "metrics": {}})
    content = [
        {
            "prompt": [{"role": "user", "content": f"question {index // 2}"}],
            "prompt_index": index // 2,
            "sample_index": index % 2,
            "output": "long" * (index + 1),
            "baseline_output": f"short {index % 2}",
            "preference": preference,
            "opinions": [],
        }
        for index, preference in enumerate(lines)
    ]
    (folder / "judgments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder / "judgments.jsonl"


def test_our_own_judgments_are_read_with_their_names(tmp_path):
    path = judgments(tmp_path, [1.0, 0.75, None, 0.5, 0.0, 0.25])
    evaluate("stage=winrate", f"annotations={path}", f"output_dir={tmp_path / 'out'}")
    (rate,) = json.loads((tmp_path / "out" / "winrates.json").read_text())["rates"]
    assert (rate["model"], rate["baseline"], rate["judge"]) == ("run", "initial", "alpaca_eval (some-model)")
    metrics = rate["metrics"]
    assert (metrics["win_rate"], metrics["num_missing"]) == (pytest.approx(2.5 / 5), 1)
    assert metrics["win_rate_se"] > metrics["standard_error"]  # two answers to each prompt agree more than others
    bad = judgments(tmp_path / "bad", [1.0, 1.5])
    with pytest.raises(ValueError, match=r"row 2: preference=1\.5 is not in \[0, 1\]; judge again with stage=judge"):
        evaluate("stage=winrate", f"annotations={bad}")
    (tmp_path / "judge.json").unlink()
    with pytest.raises(ValueError, match=r"judge\.json cannot be read"):
        evaluate("stage=winrate", f"annotations={path}")


BAD_ROWS = {
    "preference": ([{**rows("m", [1.5])[0], "preference": 3}], r"row 1: preference=3 is not in 1\.\.2"),
    "lacking": ([{"instruction": "q"}], r"row 1 lacks 'generator_2'; AlpacaEval's annotations are a list of"),
    "no text": ([{**rows("m", [1.5])[0], "output_2": None}], r"row 1: output_2 is NoneType, not text"),
    "no list": ({"rows": []}, r"is no list of rows"),
    "a string": ([*rows("m", [1.5]), "x"], r"row 2: "),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(case, tmp_path):
    content, message = BAD_ROWS[case]
    path = written(tmp_path / "annotations.json", content)
    with pytest.raises(ValueError, match=message) as error:
        evaluate("stage=winrate", f"annotations={path}", f"output_dir={tmp_path / 'out'}")
    assert str(path) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_judged_twice_is_refused(tmp_path):
    paths = [written(tmp_path / f"{n}.json", rows("m", [1.5, 2.0])) for n in range(2)]
    with pytest.raises(ValueError, match=r"m against base, judged by someone, is in .*0\.json and in .*1\.json"):
        evaluate("stage=winrate", f"annotations=[{paths[0]},{paths[1]}]")


BAD_WORDS = {
    "nothing": (["stage=winrate"], "stage=winrate needs annotations=<annotations.json"),
    "a number": (["stage=winrate", "annotations=[1]"], "stage=winrate needs annotations="),
    "another stage": (["annotations=x.json"], "annotations has no effect on stage=all: it belongs to stage=winrate"),
    "another's df_gamed": (["policy=lab:tiny", "df_gamed=hub"], "df_gamed has no effect on stage=all"),
    "a policy": (["stage=winrate", "annotations=x", "policy=lab:tiny"], "policy has no effect on stage=winrate"),
    "an option": (["stage=winrate", "annotations=x", "generation.temperature=0.5"], "generation has no effect on"),
    "no file": (["stage=winrate", "annotations=nowhere.json"], "annotations: nowhere.json cannot be read"),
    "an empty folder": (["stage=winrate", "annotations=docs"], "docs holds no annotations*.json or judgments.jsonl"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_words_without_effect_are_refused(case):
    overrides, message = BAD_WORDS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(*overrides)


COMMANDS = sorted(set(re.findall(r"^python evaluate\.py.*?(?=\s+#|$)", PAGE, re.MULTILINE)))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_compose(command):
    cfg, _ = composed(*shlex.split(command)[2:], kind="evaluate")
    assert cfg.stage == "winrate"


def test_the_page_names_every_metric(folder):
    evaluate("stage=winrate", f"annotations={folder / 'in'}", f"output_dir={folder / 'out'}")
    metrics = json.loads((folder / "out" / "winrates.json").read_text())["rates"][0]["metrics"]
    bare = {re.sub(r"_(se|low|high)$", "", name) for name in metrics}
    assert not {name for name in bare if f"`{name}`" not in PAGE}
    assert len(COMMANDS) >= 3
