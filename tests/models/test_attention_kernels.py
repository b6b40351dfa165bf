"""FlashAttention as CUDA offers it, imitated on the CPU with the kernel's own refusals: what reaches it, what does
not, and that evaluation asks for it in the dtype of training."""

from itertools import pairwise

import pytest
import torch
from torch.nn.attention import varlen
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_ref.data.packing import collate
from dpo_ref.evaluation import evaluate
from dpo_ref.models import asked, attention, loading
from dpo_ref.models.logps import response_logps
from tests.support.command import resolved, train
from tests.support.evaluate_command import measure
from tests.support.tiny import SHAPE, random_groups

CPU = torch.device("cpu")
LAYOUT = ((5, (4, 7)), (1, (6, 1)), (12, (3, 2, 8)))


def kernel(calls, aligned_at="bottom right"):
    """torch's varlen kernel in its own words, and each call's dtype in `calls`."""

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        if query.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if query.shape[2] % 8:
            raise RuntimeError("head_size must be a multiple of 8, this is ensured by padding!")
        if query.shape[2] > 256:
            raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
        calls.append(query.dtype)
        outputs = []
        for (q0, q1), (k0, k1) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
            first = (k1 - k0) - (q1 - q0) if aligned_at == "bottom right" else 0
            distance = torch.arange(first, first + q1 - q0)[:, None] - torch.arange(k1 - k0)
            seen = (distance >= 0) & (distance <= window_size[0] if window_size[0] >= 0 else True)
            q, k, v = (x.transpose(0, 1).float() for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
            scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
            outputs.append((scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype))
        return torch.cat(outputs)

    return varlen_attn


@pytest.fixture
def on_cuda(monkeypatch):
    """`on_cuda(aligned_at=...)`: varlen attention is there, and is what auto takes. Gives the list of its calls."""
    there = attention.available

    def start(**options):
        calls: list[torch.dtype] = []
        monkeypatch.setattr(varlen, "varlen_attn", kernel(calls, **options))
        monkeypatch.setattr(attention, "available", lambda backend: backend == "varlen" or there(backend))
        attention.register.cache_clear()
        return calls

    yield start
    attention.register.cache_clear()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders with heads of 8, 12 and 320 dimensions, weights in float32."""

    def saved(head_dim):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("model") / str(head_dim)
        LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=head_dim, initializer_range=0.2)).save_pretrained(folder)
        return str(folder)

    return {size: saved(size) for size in (8, 12, 320)}


def test_float32_weights_load_and_only_half_precision_reaches_the_kernel(on_cuda, folders):
    calls = on_cuda()
    model, notes = loading.load_model(folders[8], CPU, "auto")
    assert notes == ()
    assert model.config._attn_implementation == attention.REGISTERED["varlen"]
    assert set(calls) == {torch.bfloat16}  # tried at loading
    calls.clear()
    batch = collate(random_groups(LAYOUT))
    by_piece = response_logps(model, batch).tokens()
    assert calls == []
    with torch.autocast("cpu", torch.bfloat16):
        half = response_logps(model, batch).tokens()
    assert len(calls) == SHAPE["num_hidden_layers"]
    assert 0 < (half - by_piece).abs().max() < 0.1


@pytest.mark.parametrize(("head_dim", "word"), [(12, "12 dimensions"), (320, "320 dimensions")])
def test_heads_that_the_kernel_does_not_know_go_piece_by_piece(on_cuda, folders, capsys, head_dim, word):
    calls = on_cuda()
    model, (note,) = loading.load_model(folders[head_dim], CPU, "auto")
    assert note.startswith(
        f"model.path={folders[head_dim]} attends piece by piece, as with sdpa: its heads have {word}"
    )
    assert capsys.readouterr().out == ""
    with torch.autocast("cpu", torch.bfloat16):
        assert response_logps(model, collate(random_groups(LAYOUT))).tokens().isfinite().all()
    assert calls == []
    with pytest.raises(ValueError, match=f"attention=varlen: its heads have {word}"):
        loading.load_model(folders[head_dim], CPU, "varlen")


def test_a_model_that_is_loaded_when_asked_for_says_once_how_it_runs(on_cuda, folders, capsys, monkeypatch):
    on_cuda()
    monkeypatch.setattr(asked, "load_tokenizer", lambda *arguments: None)
    monkeypatch.setattr(asked, "check_vocabulary", lambda *arguments: None)
    loader = asked.ModelLoader(CPU)
    path = asked.ModelPath(folders[12])
    policy = loader.policy(path)
    assert capsys.readouterr().out == ""
    for model in (policy, loader.policy(path)):
        assert model.model is not None
    loader.fresh(asked.ModelSource(folders[12]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("=")[0] for line in lines] == ["policy", "reference.path"]


def test_a_kernel_that_computes_something_else_stops_the_run(on_cuda, folders):
    on_cuda(aligned_at="top left")
    with pytest.raises(
        ValueError, match=r"attention=varlen: its hidden states differ by .* use model\.attention=sdpa"
    ):
        loading.load_model(folders[8], CPU, "auto")


def test_a_kernel_and_float32_are_refused_together():
    with pytest.raises(ValueError, match=r"no effect with model\.dtype=float32; use model\.attention=sdpa"):
        resolved("model.attention=varlen", "model.dtype=float32")


DATA = ["data.num_pairs=16", "data.num_eval_pairs=6", "data.num_test_prompts=4"]


def test_evaluation_computes_in_the_dtype_of_the_policy(monkeypatch, tmp_path):
    """Held-out pairs, KL, the loss reference's table and the diagnosis, as `precision()` says."""
    assert train(*DATA, "model.path=lab:tiny", "tracking=none", f"output_dir={tmp_path / 'run'}").returncode == 0
    precisions: dict[str, bool] = {}

    def noting(name):
        inner = getattr(evaluate, name)

        def noted(*arguments, **options):
            precisions[name] = torch.is_autocast_enabled("cpu")
            return inner(*arguments, **options)

        monkeypatch.setattr(evaluate, name, noted)

    monkeypatch.setattr(loading.Policy, "precision", lambda _: torch.autocast("cpu", torch.bfloat16))
    for name in ("score_pairs", "sample_kl", "reference_pairs", "loss_reference"):
        noting(name)
    words = [f"policy={tmp_path / 'run'}", "tracking=none", "generation.max_new_tokens=8"]
    measure(*words)
    assert precisions == dict.fromkeys(("score_pairs", "sample_kl", "reference_pairs", "loss_reference"), True)
