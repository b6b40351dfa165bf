"""A reference that moves: its updates by hand, its state in checkpoints, runs that stop and go on."""

import json
from dataclasses import replace

import pytest
import torch

from dpo_ref.cli import resolve
from dpo_ref.data.packing import collate
from dpo_ref.models.logps import response_logps
from dpo_ref.references.moving import moving
from tests.support.command import composed, train
from tests.support.evaluate_command import measure
from tests.support.reference_contexts import LAYOUT, TOKENIZER, context_for
from tests.support.tiny import policy_of, random_groups, tiny_model

SMALL = ["model.path=lab:tiny", "data.num_pairs=64", "data.num_eval_pairs=8", "data.num_test_prompts=4"]
SMALL += ["trainer.batch_size=16", "tracking=none", "beta=0.1", "reference=moving", "optim.lr=0.01"]
SMALL += ["optim.schedule=constant", "optim.warmup_ratio=0"]


@pytest.mark.parametrize(("share", "every"), [(1.0, 3), (0.6, 2), (0.05, 1)])
def test_updates_by_hand(share, every, tmp_path):
    """Against the formula applied to weights that are written down at every step."""
    context = context_for(tmp_path)
    reference, policy = moving(context, share=share, every=every), tiny_model(seed=0)
    batch = collate(random_groups(LAYOUT))
    expected = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    assert reference.weights
    for step in range(1, 7):
        with torch.no_grad():
            for index, weight in enumerate(policy.parameters()):
                weight.add_(0.01 * (index + 1) * step)
        before = reference.logps(batch).sums
        reference.update(policy, step, torch.tensor(True))
        if step % every == 0:
            ours = dict(policy.named_parameters())
            expected = {name: share * ours[name].detach() + (1 - share) * old for name, old in expected.items()}
        else:
            assert torch.equal(reference.logps(batch).sums, before)
    plain = tiny_model(seed=1)
    plain.load_state_dict(expected, strict=False)
    torch.testing.assert_close(reference.logps(batch).sums, response_logps(plain, batch).sums, atol=1e-4, rtol=1e-5)
    other = moving(replace(context, policy=policy_of(tiny_model(seed=5), TOKENIZER)), share=share, every=every)
    other.load_state_dict(reference.state_dict())
    assert torch.equal(other.logps(batch).sums, reference.logps(batch).sums)
    with pytest.raises(ValueError, match="has other weights than this one, or none"):
        other.load_state_dict({})


def test_a_run_that_stops_goes_on_as_if_it_had_not(tmp_path):
    """The reference's weights are in the checkpoint: every number of the resumed run is that of the whole one."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SMALL, "reference.every=2", "reference.share=0.5", "trainer.save_every=3"]
    done = train(*options, f"output_dir={whole}")
    assert done.returncode == 0, done.stderr
    assert "asked at every step and nothing is cached" in done.stdout
    assert train(*options, f"output_dir={parts}", "trainer.max_steps=3").returncode == 0
    assert train(f"resume={parts}", "trainer.max_steps=4").returncode == 0

    def losses(run):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [row["train/loss"] for row in rows if "train/loss" in row]

    assert losses(parts)[3:] == losses(whole)[3:]
    overrides = [f"policy={whole}", "tracking=none", "generation.max_new_tokens=8"]
    measure(*overrides)
    metrics = json.loads((whole / "evaluation" / "evaluation.json").read_text())["metrics"]
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["rewards/margins"] == pytest.approx(last["eval/rewards/margins"] / 0.1, abs=1e-3)
    assert metrics["kl/loss_reference"] < metrics["kl/initial"]  # it followed the policy


@pytest.mark.parametrize("begins", ["default", "pissa"])
def test_the_adapter_that_a_reference_moved_to_is_measured_against(begins, tmp_path):
    """Replaced by the policy in the last step it is the policy, and what was measured while training is measured."""
    options = [*SMALL, "reference.every=4", "reference.share=1", "model.lora_rank=4", f"model.lora_init={begins}"]
    done = train(*options, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    measure(f"policy={tmp_path / 'run'}", "tracking=none", "generation.max_new_tokens=8")
    metrics = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())["metrics"]
    assert abs(metrics["kl/loss_reference"]) < 1e-5 < metrics["kl/initial"]
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reference.cache=auto", "changes while the policy is trained, so its log-probs cannot be cached"),
        ("reference.share=0", r"must lie in \(0, 1\]: 1 replaces the reference by the policy"),
        ("reference.every=0", "must be at least 1 optimiser step"),
    ],
)
def test_refused_at_compose_time(override, message):
    cfg, choices = composed("reference=moving", override)
    with pytest.raises(ValueError, match=message):
        resolve.resolve(cfg, choices)
