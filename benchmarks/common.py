"""What the benchmarks share: the model, a timed step of the trainer, and how results are written."""

import json
import os
import platform
import resource
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
TINY = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "max_position_embeddings": 8192, "tie_word_embeddings": False, "pad_token_id": 0}


def llama(vocab, shape=None):
    """A Llama with random weights, the same in every process; ~7 M parameters at vocabulary 8k."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(shape or TINY), vocab_size=vocab, attn_implementation="sdpa"))


def peak_mib():
    """Peak resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine():
    """The hardware, and nothing else about the machine."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": names[0] if names else platform.machine(), "cores": os.cpu_count(), "gpu": gpu}


def write(name, content, out=None):
    """Write a result file with machine and versions."""
    versions = {package: version(package) for package in ("torch", "transformers")}
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "versions": versions} | content, indent=1) + "\n")
    print(f"\nwrote {path}", flush=True)


class Stepper:
    """Optimiser steps of the trainer on given groups, the reference precomputed."""

    def __init__(self, model, groups, tokens_per_batch=8192, optimiser="adamw"):
        import torch

        from dpo_ref.data import packing
        from dpo_ref.distributed import keep_memory
        from dpo_ref.models.loading import Policy
        from dpo_ref.objectives.interface import bind
        from dpo_ref.objectives.pairwise import dpo
        from dpo_ref.references.table import PrecomputedReference, row_key
        from dpo_ref.training import optim as optimisers

        keep_memory()
        self.policy, self.objective = Policy(lambda: model, None), bind(dpo, beta=0.1)
        make = getattr(optimisers, optimiser)
        self.optim = optimisers.optimisation(make, model, 1000, lr=1e-5, schedule="constant", warmup_ratio=0.0)
        self.pack = partial(packing.pack, tokens_per_batch=tokens_per_batch)
        rows = {row_key(g): torch.zeros(sum(map(len, g.response_ids))).numpy() for g in groups}
        self.reference = PrecomputedReference("initial", "", "", groups, rows, self.policy.device)
        self.steps = 0

    def __call__(self, batch):
        """One step; seconds until its loss is known."""
        import torch

        from dpo_ref.data.packing import share_of
        from dpo_ref.training.trainer import backward, update

        start = time.perf_counter()
        values, _ = backward(self.policy, self.reference, self.objective, share_of(batch, self.pack))
        update(self.policy, self.optim, self.steps, torch.ones((), dtype=torch.bool, device=self.policy.device))
        float(values["loss"].mean())
        self.steps += 1
        return time.perf_counter() - start
