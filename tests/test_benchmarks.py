"""Programs in benchmarks/ time the step that train.py takes; those that cannot run here keep what they measured."""

import importlib
import json
import sys

import pytest
import torch

from tests.support.command import ROOT
from tests.support.tiny import random_groups, tiny_model


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py as on a machine with a CUDA device."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some card")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 79 * 2**30)
    yield importlib.import_module("gpu")
    for name in ("gpu", "common", "pairs"):
        sys.modules.pop(name, None)


def test_one_shape_out_of_memory_loses_no_other(gpu, monkeypatch, tmp_path, capsys):
    def measure(shape, lengths, variant, args):
        if variant == "compiled":
            raise torch.OutOfMemoryError
        speed = {"pairs_per_second": 2.0, "tokens_per_second": 9.0, "mfu": 0.5, "peak_gib": 7.0, "recompilations": 0}
        return {"shape": shape, "lengths": lengths, "variant": variant} | speed

    monkeypatch.setattr(gpu, "measure", measure)
    path = tmp_path / "gpu.json"
    variants = ["as shipped", "compiled", "sdpa by piece"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--variants", *variants, "--out", str(path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    rows = json.loads(path.read_text())["rows"]
    assert [row["variant"] for row in rows] == variants
    assert rows[1]["failure"] == "out of memory, at 79.0 GiB"
    assert [row.get("pairs_per_second") for row in rows] == [2.0, None, 2.0]
    assert "out of memory" in capsys.readouterr().out


def test_the_step_that_is_timed_trains_the_model(gpu):
    model, groups = tiny_model(), random_groups([(5, (4, 6)), (7, (3, 3))])
    before = model.lm_head.weight.detach().clone()
    step = gpu.Stepper(model, groups)
    assert step(groups) > 0
    assert step.steps == 1
    assert not torch.equal(model.lm_head.weight, before)


@pytest.fixture
def soak(monkeypatch):
    """benchmarks/soak.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("soak")
    for name in ("soak", "page", "common"):
        sys.modules.pop(name, None)


def watched_run(memory=lambda second: 500.0, files=lambda second: 40, cost=lambda second: 0.002):
    """Ten minutes as benchmarks/soak.py sees them: four steps a second, an evaluation a minute."""
    samples, cpu = [], 0.0
    for second in range(600):
        cpu += 4 * 32 * cost(second) * (1 + 0.05 * (-1) ** (second // 7))
        shared = {"threads": 9, "wandb": 15.0, "folder": 1.0, "busy": cpu, "evaluations": second // 60}
        own = {"memory": memory(second), "files": files(second), "cpu": cpu, "steps": 4 * second}
        samples.append({"seconds": float(second), **shared, **own})
    return samples


def test_a_run_that_stays_as_it_began_is_told_from_one_that_does_not(soak):
    assert soak.judged_run(watched_run())["faults"] == []
    assert soak.judged_run(watched_run(memory=lambda second: 500 + 0.02 * second))["faults"] == []  # 2 % at its end
    (grown,) = soak.judged_run(watched_run(memory=lambda second: 500 + 0.03 * second))["faults"]
    assert "memory grew from 503 to 517 MiB" in grown
    (leaking,) = soak.judged_run(watched_run(files=lambda second: 40 + second // 100))["faults"]
    assert leaking == "files: 40 before, 45 after"
    (slower,) = soak.judged_run(watched_run(cost=lambda second: 0.002 * (1 + second / 6000)))["faults"]
    assert "times the CPU seconds" in slower
    noisy = watched_run(cost=lambda second: 0.002 * (1 + (second // 10) % 2))
    (unclear,) = soak.judged_run(noisy)["faults"]
    assert "run longer, or alone" in unclear
