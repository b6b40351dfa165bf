"""A tiny random model of every family, taken through all that the product does with one.

    python -m tests.support.zoo                     # all of them: benchmarks/results/zoo.json and docs/models.md
    python -m tests.support.zoo Mixtral "Gemma 3"   # some: what is seen, and nothing is written

Each stop compares with an oracle outside of the product: transformers' own log-probs and `generate`, and the method
on one page (`microdpo`). A stop that is refused leaves its sentence.
"""

import json
import os
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
from transformers.utils import logging

from dpo_ref.cli.build import trained_model
from dpo_ref.data.packing import collate, pack
from dpo_ref.data.sources import preferences
from dpo_ref.data.tokenise import end_of_turn_ids, tokenise
from dpo_ref.generation.sampling import generate, never_sampled
from dpo_ref.models.attention import REGISTERED
from dpo_ref.models.experts import routers_of
from dpo_ref.models.loading import load_model, load_tokenizer
from dpo_ref.models.logps import response_logps
from dpo_ref.objectives import pairwise
from dpo_ref.objectives.interface import bind
from dpo_ref.references import policies
from dpo_ref.training.optim import adamw, optimisation
from dpo_ref.training.rounds import OfflineRounds, TrainerConfig, groups_for
from dpo_ref.training.trainer import train
from tests.support import command, microdpo
from tests.support.exact import in_float64
from tests.support.reference_contexts import context_for
from tests.support.tiny import random_groups
from tests.support.tokenizers_here import byte_bpe
from tests.support.zoo_families import AWAY, FAMILIES, Family

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "zoo.json", ROOT / "docs" / "models.md"
DPO, BETA, LR, CPU = bind(pairwise.dpo, beta=0.1), 0.1, 3e-3, torch.device("cpu")
LAYOUT = ((20, (13, 11)), (1, (5, 8)), (30, (9, 30)), (7, (1, 2, 3)))  # longer than windows, some than longrope's 48
ADAPTER = ["model.lora_rank=2"]  # how one is asked for
SENTENCE = re.compile(r"(?<=[a-z0-9)'}])\.(?= |$)")
ROWS = [
    {"prompt": "what is it?", "chosen": "a cat.", "rejected": "the dog ran and ran"},
    {"prompt": "1 2 3", "chosen": "4 5", "rejected": "no"},
    {"prompt": "the cat", "chosen": "sat on the mat", "rejected": "sat"},
    {"prompt": "yes or no", "chosen": "maybe, of course!", "rejected": "yes no yes no"},
]


class Seen(NamedTuple):
    """What became of a family: a row of the page."""

    model_type: str
    example: str
    packed: str  # "packed", or why one response at a time
    lora: str  # the layers that an adapter is put into, or the sentence with which it is refused
    experts: str  # of a mixture: how many, and its load-balancing loss
    generation: str  # "greedy", or the sentence with which it is refused


# --- a family's folder


def make_folder(family: Family, folder: Path) -> Path:
    """A model with weights large enough that mistakes show, its tokenizer and a ChatML template."""
    tokenizer = byte_bpe()
    torch.manual_seed(0)
    special = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    options = {**family.options, **special, "pad_token_id": None}
    if "text_config" in options:
        options["text_config"] = {**options["text_config"], "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(family.model_type, **options)
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
    optim = optimisation(adamw, model, steps, lr=LR, schedule="constant", warmup_ratio=0.0, max_grad_norm=None)
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


def check_runs(folder: Path, work: Path) -> None:
    """A run that was stopped and goes on is the run that was not."""
    run(folder, work / "whole", "trainer.max_steps=2")
    run(folder, work / "parts", "trainer.max_steps=1")
    resumed = command.train(f"resume={work / 'parts'}", "trainer.max_steps=2", "tracking=none")
    assert "going on after step 1" in said_by(resumed)
    whole, parts = (plain(work / name / "policy", torch.float32).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def packed(folder: Path) -> str:
    """`packed`, or why one response after the other."""
    model, notes = load_model(str(folder), CPU, "auto")
    if model.config._attn_implementation in REGISTERED.values():
        return "packed"
    return notes[0].split("unpacked: ")[1]


def check_lora(folder: Path, work: Path) -> str:
    """A step of an adapter; the merged folder gives transformers the policy's log-probs. What was adapted."""
    config = command.resolved("model=pretrained", f"model.path={folder}", "model.attention=sdpa", *ADAPTER)
    policy = trained_model(config, CPU)
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
    inside = {name.split(".lora_B")[0].replace(".base_layer", "").rsplit(".", 1)[1] for name in names}
    return " ".join(sorted(inside))


def check_generation(folder: Path) -> str:
    """Greedy answers, in one batch, are those of transformers' `generate`, prompt by prompt."""
    model, tokenizer = load_model(str(folder), CPU, "auto").model, load_tokenizer(str(folder))
    prompts = [({"role": "user", "content": text},) for text in ("1 2", "what is it?", "1 2", "the cat sat on the")]
    answers = generate(model, tokenizer, prompts, 0, temperature=0.0, max_new_tokens=20)
    theirs = plain(folder, torch.float32)
    ends, never = sorted(end_of_turn_ids(tokenizer)), never_sampled(tokenizer, len(tokenizer)).tolist()
    for prompt, answer in zip(prompts, answers, strict=True):
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        options = {"eos_token_id": ends, "pad_token_id": ends[0], "suppress_tokens": never or None}
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, **options
        )
        written = expected[0, ids.shape[1] :].tolist()
        assert list(answer.token_ids) == written, f"{answer.token_ids} is not {written}"
    return "greedy"


def described_experts(folder: Path) -> str:
    """How many experts a token is sent to, and the coefficient of their load-balancing loss."""
    model = plain(folder)
    if not routers_of(model):
        return "-"
    coefficient = getattr(model.config, "router_aux_loss_coef", None)
    return "no loss of theirs" if coefficient is None else f"router loss {coefficient:g}"


def sentence_of(stop: Callable[[], str]) -> str:
    """What a stop gives, or the sentence with which it is refused."""
    try:
        return stop()
    except ValueError as error:
        return f"refused: {SENTENCE.split(str(error))[0]}"


def visit(family: Family, work: Path) -> Seen:
    """All stops. Raises AssertionError where an oracle says something else."""
    folder = make_folder(family, work / "model")
    check_logps(folder)
    check_steps(folder)
    check_runs(folder, work)
    return Seen(
        family.model_type,
        family.example,
        packed(folder),
        sentence_of(lambda: check_lora(folder, work)),
        described_experts(folder),
        sentence_of(lambda: check_generation(folder)),
    )


def turn_away(family: Family, work: Path) -> str:
    """The sentence with which a training run refuses a model. Raises AssertionError where it does not."""
    folder = make_folder(family, work / "model")
    try:
        run(folder, work / "run", "trainer.max_steps=1")
    except ValueError as error:
        return SENTENCE.split(str(error).replace(str(folder), "..."))[0]
    raise AssertionError(f"{family.title} is not refused")


# --- the page

PREAMBLE = """\
# Models

Written by `make zoo` from `benchmarks/results/zoo.json`: of every family a tiny random model goes through the real
loader, log-probs of packs, two optimiser steps, a run that is stopped and goes on, an adapter, and answers. The
log-probs equal those of single sequences in transformers to 1e-11 in float64, the losses those of
[the method on one page](../tests/support/microdpo.py) to 1e-9; a run that goes on is the whole one bit for bit, a
merged adapter gives transformers the policy's log-probs, and greedy answers are those of `generate`.

**packed**: responses share one copy of their prompt, and nothing is padded. Where an architecture does not allow it,
responses run one at a time, which is said when it is loaded, and costs time alone. **adapter**: the layers that
`model.lora_rank` reaches. **experts**: `model.router_loss=config` adds the model's own load-balancing loss
([metrics.md](metrics.md) has the loads that are written).

| family | `model_type` | such as | packed | adapter | experts | answers |
|---|---|---|---|---|---|---|
"""
REFUSED = """
## Refused

What cannot be trained is refused before any data is read:

| family | `model_type` | what is said |
|---|---|---|
"""


def page(results: dict[str, Any]) -> str:
    """docs/models.md."""
    seen = {title: Seen(**row) for title, row in results["families"].items()}
    rows = []
    for title, row in seen.items():
        adapter = row.lora if row.lora.startswith("refused") else ", ".join(f"`{name}`" for name in row.lora.split())
        cells = (title, f"`{row.model_type}`", row.example, row.packed, adapter, row.experts, row.generation)
        rows.append(f"| {' | '.join(cells)} |\n")
    away = [f"| {title} | `{AWAY[title].model_type}` | {said} |\n" for title, said in results["refused"].items()]
    return PREAMBLE + "".join(rows) + REFUSED + "".join(away)


def main(titles: list[str]) -> None:
    """Visit the families named, or all, and write what was seen of all."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    results: dict[str, Any] = {"families": {}, "refused": {}}
    for kind, families, stop in (("families", FAMILIES, visit), ("refused", AWAY, turn_away)):
        for title, family in families.items():
            if titles and title not in titles:
                continue
            with tempfile.TemporaryDirectory() as name:
                os.environ["DPO_REF_CACHE"] = f"{name}/cache"
                seen = stop(family, Path(name))
            results[kind][title] = seen._asdict() if isinstance(seen, Seen) else seen
            print(f"{title:24}", *(seen if isinstance(seen, Seen) else [seen]), flush=True)
    if not titles:
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main(sys.argv[1:])
