"""Tables of log-probs that were exported, and an oracle for them: transformers, one response at a time, in float64."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ref.files.digests import DIGEST, sealed
from dpo_ref.lab.models import locate
from tests.support.command import train

COMMON = ("model.path=lab:tiny", "tracking=none")
LAB = ("data.num_pairs=40", "data.num_eval_pairs=12", "data.num_test_prompts=2")


def exported(folder: Path, *words: str):
    """`stage=cache_reference export=<folder>`, as Hydra gets it."""
    return train(*COMMON, "stage=cache_reference", f"export_to={folder}", *words)


def rows_in(folder: Path, name: str = "train.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def certificate_in(folder: Path):
    return json.loads((folder / "certificate.json").read_text())


def forged(folder: Path, **changes):
    """The certificate says something else, under a digest that fits."""
    content = certificate_in(folder)
    del content[DIGEST]
    (folder / "certificate.json").write_text(json.dumps(sealed(content | changes)))


class Naive:
    """log p(y | x) of a lab model, of texts that are written by hand."""

    def __init__(self, path: str):
        folder = locate(path)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        self.model = model.eval()

    @torch.no_grad()
    def logp(self, start: str, body: str) -> float:
        """Summed over the tokens of `body`, in nats."""
        before, ids = (self.tokenizer(text, add_special_tokens=False).input_ids for text in (start, start + body))
        logps = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(logps[position - 1, ids[position]].item() for position in range(len(before), len(ids)))


def written(turns) -> str:
    """A conversation as the lab's template writes it, up to where the assistant begins."""
    return "<|bos|>" + "".join(f"<|{t['role']}|>{t['content']}<|eot|>" for t in turns) + "<|assistant|>"
