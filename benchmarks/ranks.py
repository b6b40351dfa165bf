"""Several ranks on this machine's cores: how much faster they are than one, what they send, and what each of them
holds. `python benchmarks/ranks.py` takes some ten minutes on two cores; ONLY=throughput or ONLY=memory one part of it.

Throughput: DPO steps of the 7 M model at UltraFeedback's lengths, 2 ranks of 1 thread against 1 rank of 2 threads and
1 of 1, taken in turns. The ideal of two ranks is half the seconds of one rank with one thread.

Memory: a model of 100 M parameters under parallel=fsdp on 1, 2 and 4 ranks: what a rank's process has in memory after
loading and after steps, above what it has with nothing loaded.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import ROOT, TINY, llama, write

PAIRS, STEPS, ROUNDS = 16, 4, 3
PROMPT, RESPONSE = 170, 300  # tokens in the mean
LARGE = {"num_hidden_layers": 14, "hidden_size": 640, "intermediate_size": 1728, "num_attention_heads": 10}
LARGE |= {"num_key_value_heads": 10, "max_position_embeddings": 2048, "tie_word_embeddings": False, "pad_token_id": 0}


def groups(count, seed=0, vocab=8000, mean=RESPONSE):
    """Pairs of about UltraFeedback's lengths, or shorter ones."""
    import numpy as np

    from dpo_ref.types import TokenGroup

    draw = np.random.default_rng(seed)

    def ids(size):
        length = int(np.clip(draw.lognormal(np.log(size), 0.5), 8, 4 * size))
        return draw.integers(3, vocab, length).tolist()

    made = []
    for index in range(count):
        responses = (ids(mean), ids(mean))
        sizes = tuple(4 * len(response) for response in responses)
        made.append(TokenGroup(index, str(index), ids(PROMPT * mean // RESPONSE), responses, sizes, ((0, 1),)))
    return made


def resident():
    """MiB that this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def stepper(model, data, holding):
    """The trainer's step on a model as ranks hold it."""
    from dataclasses import replace

    from common import Stepper

    steps = Stepper(model, data, tokens_per_batch=4096)
    steps.policy = replace(steps.policy, holding=holding)
    return steps


def throughput():
    """Seconds of each step, and the bytes of gradients that a step sends."""
    from dpo_ref.distributed import ranks
    from dpo_ref.models.sharding import ddp, none

    data, model = groups(PAIRS * (STEPS + 1)), llama(8000)
    placed = (ddp if ranks().size > 1 else none)().holding(model, None)
    step = stepper(model, data, placed)
    batches = [data[start : start + PAIRS] for start in range(0, len(data), PAIRS)]
    seconds = [step(batch) for batch in batches][1:]
    sent = placed.bytes_reduced[0] / len(batches) if ranks().size > 1 else 0
    return {"seconds": seconds, "bytes_a_step": sent, "trained": sum(p.numel() for p in model.parameters())}


def given_back():
    """MiB that this process has in memory, once the C library has given back what is free."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()


def memory():
    """MiB of this rank before the model, with it, and with its moments after steps; then what a step needs besides."""
    import torch
    from common import peak_mib

    from dpo_ref.distributed import ranks
    from dpo_ref.models.loading import fill, model_without_weights
    from dpo_ref.models.sharding import fsdp

    small = model_without_weights(os.environ["SMALL"], "model.path", None)  # all that is imported, and room for it
    placed = fsdp().holding(small, torch.float32)
    warm = stepper(fill(small, os.environ["SMALL"], "sdpa", "model.path", None).model, groups(2), placed)
    warm(groups(2))
    before = given_back()
    bare = model_without_weights(os.environ["MODEL"], "model.path", None)
    placed = fsdp().holding(bare, torch.float32)
    model = fill(bare, os.environ["MODEL"], "sdpa", "model.path", None).model
    loaded = given_back()
    data = groups(4, mean=24)
    step = stepper(model, data, placed)
    for _ in range(2):
        step(data)
    trained = sum(p.numel() for p in model.parameters())
    told = {"before": before, "loaded": loaded, "after": given_back(), "peak": peak_mib()}
    return {"ranks": ranks().size, "parameters": trained} | told


def as_rank(part):
    """What a process of several does; the first prints what each of them found."""
    sys.path.insert(0, str(ROOT))
    import torch

    from dpo_ref.distributed import joined, ranks

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with joined():
        found = ranks().gather({"throughput": throughput, "memory": memory}[part]())
        if ranks().is_first:
            print(json.dumps(found))


def on_ranks(part, count, threads, **environment):
    """Start the processes; what they found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": str(threads), "LOCAL_WORLD_SIZE": str(count), **environment}
    start = partial(subprocess.Popen, [sys.executable, __file__, part], stdout=subprocess.PIPE, text=True)
    processes = [start(env=shared | {"RANK": str(index), "LOCAL_RANK": str(index)}) for index in range(count)]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a rank failed")
    return json.loads(said[0].splitlines()[-1])


def measure_throughput():
    """In turns, so that a machine that changes its speed changes it for all."""
    ways = {"1 rank, 1 thread": (1, 1), "1 rank, 2 threads": (1, 2), "2 ranks, 1 thread each": (2, 1)}
    seconds, found = {way: [] for way in ways}, {}
    for turn in range(ROUNDS):
        for way, (count, threads) in ways.items():
            found[way] = on_ranks("throughput", count, threads)
            seconds[way] += found[way][0]["seconds"]
            print(f"turn {turn + 1}: {way}: {statistics.median(found[way][0]['seconds']):.3f} s a step", flush=True)
    median = {way: statistics.median(values) for way, values in seconds.items()}
    two, trained = median["2 ranks, 1 thread each"], found["2 ranks, 1 thread each"][0]["trained"]
    return {
        "seconds_a_step": seconds,
        "median": median,
        "efficiency": median["1 rank, 1 thread"] / (2 * two),
        "over_two_threads": median["1 rank, 2 threads"] / two,
        "bytes_a_step": found["2 ranks, 1 thread each"][0]["bytes_a_step"],
        "bytes_by_the_formula": 4 * trained,
    }


def measure_memory():
    """Of the rank that has most, on 1, 2 and 4 ranks."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        paths = {"MODEL": f"{folder}/large", "SMALL": f"{folder}/small"}
        for name, shape in (("MODEL", LARGE), ("SMALL", TINY)):
            llama(8000, shape).save_pretrained(paths[name])
        rows = []
        for count in (1, 2, 4):
            of_ranks = on_ranks("memory", count, 1, **paths)
            row = max(of_ranks, key=lambda of_rank: of_rank["after"] - of_rank["before"])
            rows.append(row)
            loaded, after = row["loaded"] - row["before"], row["after"] - row["before"]
            formula = [size * row["parameters"] / count / 2**20 for size in (4, 12)]
            words = f"{loaded:.0f} MiB with the model (4 N / n = {formula[0]:.0f}), {after:.0f} after steps"
            print(f"{count} ranks: {words} (12 N / n = {formula[1]:.0f})", flush=True)
        return rows


if __name__ == "__main__":
    if sys.argv[1:]:
        as_rank(sys.argv[1])
    else:
        parts = {"throughput": measure_throughput, "memory": measure_memory}
        chosen = [os.environ["ONLY"]] if "ONLY" in os.environ else list(parts)
        path = ROOT / "benchmarks" / "results" / "ranks.json"
        kept = json.loads(path.read_text()) if path.is_file() else {}
        write("ranks", {name: kept[name] for name in parts if name in kept} | {name: parts[name]() for name in chosen})
