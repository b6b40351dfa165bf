"""The lab's checkpoints: those that ship are what was shipped and fit the world; the others are built once."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ref.files.digests import file_digest, seal_folder
from dpo_ref.lab import models as lab_models
from dpo_ref.lab import recipes
from dpo_ref.models import loading
from dpo_ref.models.loading import load_tokenizer
from tests.support.command import forked, train
from tests.support.lab_models import large_in_a_moment  # noqa: F401

MEASURED = json.loads((Path(__file__).parents[2] / "benchmarks/results/lab_models.json").read_text())["models"]
SHIPPED = [name for name in recipes.RECIPES if name not in lab_models.BUILT]


# --- those that ship


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_fits_the_world_and_its_recipe(name):
    """A change of wordings, writers or recipes makes other models: train them again (make lab-models)."""
    assert MEASURED[name]["key"] == recipes.RECIPES[name].key
    folder = Path(lab_models.locate(f"lab:{name}"))
    assert folder.parent == lab_models.CHECKPOINTS
    assert folder.name == lab_models.shipped_name(name, folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert model.config.model_type == recipes.RECIPES[name].architecture


def test_all_that_ships_is_small():
    files = [path for path in lab_models.CHECKPOINTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 15e6
    assert {path.parent.name.partition("-")[0] for path in files} == set(SHIPPED)


@pytest.mark.parametrize("resealed", [False, True])
def test_changed_weights_are_refused(resealed, tmp_path, monkeypatch):
    folder = lab_models.shipped_folder("tiny")
    assert folder is not None
    monkeypatch.setattr(lab_models, "CHECKPOINTS", tmp_path)
    copy = Path(shutil.copytree(folder, tmp_path / folder.name))
    assert lab_models.locate("lab:tiny") == str(copy)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    if resealed:
        seal_folder(copy)
    with pytest.raises(ValueError, match="is not the file that ships; git checkout -- ") as refusal:
        lab_models.locate("lab:tiny")
    assert str(copy / ("digests.json" if resealed else weights.name)) in str(refusal.value)


def test_a_model_that_should_be_there_is_not_built_instead(tmp_path, monkeypatch):
    monkeypatch.setattr(lab_models, "CHECKPOINTS", tmp_path)
    with pytest.raises(ValueError, match=r"lab:tiny ships in .* and is not there; git checkout -- "):
        lab_models.locate("lab:tiny")


def test_nothing_is_built_for_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))
    options = ["data.num_pairs=32", "data.num_eval_pairs=8", "data.num_test_prompts=4", "tracking=none"]
    done = train("reference=other", "reference.path=lab:strong", *options, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "building" not in done.stdout
    assert not (tmp_path / "cache" / "models").exists()


def test_sizes_and_lineage():
    parameters = {
        name: AutoModelForCausalLM.from_pretrained(lab_models.locate(f"lab:{name}")).num_parameters()
        for name in SHIPPED
    }
    assert all(3e5 <= number <= 3e6 for name, number in parameters.items() if name != "tiny")
    texts = {name: load_tokenizer(lab_models.locate(f"lab:{name}")).get_vocab() for name in SHIPPED}
    assert [name for name in SHIPPED if texts[name] != texts["initial"]] == ["foreign"]
    weights = {file_digest(Path(lab_models.locate(f"lab:{name}")) / "model.safetensors") for name in SHIPPED}
    assert len(weights) == len(SHIPPED)


def test_the_world_is_hard_but_not_too_hard():
    """Of what was measured when the models were shipped (make lab-models measures it anew)."""
    for name in ("initial", "initial_2"):
        assert 0.35 <= MEASURED[name]["gold"] <= 0.55
        assert MEASURED[name]["greedy"] >= 0.7
        assert MEASURED[name]["best_of_16"] >= 0.9
    assert MEASURED["strong"]["gold"] >= MEASURED["initial"]["gold"] + 0.2


# --- those that are built


@pytest.fixture
def built_in_a_moment(monkeypatch, tmp_path, large_in_a_moment):  # noqa: F811
    """lab:large, which is not built yet."""
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path))


def test_two_processes_build_it_once(built_in_a_moment, tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    started = [forked(folder, lambda: print(lab_models.locate("lab:large"))) for folder in folders]
    for process in started:
        process.join(timeout=200)
    assert [process.exitcode for process in started] == [0, 0]
    outputs = [(folder / "out").read_text() for folder in folders]
    assert sum("building lab:large, once per machine" in output for output in outputs) == 1
    (folder,) = {output.splitlines()[-1] for output in outputs}
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == [os.path.basename(folder)]


def test_an_evaluation_may_be_the_first_to_ask(built_in_a_moment):
    with torch.no_grad():
        assert os.listdir(lab_models.locate("lab:large"))
    assert torch.is_grad_enabled()


def test_models_are_built_where_training_runs(tmp_path, monkeypatch):
    def stop(model, *_, **__):
        raise InterruptedError(next(model.parameters()).device.type)

    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path))
    monkeypatch.setattr(recipes, "best_device", lambda: torch.device("meta"))
    monkeypatch.setattr(recipes, "_fit", stop)
    with pytest.raises(InterruptedError, match="meta"):
        lab_models.locate("lab:large")


def test_a_folder_is_named_by_its_recipe():
    recipe = recipes.RECIPES["tiny"]
    assert recipe.key == replace(recipe).key
    assert recipe.key != replace(recipe, seed=1).key
    assert recipes.RECIPES["strong"].key != replace(recipes.RECIPES["strong"], parent="initial_2").key
    assert len({r.key for r in recipes.RECIPES.values()}) == len(recipes.RECIPES)


def test_names():
    with pytest.raises(ValueError, match=r"lab:huge is no model of the lab; there are lab:initial"):
        lab_models.locate("lab:huge")
    assert loading.locate("some/model") == "some/model"
    assert loading.locate("lab:tiny") == lab_models.locate("lab:tiny")
