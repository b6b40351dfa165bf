"""Models with few positions: data, references, samples at a run's end, evaluation."""

import json

import pytest
from transformers import AutoConfig

from dpo_ref.models.folders import positions_of
from tests.support.command import train
from tests.support.evaluate_command import measure
from tests.support.model_folders import model_folder, pairs_file, words_for

KINDS = {  # positions that are learnt, with an offset and without, and rotary ones
    "gpt2": {"n_positions": 48, "max_position_embeddings": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 48},
    "llama": {"max_position_embeddings": 48},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("positions")
    for kind, options in KINDS.items():
        model_folder(folder / kind, kind=kind, **options)
    model_folder(folder / "long")
    pairs_file(folder / "short.jsonl")
    mixed = [*(folder / "short.jsonl").read_text().splitlines()]
    mixed += pairs_file(folder / "over.jsonl", number=6, prompt=30).read_text().splitlines()
    (folder / "mixed.jsonl").write_text("\n".join(mixed) + "\n")
    return folder


def test_positions_are_those_that_rotary_embeddings_are_stretched_to():
    plain = AutoConfig.for_model("llama", max_position_embeddings=4096)
    assert positions_of(plain) == 4096
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert positions_of(AutoConfig.for_model("llama", max_position_embeddings=4096, rope_parameters=linear)) == 16384
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e4}
    assert positions_of(AutoConfig.for_model("llama", max_position_embeddings=4096, rope_parameters=yarn)) == 4096
    assert positions_of(AutoConfig.for_model("bloom")) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("over_length", "counted"), [("drop", "dropped: too long"), ("truncate_prompt_start", "prompts cut")]
)
def test_groups_longer_than_the_positions_follow_over_length(folder, tmp_path, kind, over_length, counted):
    words = words_for(folder / kind, folder / "mixed.jsonl", tmp_path / "run", f"data.over_length={over_length}")
    done = train(*words)
    assert done.returncode == 0, done.stderr
    assert f"6 {counted}" in done.stdout
    assert "data.max_length=48 instead of 1,024" in done.stdout
    counts = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    assert counts[counted] == 6
    assert counts["groups"] == (12 if over_length == "drop" else 18)


def test_data_alone_says_the_same(folder, tmp_path):
    done = train(*words_for(folder / "gpt2", folder / "mixed.jsonl", tmp_path / "run", "stage=data"))
    assert done.returncode == 0, done.stderr
    assert "6 dropped: too long" in done.stdout


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_reference_with_fewer_positions_than_the_pairs_have_tokens(folder, tmp_path, cache):
    reference = ["reference=other", f"reference.path={folder / 'gpt2'}", f"reference.cache={cache}"]
    words = words_for(folder / "long", folder / "mixed.jsonl", tmp_path / "run", *reference)
    done = train(*words)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: reference.path: its model has 48 positions")
    assert "data.max_length=48" in sentence
    again = train(
        *words_for(folder / "long", folder / "mixed.jsonl", tmp_path / "again", *reference), "data.max_length=48"
    )
    assert again.returncode == 0, again.stderr


def test_samples_at_the_end_are_as_long_as_fits_and_evaluation_goes_on_with_its_own_options(folder, tmp_path):
    run = tmp_path / "run"
    done = train(*words_for(folder / "llama", folder / "short.jsonl", run))
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
    measure(f"policy={run}", "tracking=none", "generation.max_new_tokens=8", "diagnostic=none")
    assert (run / "evaluation" / "evaluation.json").is_file()
    with pytest.raises(ValueError, match=r"generation.max_new_tokens=128; [0-9]+ and less fit"):
        measure(f"policy={run}", "tracking=none", "generation.max_new_tokens=128", f"output_dir={tmp_path / 'other'}")


def test_prompts_without_room_for_an_answer_are_left_out_at_the_end_and_in_evaluation(folder, tmp_path, capsys):
    run, mixed = tmp_path / "run", folder / "mixed.jsonl"
    words = words_for(folder / "llama", folder / "short.jsonl", run, "data.eval_fraction=0", f"data.eval_path={mixed}")
    done = train(*(word for word in words if word != "tracking=none"), "tracking.mode=offline")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
    measure(f"policy={run}", "tracking=none", "generation.max_new_tokens=4", "diagnostic=none")
    assert "6 of 18 prompts left out: longer than 47 tokens" in capsys.readouterr().out


def test_a_run_whose_policy_cannot_answer_is_completed(folder, tmp_path):
    run, over = tmp_path / "run", folder / "over.jsonl"
    words = words_for(folder / "llama", folder / "short.jsonl", run, "data.eval_fraction=0", f"data.eval_path={over}")
    done = train(*(word for word in words if word != "tracking=none"), "tracking.mode=offline")
    assert done.returncode == 0, done.stderr
    assert "6 of 6 sample prompts left out: the model's 48 positions leave no answer" in done.stdout
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"


def test_a_question_without_room_for_an_answer_is_refused_with_options_of_evaluation(folder, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "the cat sat on the mat " * 10}) + "\n")
    words = [f"policy={folder / 'llama'}", "prompts=jsonl", f"prompts.path={questions}", "generation.max_new_tokens=4"]
    with pytest.raises(ValueError, match=r"the model 48 positions, which leave no answer any room: .* prompts="):
        measure(*words, "tracking=none", "diagnostic=none", f"output_dir={tmp_path / 'out'}")
