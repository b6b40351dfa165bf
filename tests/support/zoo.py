"""A tiny random model of every family, taken through all that the product does with one.

    python -m tests.support.zoo                     # all of them: benchmarks/results/zoo.json and docs/models.md
    python -m tests.support.zoo Mixtral "Gemma 3"   # some: what is seen, and nothing is written

Each stop compares with an oracle outside of the product: transformers' own log-probs and `generate`, and the method
on one page (`microdpo`). A stop that is refused leaves its sentence.
"""

import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_ref.data.packing import collate, pack
from dpo_ref.data.sources import preferences
from dpo_ref.data.tokenise import end_of_turn_ids, tokenise
from dpo_ref.generation.sampling import generate, never_sampled
from dpo_ref.models.attention import REGISTERED
from dpo_ref.models.loading import load_model, load_tokenizer, pretrained
from dpo_ref.models.logps import response_logps
from dpo_ref.objectives import pairwise
from dpo_ref.objectives.interface import bind
from dpo_ref.references import policies
from dpo_ref.training.optim import adamw
from dpo_ref.training.rounds import OfflineRounds, TrainerConfig, groups_for
from dpo_ref.training.trainer import train
from tests.support import command, microdpo
from tests.support.exact import in_float64
from tests.support.reference_contexts import context_for
from tests.support.tiny import random_groups
from tests.support.tokenizers_here import byte_bpe
from tests.support.zoo_families import FAMILIES, Family

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "zoo.json", ROOT / "docs" / "models.md"
DPO, BETA, LR, CPU = bind(pairwise.dpo, beta=0.1), 0.1, 3e-3, torch.device("cpu")
LAYOUT = ((20, (13, 11)), (1, (5, 8)), (30, (9, 30)), (7, (1, 2, 3)))  # longer than windows, some than longrope's 48
LORA = ["model.lora_rank=2"]  # how an adapter is asked for
ROWS = [
    {"prompt": "what is it?", "chosen": "a cat.", "rejected": "the dog ran and ran"},
    {"prompt": "1 2 3", "chosen": "4 5", "rejected": "no"},
    {"prompt": "the cat", "chosen": "sat on the mat", "rejected": "sat"},
    {"prompt": "yes or no", "chosen": "maybe, of course!", "rejected": "yes no yes no"},
]


class Seen(NamedTuple):
    """What became of a family: a row of the page. Of what a stop refused, the sentence."""

    model_type: str
    example: str
    parameters: int
    packed: str  # "packed", or why one response at a time
    lora: str  # what an adapter is put into, of all matrices inside the decoder layers
    generation: str
    router: str


# --- a family's folder


def make_folder(family: Family, folder: Path) -> Path:
    """A model with weights large enough that mistakes show, its tokenizer and a ChatML template."""
    tokenizer = byte_bpe()
    torch.manual_seed(0)
    special = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(family.model_type, **family.options, **special, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.endswith(("A_log", "conv1d.weight")):
            nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


# --- the stops


def loaded(folder: Path) -> Any:
    """The model as the real loader gives it, in float64."""
    return in_float64(load_model(str(folder), CPU, "auto", dtype=torch.float64, experts_implementation="eager").model)


def plain(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The model as transformers gives it."""
    # Without what the default takes for the experts: torch's grouped product knows no float64.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    return in_float64(model) if dtype is torch.float64 else model


@torch.no_grad()
def alone(model: Any, groups) -> Tensor:
    """Each response's token log-probs, from full logits of its own sequence."""
    values = []
    for group in groups:
        for response in group.response_ids:
            ids = torch.tensor([[*group.prompt_ids, *response]])
            logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(dim=-1)
            start = len(group.prompt_ids)
            values.append(logps[start - 1 : -1].gather(1, ids[0, start:, None]).squeeze(1))
    return torch.cat(values)


def check_logps(folder: Path) -> None:
    """Log-probs of packs equal those of single sequences."""
    groups = random_groups(LAYOUT, vocab=300)
    with torch.no_grad():
        ours = response_logps(loaded(folder), collate(groups)).token_logps
        torch.testing.assert_close(ours, alone(plain(folder), groups), atol=1e-11, rtol=1e-11)


def check_steps(folder: Path) -> None:
    """Losses before, between and after two optimiser steps equal those of the method on one page."""
    tokenizer, model = load_tokenizer(str(folder)), plain(folder)
    pairs = [[microdpo.encode(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in ROWS]
    reference = partial(microdpo.response_logps, plain(folder))
    page = list(microdpo.losses(model, reference, microdpo.dpo, pairs, BETA, LR, len(pairs), 3))
    losses = [step.metrics["loss"].item() for step in library_steps(loaded(folder), folder, 3, torch.float64)]
    assert page[0] != page[-1]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(page), rtol=1e-9, atol=1e-9)


def library_steps(model: Any, folder: Path, steps: int, dtype: torch.dtype, adapter: Any = None) -> Iterator[Any]:
    """The trainer's steps over all pairs, packed into several packs."""
    tokenizer = load_tokenizer(str(folder))
    groups = groups_for(DPO, tokenise(preferences(0, path=str(folder / "pairs.jsonl")).train, tokenizer).groups)
    packing = partial(pack, tokens_per_batch=60)

    def other(source: Any) -> Any:
        return loaded(folder) if dtype is torch.float64 else load_model(str(folder), CPU, "auto").model

    context = context_for(folder / "cache", model, tokenizer, other, groups=groups, pack=packing)
    reference = policies.other(context, path=str(folder), cache="off")  # a table keeps float32
    optim = adamw(model, steps, lr=LR, schedule="constant", warmup_ratio=0.0, max_grad_norm=None)
    rounds = OfflineRounds(groups, TrainerConfig(batch_size=len(ROWS), epochs=float(steps)), packing, 0)
    return train(context.policy, reference, DPO, optim, rounds)


def run(folder: Path, out: Path, *options: str) -> str:
    """A training run by the command; what it says. Raises ValueError for what it refuses."""
    overrides = ["model=pretrained", f"model.path={folder}", "data=jsonl", f"data.path={folder / 'pairs.jsonl'}"]
    overrides += [f"output_dir={out}", "tracking=none", "beta=0.1", f"optim.lr={LR}", "optim.schedule=constant"]
    overrides += ["trainer.batch_size=2", "trainer.epochs=4", "optim.warmup_ratio=0", *options]
    return said_by(command.train(*overrides))


def said_by(done: command.Done) -> str:
    """What a command wrote. Raises ValueError with what it refused."""
    if done.returncode != 0:
        raise ValueError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    return done.stdout


def check_runs(folder: Path, work: Path) -> str:
    """A run that was stopped and goes on is the run that was not; how it is packed."""
    text = run(folder, work / "whole", "trainer.max_steps=2")
    run(folder, work / "parts", "trainer.max_steps=1")
    resumed = command.train(f"resume={work / 'parts'}", "trainer.max_steps=2", "tracking=none")
    assert "going on after step 1" in said_by(resumed)
    whole, parts = (plain(work / name / "policy", torch.float32).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    reasons = re.findall(r"one response at a time, unpacked: (.*)", " ".join(text.split("\n")))
    return reasons[0].split("  ")[0].strip() if reasons else "packed"


def packed(folder: Path) -> str:
    """`packed`, or why one response after the other."""
    model, notes = load_model(str(folder), CPU, "auto")
    if model.config._attn_implementation in REGISTERED.values():
        return "packed"
    return notes[0].split("unpacked: ")[1]


def check_lora(folder: Path, work: Path) -> str:
    """A step of an adapter; the merged folder gives transformers the policy's log-probs. What was adapted."""
    policy = pretrained(CPU, path=str(folder), attention="sdpa", lora_rank=2)
    before = alone(plain(folder, torch.float32), random_groups(LAYOUT, vocab=300))
    list(library_steps(policy.model, folder, 1, torch.float32))
    groups = random_groups(LAYOUT, vocab=300)
    with torch.no_grad():
        ours = policy.outputs(collate(groups)).token_logps
    policy.save(work / "merged")
    theirs = alone(plain(work / "merged", torch.float32), groups)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    assert (theirs - before).abs().max() > 1e-3
    names = [name for name, _ in policy.model.named_parameters() if name.endswith("lora_B.default.weight")]
    inside = {name.split(".lora_B")[0].rsplit(".", 1)[1] for name in names}
    return " ".join(sorted(inside))


def check_generation(folder: Path) -> str:
    """Greedy answers, in one batch, are those of transformers' `generate`, prompt by prompt."""
    model, tokenizer = load_model(str(folder), CPU, "auto").model, load_tokenizer(str(folder))
    prompts = [({"role": "user", "content": text},) for text in ("1 2", "what is it?", "1 2", "the cat sat on the")]
    answers = generate(model, tokenizer, prompts, 0, temperature=0.0, max_new_tokens=9)
    theirs = plain(folder, torch.float32)
    ends, never = sorted(end_of_turn_ids(tokenizer)), never_sampled(tokenizer, len(tokenizer)).tolist()
    for prompt, answer in zip(prompts, answers, strict=True):
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        options = {"eos_token_id": ends, "pad_token_id": ends[0], "suppress_tokens": never or None}
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9, **options
        )
        written = expected[0, ids.shape[1] :].tolist()
        assert list(answer.token_ids) == written, f"{answer.token_ids} is not {written}"
    return "greedy"


def refused(stop: Callable[[], str]) -> str:
    """What a stop gives, or the sentence with which it is refused."""
    try:
        return stop()
    except ValueError as error:
        return f"refused: {error}"


def visit(family: Family, work: Path) -> Seen:
    """All stops. Raises AssertionError where an oracle says something else."""
    folder = make_folder(family, work / "model")
    parameters = sum(parameter.numel() for parameter in plain(folder).parameters())
    check_logps(folder)
    check_steps(folder)
    check_runs(folder, work)
    return Seen(
        family.model_type, family.example, parameters, packed(folder), refused(lambda: check_lora(folder, work)),
        refused(lambda: check_generation(folder)), "",
    )  # fmt: skip


if __name__ == "__main__":
    import time
    import traceback

    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for family in FAMILIES.values():
        if sys.argv[1:] and family.title not in sys.argv[1:]:
            continue
        started = time.time()
        with tempfile.TemporaryDirectory() as name:
            try:
                print(f"{family.title:22}", *visit(family, Path(name)), f"{time.time() - started:.1f}", flush=True)
            except Exception as error:
                tb = traceback.extract_tb(error.__traceback__)
                where = [f.name for f in tb if f.filename.endswith("zoo.py")][-1]
                print(
                    f"{family.title:22} FAIL in {where}: {type(error).__name__} {str(error)[:300]!r} [{tb[-1].filename.split('/')[-1]}:{tb[-1].lineno}] {time.time() - started:.1f}",
                    flush=True,
                )
                if len(sys.argv) > 1:
                    traceback.print_exc()
