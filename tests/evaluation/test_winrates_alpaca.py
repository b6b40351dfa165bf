"""AlpacaEval's own length-controlled win rate, from its files in small."""

import hashlib
import json

import numpy as np
import pytest

from dpo_ref.evaluation.statistics import length_control as alpaca_eval
from dpo_ref.evaluation.statistics.length_control import Gamed, LengthControl, length_control, order_digest, read_gamed
from tests.support.annotations import evaluate, preferences, rows, written

# AlpacaEval's own length-controlled win rate


@pytest.fixture
def alpaca(tmp_path, monkeypatch):
    """AlpacaEval in small: 40 instructions, gamed rows and baseline answers under digests of their own."""
    prompts = [f"instruction {index}" for index in range(40)]
    generator = np.random.default_rng(0)
    difficulties = generator.normal(size=40).round(4)
    lines = ["model,preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for name in ("concise", "verbose"):
        lines += [
            f"{name},{generator.uniform():.4f},{index},{generator.normal():.4f},{difficulties[index]},False"
            for index in range(40)
        ]
    (tmp_path / "df_gamed.csv").write_text("\n".join(lines) + "\n")
    answers = [{"instruction": prompt, "output": "b", "generator": alpaca_eval.BASELINE} for prompt in prompts]
    written(tmp_path / "alpaca_eval_gpt4_baseline.json", answers)
    digests = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in alpaca_eval.SHA256}
    monkeypatch.setattr(alpaca_eval, "SHA256", digests)
    monkeypatch.setattr(alpaca_eval, "ORDER", order_digest(prompts))
    return tmp_path, prompts


def judged(prompts, model="mine", baseline=alpaca_eval.BASELINE):
    annotations = rows(model, preferences(7, 0.4, len(prompts)), baseline, prompts=prompts)
    return [{**row, "output_1": "b" * (20 + 11 * n % 50)} for n, row in enumerate(annotations)]


def controlled(folder, content, df_gamed):
    path = written(folder / "annotations.json", content)
    evaluate("stage=winrate", f"annotations={path}", f"df_gamed={df_gamed}", f"output_dir={folder / 'out'}")
    return json.loads((folder / "out" / "winrates.json").read_text())["rates"][0]["metrics"]


def test_rows_are_joined_by_text_whatever_their_order(alpaca):
    folder, prompts = alpaca
    content = judged(prompts)
    plain = controlled(folder, content, folder / "df_gamed.csv")
    assert plain["length_controlled_low"] < plain["length_controlled"] < plain["length_controlled_high"]
    shuffled = [content[index] for index in np.random.default_rng(1).permutation(40)]
    again = controlled(folder, shuffled, folder)
    drawn = {f"{name}_{end}" for name in ("win_rate", "length_adjusted") for end in ("low", "high")}  # in file order
    for name in plain.keys() - drawn:
        assert again[name] == pytest.approx(plain[name], abs=1e-12), name


def test_the_order_comes_from_complete_annotations_or_the_baselines_answers(alpaca):
    folder, prompts = alpaca
    path = str(folder / "df_gamed.csv")
    from_answers = length_control(path, [prompts[::-1]])
    (folder / "alpaca_eval_gpt4_baseline.json").unlink()
    assert length_control(path, [prompts[::-1], prompts]).places == from_answers.places
    assert from_answers.places["instruction 3"] == 3
    with pytest.raises(
        ValueError, match=r"alpaca_eval_gpt4_baseline.json does not exist; download .* in the same folder"
    ):
        length_control(path, [prompts[::-1]])


def test_what_is_not_alpaca_evals_gets_no_such_name(alpaca):
    folder, prompts = alpaca
    changes = {
        "compared with gpt4, AlpacaEval's baseline is gpt4_1106_preview": judged(prompts, baseline="gpt4"),
        "1 of its 41 prompts are not AlpacaEval's, such as 'my own'": judged([*prompts, "my own"]),
        "only 20 of its 40 prompts are there": judged(prompts[:20]),
        "a prompt is there twice": judged([*prompts, prompts[0]]),
    }
    for message, content in changes.items():
        with pytest.raises(ValueError, match="has no length-controlled AlpacaEval win rate") as error:
            controlled(folder, content, folder)
        assert message in str(error.value)
        assert "leave df_gamed out: length_adjusted" in str(error.value)


def test_a_changed_or_missing_file_is_refused_with_the_remedy(alpaca):
    folder, prompts = alpaca
    with pytest.raises(ValueError, match=r"no\.csv does not exist; download df_gamed.csv from .* and give df_gamed="):
        length_control(str(folder / "no.csv"), [prompts])
    with (folder / "df_gamed.csv").open("a") as file:
        file.write("verbose,0.5,0,0.1,0.2,False\n")
    with pytest.raises(ValueError, match=r"is not AlpacaEval's df_gamed.csv \(sha256 \w{12}, not \w{12}\)"):
        length_control(str(folder), [prompts])


def test_the_hub_cannot_be_reached_here_and_the_message_says_what_to_do():
    """The tests run offline (HF_HUB_OFFLINE)."""
    with pytest.raises(
        ValueError, match=r"df_gamed=hub: df_gamed.csv of .* cannot be had .*download df_gamed.csv from"
    ):
        length_control("hub", [])


def test_other_layouts_of_df_gamed_are_refused(alpaca):
    path = alpaca[0] / "df_gamed.csv"
    lines = path.read_text().splitlines()
    (gamed, difficulties) = read_gamed(path)
    assert (len(gamed.preferences), len(difficulties)) == (80, 40)
    path.write_text("\n".join([lines[0].replace("index", "place"), *lines[1:]]))
    with pytest.raises(ValueError, match="has no column index"):
        read_gamed(path)
    path.write_text("\n".join([lines[0], lines[1], lines[1], *lines[2:]]))
    with pytest.raises(ValueError, match="first 40 rows are not one for each instruction"):
        read_gamed(path)
    path.write_text("\n".join([*lines[:-1], lines[-1].replace("False", "True")]))
    with pytest.raises(ValueError, match="not_gamed_baseline must be False"):
        read_gamed(path)
    path.write_text("\n".join([lines[0], "concise,,0,0.1,0.2,False", *lines[2:]]))
    assert len(read_gamed(path)[0].preferences) == 79  # not judged: no row, but its difficulty counts
    assert len(read_gamed(path)[1]) == 40


def test_up_to_one_percent_of_the_instructions_may_lack_a_judgment():
    prompts = [f"i {n}" for n in range(alpaca_eval.NUM_PROMPTS)]
    nothing = Gamed(np.zeros(0), np.zeros(0), np.zeros(0))
    control = LengthControl(nothing, np.zeros(805), {prompt: n for n, prompt in enumerate(prompts)})
    control.check("m", alpaca_eval.BASELINE, prompts[8:])
    with pytest.raises(ValueError, match="only 796 of its 805 prompts"):
        control.check("m", alpaca_eval.BASELINE, prompts[9:])


# the page
