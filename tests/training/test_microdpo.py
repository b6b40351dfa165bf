"""The product gives the losses of `tests/support/microdpo.py`, the whole method on one page: five steps of training,
packed, chunked, with a shared prompt, against one sequence at a time."""

import ast
import json
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dpo_ref.data.packing import epoch_order, pack
from dpo_ref.data.sources import preferences
from dpo_ref.data.tokenise import tokenise
from dpo_ref.models.attention import REGISTERED
from dpo_ref.models.loading import load_model, load_tokenizer
from dpo_ref.objectives import pairwise, reference_free, unpaired
from dpo_ref.objectives.interface import bind
from dpo_ref.references import policies
from dpo_ref.training.optim import adamw, optimisation
from dpo_ref.training.rounds import OfflineRounds, TrainerConfig, groups_for
from dpo_ref.training.trainer import train
from tests.support import command, microdpo
from tests.support.quick import only
from tests.support.reference_contexts import context_for
from tests.support.tiny import tiny_model
from tests.support.tokenizers_here import CHATML, PLAIN, byte_bpe

SEED, BATCH, STEPS, EPOCHS, LR = 3, 4, 5, 3.0, 3e-3
TOKENS_PER_BATCH = 60  # four pairs take several packs, not all of as many pairs
BETA = {"dpo": 0.1, "ipo_sum": 0.1, "hinge": 0.02, "simpo": 2.0, "sft": 1.0}  # sft has no place for it
OBJECTIVES = {
    "dpo": bind(pairwise.dpo, beta=BETA["dpo"]),
    "ipo_sum": bind(pairwise.ipo_sum, tau=BETA["ipo_sum"]),
    "hinge": bind(pairwise.hinge, beta=BETA["hinge"]),
    "simpo": bind(reference_free.simpo, beta=BETA["simpo"]),
    "sft": bind(unpaired.sft),
}


def user(text):
    return {"role": "user", "content": text}


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


PAIRS = [
    pair("what is it?", "a cat.", "the dog ran and ran"),
    pair("1 2 3", "4 5", "no"),
    pair("the cat", "sat on the mat", "sat"),
    pair("yes or no", "maybe, of course!", "yes no yes no"),
    pair([{"role": "system", "content": "be short"}, user("who ran?")], "the dog", "it was the dog, of course"),
    pair([user("a?"), {"role": "assistant", "content": "b"}, user("and then?")], "c", "the mat"),
    pair("say ünïcode", "çà et là", "ok"),
    pair("what sat?", "the cat sat, and the mat", "a mat"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each architecture two random models, their tokenizer, and the pairs in two files: as they are, and in the
    order in which the product's shuffle visits them, which the page reads."""
    visited = [PAIRS[index] for epoch in range(int(EPOCHS)) for index in epoch_order(len(PAIRS), SEED, epoch)]
    by_architecture = {}
    for architecture, tokenizer in (("llama", byte_bpe(CHATML)), ("gpt_neox", byte_bpe(PLAIN, bos="<s>"))):
        folder = by_architecture[architecture] = tmp_path_factory.mktemp(architecture)
        for seed, name in enumerate(("policy", "other")):
            tiny_model(architecture, seed, vocab_size=len(tokenizer)).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        for name, rows in (("pairs", PAIRS), ("visited", visited)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return by_architecture


def of_the_page(folder: Path, objective: str, reference: str, dtype: str) -> list[float]:
    """What the page prints; they move, or nothing would be compared."""
    options = {"model": folder / "policy", "reference-model": folder / "other", "pairs": folder / "visited.jsonl"}
    options |= {"objective": objective, "reference": reference, "beta": BETA[objective], "dtype": dtype}
    options |= {"lr": LR, "batch": BATCH, "steps": STEPS}
    with redirect_stdout(StringIO()) as out:
        microdpo.main([f"--{name}={value}" for name, value in options.items()])
    losses = [float(line) for line in out.getvalue().splitlines()]
    assert len(losses) == STEPS
    assert losses[-1] < 0.9 * losses[0]
    return losses


def of_the_command(folder: Path, objective: str, reference: str, run: Path) -> list[float]:
    """What `python train.py` writes."""
    overrides = ["model=pretrained", f"model.path={folder / 'policy'}", "model.dtype=float32", "tracking=none"]
    overrides += ["data=jsonl", f"data.path={folder / 'pairs.jsonl'}", f"data.tokens_per_batch={TOKENS_PER_BATCH}"]
    overrides += [f"objective={objective}", f"reference={reference}", f"seed={SEED}", f"output_dir={run}"]
    overrides += [f"trainer.batch_size={BATCH}", f"trainer.epochs={EPOCHS}", f"trainer.max_steps={STEPS}"]
    overrides += [f"optim.lr={LR}", "optim.schedule=constant", "optim.warmup_ratio=0", "optim.max_grad_norm=null"]
    overrides += [f"beta={BETA[objective]}"] if objective != "sft" else []
    overrides += [f"reference.path={folder / 'other'}"] if reference == "other" else []
    done = command.train(*overrides)
    assert done.returncode == 0, done.stderr
    assert "one response at a time" not in done.stdout
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def of_the_library(folder: Path, objective: str, reference: str, cache: Path) -> list[float]:
    """What the training loop yields in float64, which the command line does not offer."""

    def load(path):
        return load_model(path, torch.device("cpu"), "auto", dtype=torch.float64).model

    policy, tokenizer = load(str(folder / "policy")), load_tokenizer(str(folder / "policy"))
    assert policy.config._attn_implementation in REGISTERED.values()  # it is packed
    packing = partial(pack, tokens_per_batch=TOKENS_PER_BATCH)
    rows = preferences(SEED, path=str(folder / "pairs.jsonl")).train
    groups = groups_for(OBJECTIVES[objective], tokenise(rows, tokenizer).groups)
    context = context_for(cache, policy, tokenizer, lambda source: load(source.path), groups=groups, pack=packing)
    loss_reference = {
        "initial": partial(policies.initial, cache="off"),  # a table keeps float32
        "other": partial(policies.other, path=str(folder / "other"), cache="off"),
        "prior": policies.prior,
        "none": policies.none,
    }[reference](context)
    optim = optimisation(adamw, policy, STEPS, lr=LR, schedule="constant", warmup_ratio=0.0, max_grad_norm=None)
    config = TrainerConfig(batch_size=BATCH, epochs=EPOCHS, max_steps=STEPS)
    rounds = OfflineRounds(groups, config, packing, SEED)
    steps = list(train(context.policy, loss_reference, OBJECTIVES[objective], optim, rounds))
    assert max(step.share.num_packs for step in steps) > 1
    return [step.metrics["loss"].item() for step in steps]


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers rounds Llama's norms to float32 in models of any dtype, where a last place is 1e-7."""

    def forward(norm, hidden):
        return torch.nn.functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


# simpo and sft have no reference, and the product refuses one that would have no effect.
ALL = [(objective, reference) for objective in ("dpo", "ipo_sum", "hinge") for reference in microdpo.REFERENCES]
ALL += [("simpo", "none"), ("sft", "none")]
SOME = [("dpo", "initial"), ("ipo_sum", "prior"), ("hinge", "other"), ("simpo", "none"), ("sft", "none")]
IN_FLOAT64 = [*(("llama", *both) for both in ALL), *(("gpt_neox", *both) for both in SOME[:3])]
QUICK = [case for case in IN_FLOAT64 if case[1] not in ("ipo_sum", "hinge") or case[1:] in SOME]
IN_FLOAT32 = [*(("llama", *both) for both in SOME), ("gpt_neox", "dpo", "prior")]


@pytest.mark.parametrize(("architecture", "objective", "reference"), only(IN_FLOAT64, *QUICK))
def test_losses_in_float64(architecture, objective, reference, folders, exact_norms, tmp_path):
    expected = of_the_page(folders[architecture], objective, reference, "float64")
    losses = of_the_library(folders[architecture], objective, reference, tmp_path)
    assert losses == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize(
    ("architecture", "objective", "reference"), only(IN_FLOAT32, IN_FLOAT32[0], IN_FLOAT32[3], IN_FLOAT32[-1])
)
def test_losses_in_float32(architecture, objective, reference, folders, tmp_path):
    expected = of_the_page(folders[architecture], objective, reference, "float32")
    losses = of_the_command(folders[architecture], objective, reference, tmp_path / "run")
    assert losses == pytest.approx(expected, rel=2e-4, abs=0)


def test_it_is_one_page_and_imports_nothing_of_ours():
    text = Path(microdpo.__file__).read_text()
    assert len(text.splitlines()) <= 150
    nodes = list(ast.walk(ast.parse(text)))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"argparse", "json", "torch", "torch.nn.functional", "transformers"}
