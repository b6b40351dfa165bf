"""What null means: the learning rate and the length of answers by the model, what of it is trained, the objective."""

import pytest
import torch

from dpo_ref.cli import starting_point
from dpo_ref.cli.starting_point import Size, complete_evaluation, complete_run, rate_of
from tests.support.command import composed, resolved

CPU = torch.device("cpu")
TOY, SMALL, LARGE = Size(300_000, 2048), Size(135_000_000, 8192), Size(8_000_000_000, None)


@pytest.mark.parametrize(
    ("objective", "size", "adapter", "lr"),
    [
        ("dpo", SMALL, False, 1e-6),
        ("dpo", LARGE, False, 5e-7),
        ("simpo", SMALL, True, 1e-5),
        ("kto", LARGE, True, 5e-6),
        ("sft", SMALL, False, 2e-5),
        ("sft", LARGE, True, 2e-4),
        ("reward_model", SMALL, False, 1e-5),
        ("reward_model", LARGE, True, 1e-4),
        ("dpo", TOY, False, 3e-4),
        ("sft", TOY, True, 3e-4),
    ],
)
def test_the_rate_follows_the_size_what_is_trained_and_the_objective(objective, size, adapter, lr):
    assert rate_of(resolved(f"objective={objective}").objective, size, adapter).lr == lr


def completed(*words, monkeypatch, size):
    monkeypatch.setattr(starting_point, "size_of", lambda path, key, revision=None: size)
    cfg, _ = composed(*words)
    return complete_run(cfg, resolved(*words), CPU)


def test_a_real_model_gets_its_rate_and_long_answers_and_says_so(monkeypatch, capsys):
    cfg = completed("model=smollm2_135m", monkeypatch=monkeypatch, size=SMALL)
    assert (cfg.optim.lr, cfg.evaluation.max_new_tokens) == (1e-6, 512)
    assert cfg.data.tokens_per_batch == 1024
    assert "optim.lr=1e-06" in capsys.readouterr().out


def test_an_accelerator_takes_larger_packs():
    cfg, _ = composed()
    assert complete_evaluation(cfg, "lab:tiny", torch.device("cuda")).data.tokens_per_batch == 8192
    assert starting_point.LENGTHS["data.tokens_per_batch"][2] == 8192


def test_prompts_inside_on_policy_data_have_packs_too(monkeypatch):
    cfg = completed("data=on_policy", "model=smollm2_135m", monkeypatch=monkeypatch, size=SMALL)
    assert (cfg.data.prompts.tokens_per_batch, cfg.data.max_new_tokens) == (1024, 512)


def test_what_is_given_stays(monkeypatch, capsys):
    words = ("model=smollm2_135m", "optim.lr=3e-5", "evaluation.every=9", "evaluation.max_new_tokens=99")
    cfg = completed(*words, monkeypatch=monkeypatch, size=SMALL)
    assert (cfg.optim.lr, cfg.evaluation.max_new_tokens) == (3e-5, 99)
    assert capsys.readouterr().out == ""


def test_the_lab_is_a_toy(capsys):
    cfg, _ = composed()
    completed = complete_run(cfg, resolved(), CPU)
    assert (completed.optim.lr, completed.evaluation.max_new_tokens) == (3e-4, 128)
    assert completed.data.tokens_per_batch == 8192
    assert cfg.optim.lr is None  # the tree that was handed over is as it was
    assert capsys.readouterr().out == ""


def test_an_evaluation_takes_the_length_of_its_policy(monkeypatch):
    cfg, _ = composed(kind="evaluate")
    assert complete_evaluation(cfg, "lab:tiny", CPU).generation.max_new_tokens == 128
    monkeypatch.setattr(starting_point, "size_of", lambda path, key, revision=None: SMALL)
    assert complete_evaluation(cfg, "some/model", CPU).generation.max_new_tokens == 1024


def test_a_folder_that_is_no_model_is_refused_by_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"model\.path=.* is not a model folder"):
        starting_point.size_of(str(tmp_path), "model.path")


def test_answers_take_at_most_half_of_the_positions(monkeypatch):
    monkeypatch.setattr(starting_point, "size_of", lambda path, key, revision=None: Size(124_000_000, 1024))
    cfg, _ = composed(kind="evaluate")
    assert complete_evaluation(cfg, "gpt2", CPU).generation.max_new_tokens == 512


def test_a_size_is_read_off_config_and_headers():
    assert starting_point.size_of("lab:tiny", "model.path") == Size(88656, 2048)
