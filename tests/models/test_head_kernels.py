"""The head's two kernels are log-softmax and its gradient."""

import os

import pytest
import torch


@pytest.mark.parametrize(("vocab", "scale"), [(5003, 1.0), (4096, 0.25), (37, 1.0)])
def test_log_probs_and_gradient(vocab, scale):
    """Against autograd in float64 on the same bfloat16 logits. Without CUDA: in Triton's interpreter, with
    TRITON_INTERPRET=1."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    from dpo_ref.models.kernels import become_gradient, target_logps

    torch.manual_seed(0)
    logits = (8 * torch.randn(7, vocab)).bfloat16()
    targets, coefficients = torch.randint(vocab, (7,)), torch.randn(7)
    exact = logits.double().requires_grad_()
    expected = (scale * exact).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected @ coefficients.double()).backward()

    logits, targets, coefficients = (x.to(device) for x in (logits, targets, coefficients))
    values, normalisers = target_logps(logits, targets, scale)
    become_gradient(logits, targets, scale, normalisers, coefficients)
    torch.testing.assert_close(values.double().cpu(), expected.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.double().cpu(), exact.grad, rtol=2**-7, atol=1e-6)  # a unit of bfloat16
