"""What is computed on: `device=`, of train.py and evaluate.py."""

import pytest
import torch

from dpo_ref.distributed import best_device, on_cuda, on_device
from dpo_ref.models.attention import resolve_backend
from tests.support.command import train, typed

TINY = ("model=lab_tiny", "data.num_pairs=16", "data.num_eval_pairs=4", "trainer.max_steps=1", "tracking=none")


def test_a_cpu_that_is_named_is_taken_where_there_is_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert on_cuda()
    with on_device("cpu"):
        assert best_device() == torch.device("cpu")
        assert resolve_backend("auto") == "sdpa"
        with on_device("auto"):
            assert on_cuda()
    assert on_cuda()


@pytest.mark.parametrize(
    ("name", "said"),
    [("cuda", "there is no CUDA device here"), ("mps", "float64"), ("tpu", "none of auto, cuda, cpu")],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_device_that_is_not_here_is_refused(name, said, tmp_path):
    for done in (
        train(*TINY, f"device={name}", f"output_dir={tmp_path / 'run'}"),
        typed("evaluate.py", "policy=lab:tiny", "tracking=none", f"device={name}", f"output_dir={tmp_path}"),
    ):
        assert done.returncode == 1
        assert f"device={name}" in done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_says_on_which_device_it_was(tmp_path):
    assert train(*TINY, "device=cpu", f"output_dir={tmp_path / 'run'}").returncode == 0
    assert "device: cpu\n" in (tmp_path / "run" / "config.yaml").read_text()
