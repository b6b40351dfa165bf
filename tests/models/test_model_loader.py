"""Models are loaded once and shared by those who only ask them; who changes one has a copy of its own."""

from dataclasses import replace

import pytest
import torch

from dpo_ref.models import loading
from dpo_ref.models.asked import ModelLoader, ModelPath, ModelSource, Workspace
from dpo_ref.models.checkpoint import weights_digest
from dpo_ref.models.loading import LoadedModel
from dpo_ref.references.policies import interpolate
from dpo_ref.types import silent
from tests.support.reference_contexts import TOKENIZER, context_for
from tests.support.tiny import tiny_model

CPU = torch.device("cpu")
SHAPE = {"pad_token_id": 0, "vocab_size": len(TOKENIZER)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two small models with their tokenizers."""
    paths = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for seed, path in enumerate(paths):
        tiny_model(seed=seed, **SHAPE).save_pretrained(path)
        TOKENIZER.save_pretrained(path)
    return [str(path) for path in paths]


def test_what_is_asked_is_shared_and_what_is_kept_is_counted(folders):
    loader = ModelLoader(CPU, keep=1)
    policy = loader.policy(ModelPath(folders[0]))
    assert loader.policy(ModelPath(folders[0])) is policy
    assert loader.reference(ModelSource(folders[0])) is policy.model
    assert loader.fresh(ModelSource(folders[0])) is not policy.model
    assert loader.reference(ModelSource(folders[0], dtype="bfloat16")) is not policy.model
    loader.policy(ModelPath(folders[1]))
    assert loader.policy(ModelPath(folders[0])) is not policy


def test_nothing_is_kept_unless_asked_for(folders):
    loader = ModelLoader(CPU)
    assert loader.policy(ModelPath(folders[0])) is not loader.policy(ModelPath(folders[0]))


def test_a_policy_is_loaded_when_its_weights_are_needed(folders, monkeypatch):
    loads = []
    monkeypatch.setattr(
        loading,
        "load_model",
        lambda *arguments, **how: loads.append(arguments) or LoadedModel(tiny_model(seed=0, **SHAPE), ()),
    )
    policy = ModelLoader(CPU).policy(ModelPath(folders[0]))
    assert len(policy.text_identity) == 32
    assert loads == []
    assert policy.weights == weights_digest(tiny_model(seed=0, **SHAPE))
    assert policy.model is policy.model
    assert len(loads) == 1


def test_a_reference_that_changes_weights_changes_nobody_elses(folders, tmp_path):
    """An evaluation builds the same reference several times, beside a policy that may lie at the same path."""
    work = Workspace(tmp_path, tmp_path, 0, silent, ModelLoader(CPU, keep=3))
    context = replace(context_for(tmp_path), work=work, policy=work.loader.policy(ModelPath(folders[0])))
    before = weights_digest(work.loader.policy(ModelPath(folders[1])).model)
    first, second = (interpolate(context, path=folders[1], share=0.5, cache="off") for _ in range(2))
    assert first.identity == second.identity
    assert weights_digest(work.loader.policy(ModelPath(folders[1])).model) == before != first.weights


def test_paths_of_a_scheme_are_located(folders, monkeypatch):
    monkeypatch.setitem(loading.LOCATORS, "mine:", lambda path: folders[int(path.removeprefix("mine:"))])
    assert loading.locate("mine:1") == folders[1]
    assert loading.locate("some/model") == "some/model"
    assert loading.locate("C:/models") == "C:/models"
    loading.check_folder("mine:1", "model.path")
    assert ModelLoader(CPU).policy(ModelPath("mine:1")).folder == folders[1]
