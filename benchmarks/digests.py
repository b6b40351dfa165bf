"""What it costs that bytes are checked before they are trusted, beside what it takes to load them.

    python benchmarks/digests.py          (half a minute, 2 GB of disk)

What is loaded is a checkpoint to go on from: weights and moments of a model of 135 M parameters, once from the page
cache and once from the disk.
"""

import os
import tempfile
import time
from pathlib import Path

from common import llama, write

SHAPE = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
SHAPE |= {"num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True}
VOCAB = 49152
ROUNDS = 3  # the least time of so many


def forget(folder):
    """Have the kernel drop what it keeps of the files of a folder in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(call, before=lambda: None):
    """The least of some tries."""
    times = []
    for _ in range(ROUNDS):
        before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def row(what, folder, check, load):
    """The time of checking, and of checking and loading, from memory and from the disk."""
    mib = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    result = {"what": what, "mib": mib}
    for place, before in {"memory": lambda: None, "disk": lambda: forget(folder)}.items():
        check()  # what is in memory is there before it is timed
        checking, loading = seconds(check), seconds(load, before)
        result[place] = {"checking": checking, "loading": loading, "share": checking / loading}
        print(f"{what}, from {place}: {checking:.3f} of {loading:.2f} s", flush=True)
    return result


def checkpoint_row(work):
    """A checkpoint, and the model that is built to take it."""
    import torch

    from dpo_ref.models import checkpoint

    def trained():
        model = llama(VOCAB, SHAPE)
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = trained()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = checkpoint.save(work / "checkpoints", model, optimizer, {}, {"step": 1}).result()

    def load():
        checkpoint.check(saved)
        checkpoint.load(saved, model, optimizer)

    return row("a checkpoint to go on from", saved, lambda: checkpoint.check(saved), load)


def main():
    with tempfile.TemporaryDirectory() as work:
        write("digests", {"rows": [checkpoint_row(Path(work))]})


if __name__ == "__main__":
    main()
