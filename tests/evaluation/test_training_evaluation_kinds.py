"""Every kind of run is evaluated against the policy it started from."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from dpo_ref.data.packing import collate
from dpo_ref.evaluation import in_training
from dpo_ref.evaluation.in_training import FOLDER, InitialPolicy
from dpo_ref.evaluation.kl import sample_kl
from dpo_ref.generation.records import read_generations
from dpo_ref.generation.sampling import never_sampled
from dpo_ref.lab.models import locate
from dpo_ref.models.loading import load_model, load_tokenizer
from dpo_ref.models.logps import response_logps
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.models.sharding import Holding
from dpo_ref.types import Message
from tests.support.command import train
from tests.support.quick import only
from tests.support.reference_contexts import LAYOUT
from tests.support.tiny import random_groups, tiny_model
from tests.support.training_evaluation import DATA, lines


def kl_to_initial(folder):
    """KL of the policy in the run's folder to lab:tiny on the run's last answers, both loaded anew."""
    generations = read_generations(sorted((folder / FOLDER).glob("step_*.jsonl"))[-1])
    policy, initial = (
        load_model(str(path), torch.device("cpu"), "auto").model for path in (folder / "policy", locate("lab:tiny"))
    )
    tokenizer = load_tokenizer(locate("lab:tiny"))
    return sample_kl(policy, initial, generations, never_sampled(tokenizer, len(tokenizer))).metrics("initial")


KINDS = {
    "on_policy": ["data=on_policy", "data.prompts.num_pairs=16", "data.prompts.num_eval_pairs=8",
        "data.prompts.num_test_prompts=24", "data.rounds=2", "data.prompts_per_round=16", "data.max_new_tokens=12"],
    "no reference": ["objective=simpo"],
    "reference none": ["reference=none"],
    "moving": ["reference=moving", "reference.every=2"],
    "initial in memory": ["reference.cache=off"],
    "adapter": ["model.lora_rank=4", "optim.lr=0.02"],
    "no scorer": ["objective=kto", "scorer@evaluation.scorer=none"],
    "no pairs": ["objective=sft", "data=lab_sft", "data.num_examples=64", "data.num_test_prompts=24"],
}  # fmt: skip


QUICK = ("on_policy", "adapter", "no scorer")


@pytest.mark.usefixtures("undrawn_pictures")
@pytest.mark.parametrize("kind", only(KINDS, *QUICK))
def test_every_kind_of_run_is_evaluated_against_its_initial_policy(kind, tmp_path):
    data = DATA if not any(option.startswith("data=") for option in KINDS[kind]) else []
    options = ["model.path=lab:tiny", "trainer.batch_size=8", "trainer.max_steps=4", "optim.lr=1e-3", "tracking=none"]
    folder = tmp_path / "run"
    changed = {option.partition("=")[0] for option in KINDS[kind]}
    options = [option for option in options if option.partition("=")[0] not in changed]
    evaluation = ["evaluation.every=2", "evaluation.num_prompts=12", "evaluation.max_new_tokens=12"]
    done = train(*data, *options, *evaluation, *KINDS[kind], f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    assert (
        "evaluation: every 2 steps, 12 held-out prompts, answers per prompt: 1; the initial policy is " in done.stdout
    )
    rows = lines(folder, "evaluation/")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[0]["evaluation/kl/initial"] == pytest.approx(0, abs=1e-7)
    expected = kl_to_initial(folder)
    assert expected["kl/initial"] > 0
    for name, value in expected.items():
        assert rows[-1][f"evaluation/{name}"] == pytest.approx(value, abs=1e-5), name
    assert ("evaluation/winrate/initial" in rows[-1]) == (kind != "no scorer")
    assert ("evaluation/eos/chosen_logratio" in rows[-1]) == (kind != "no pairs")
    in_memory = "the initial policy is the reference in memory" in done.stdout
    assert in_memory == (kind in ("initial in memory", "on_policy"))  # asked live there


def test_held_out_prompts_without_room_are_left_out_and_counted(monkeypatch, capsys):
    monkeypatch.setattr(in_training, "encode_prompts", lambda tokenizer, prompts: [range(5), range(17), range(16)])
    work, policy = SimpleNamespace(seed=0), SimpleNamespace(tokenizer=None)
    asked = [(Message(role="user", content=text),) for text in ("one", "long", "two")]
    context = Mock(spec=in_training.EvaluationContext, prompts=asked, max_length=20, work=work, policy=policy)
    note = "  1 held-out prompts left out: with an answer they exceed 20 tokens"
    assert in_training.drawn_prompts(context, 8, 4) == ([asked[0], asked[2]], (note,))
    assert in_training.drawn_prompts(context, 8, 3) == (asked, ())
    assert capsys.readouterr().out == ""


def test_the_initial_policy_stays_and_shares_what_is_not_trained():
    """Under an adapter only its factors exist twice; whatever training does to the policy, the initial one answers as
    the same model loaded anew."""
    for make in (lambda model: model, lambda model: AdapterOptions(lora_rank=3).put_on(model) and model):
        policy, batch = make(tiny_model(seed=0)), collate(random_groups(LAYOUT))
        trained = [p for p in policy.parameters() if p.requires_grad]
        initial = InitialPolicy(policy, None, "weights", Holding())
        for weight in trained:
            nn.init.normal_(weight, std=0.1)
        assert initial.num_copied == sum(weight.numel() for weight in trained)
        with initial.here() as model:
            sums = response_logps(model, batch).sums
            shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in policy.parameters()}
        torch.testing.assert_close(sums, response_logps(tiny_model(seed=0), batch).sums, atol=1e-5, rtol=0)
        assert (sums - response_logps(policy, batch).sums).abs().max() > 0.1
        assert len(shared) == sum(not p.requires_grad for p in policy.parameters())
