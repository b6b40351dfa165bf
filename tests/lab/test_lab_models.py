"""The lab's checkpoints: built once, by one process, into a folder that names what they depend on."""

import os
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ref.generation.sampling import generate
from dpo_ref.lab import models as lab_models
from dpo_ref.lab.gold import gold_rewards
from dpo_ref.lab.preferences import lab
from dpo_ref.models import loading
from dpo_ref.models.loading import load_model, load_tokenizer
from tests.support.command import forked


def test_two_processes_build_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path))
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    started = [forked(folder, lambda: print(lab_models.locate("lab:tiny"))) for folder in folders]
    for process in started:
        process.join(timeout=200)
    assert [process.exitcode for process in started] == [0, 0]
    outputs = [(folder / "out").read_text() for folder in folders]
    assert sum("building lab:tiny, once per machine" in output for output in outputs) == 1
    (folder,) = {output.splitlines()[-1] for output in outputs}
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == [os.path.basename(folder)]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_an_evaluation_may_be_the_first_to_ask(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path))
    recipe = lab_models.RECIPES["tiny"]
    monkeypatch.setitem(
        lab_models.RECIPES, "tiny", replace(recipe, stages=(replace(recipe.stages[0], num_steps=1, batch_size=4),))
    )
    with torch.no_grad():
        assert os.listdir(lab_models.locate("lab:tiny"))
    assert torch.is_grad_enabled()


def test_models_are_built_where_training_runs(tmp_path, monkeypatch):
    def stop(model, *_, **__):
        raise InterruptedError(next(model.parameters()).device.type)

    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path))
    monkeypatch.setattr(lab_models, "best_device", lambda: torch.device("meta"))
    monkeypatch.setattr(lab_models, "_fit", stop)
    with pytest.raises(InterruptedError, match="meta"):
        lab_models.locate("lab:large")


def test_a_folder_is_named_by_its_recipe():
    recipe = lab_models.RECIPES["tiny"]
    assert recipe.key == replace(recipe).key
    assert recipe.key != replace(recipe, seed=1).key
    assert len({r.key for r in lab_models.RECIPES.values()}) == len(lab_models.RECIPES)


def test_names_and_sizes():
    with pytest.raises(ValueError, match=r"lab:huge is no model of the lab; there are lab:initial"):
        lab_models.locate("lab:huge")
    assert loading.locate("some/model") == "some/model"
    assert loading.locate("lab:tiny") == lab_models.locate("lab:tiny")
    sizes, tokenizers = {}, {}
    for name in ("initial", "large", "foreign"):
        recipe = lab_models.RECIPES[name]
        if recipe.tokenizer not in tokenizers:
            tokenizers[recipe.tokenizer] = lab_models.TOKENIZERS[recipe.tokenizer]()
        with torch.device("meta"):  # sizes need no weights
            model = lab_models._model(recipe, tokenizers[recipe.tokenizer])
        sizes[name] = sum(p.numel() for p in model.parameters()) / 1e6
    assert 0.3 <= sizes["initial"] <= 1
    assert 0.3 <= sizes["foreign"] <= 1
    assert 30 <= sizes["large"] <= 100


@pytest.mark.slow
def test_the_world_is_hard_but_not_too_hard():
    """Mean gold at temperature 1 over 400 test prompts and 4 samples. Minutes, if the models have to be built."""
    prompts = lab(0, num_pairs=1, num_eval_pairs=0).test_prompts
    means = {}
    for name in ("initial", "strong"):
        folder = lab_models.locate(f"lab:{name}")
        model = load_model(folder, torch.device("cpu"), "auto").model
        generations = generate(model, load_tokenizer(folder), prompts, 0, samples_per_prompt=4)
        rewards = gold_rewards(
            [g.prompt for g in generations], [g.output for g in generations], [g.finished for g in generations]
        )
        means[name] = sum(rewards) / len(rewards)
    assert 0.3 <= means["initial"] <= 0.55
    assert means["strong"] >= means["initial"] + 0.2
