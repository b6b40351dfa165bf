"""Memory of a DPO step on one long pair: responses of 2k to 32k tokens, by how activations are kept.

    OMP_NUM_THREADS=2 python benchmarks/long_context.py

Every point is a process of its own: its resident memory at the highest, above what it has after a step on a tiny pair
(weights, gradients, moments, libraries), beside what `models/memory.py` counts. Growth is fitted by a line over the
pack's tokens, from where on activations outgrow a chunk of logits (128 MiB). On a CPU the layers' inputs have nowhere
to go: `offload` is counted, not measured.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import Stepper, llama, write

SHAPE = {"num_hidden_layers": 6, "hidden_size": 96, "intermediate_size": 256, "head_dim": 16}
SHAPE |= {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 65536}
SHAPE |= {"tie_word_embeddings": False, "pad_token_id": 0}
VOCAB, PROMPT = 49152, 256
RESPONSES, FITTED_FROM = (2048, 4096, 8192, 16384, 32768), 8192
MEASURED, COUNTED = ("off", "selective", "full"), ("off", "selective", "full", "offload")
MIB = 2**20


def pair(length, index=0):
    """One pair, both of whose responses have so many tokens."""
    from dpo_ref.types import TokenGroup

    ids = [4 + 7 * i % (VOCAB - 4) for i in range(PROMPT + length)]
    response = ids[PROMPT:]
    return [TokenGroup(index, str(index), ids[:PROMPT], (response, response[::-1]), (1, 1), ((0, 1),))]


def model_of(how):
    """A model in training mode whose activations are kept in a way."""
    from dpo_ref.models import layers
    from dpo_ref.models.packable import install

    model = llama(VOCAB, SHAPE).eval()
    assert install(model, "sdpa") is None
    layers.CHECKPOINTING[how](model)
    return model.train()


def highest_mib():
    """Resident memory of this process at its highest since `forget_highest`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def forget_highest():
    """From here on (Linux: proc_pid_clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(how, length):
    """Seconds of a step and MiB at its peak, in this process."""
    from dpo_ref.distributed import resident_bytes

    tiny, long = pair(16), pair(length, 1)
    step = Stepper(model_of(how), [*tiny, *long], tokens_per_batch=10**9)
    step(tiny)
    before = resident_bytes() / MIB
    forget_highest()
    seconds = step(long)
    return {"seconds": seconds, "peak_mib": highest_mib() - before}


def count(how):
    """MiB of activations and of what comes and goes, by response length, as `stage=check` counts them."""
    import torch

    from dpo_ref.models.loading import Policy
    from dpo_ref.models.memory import ACTIVATIONS, REST, step_memory

    model = model_of(how)
    policy = Policy(lambda: model, None)
    counted = {length: step_memory(policy, pair(length), 1, torch.device("cpu")).parts for length in RESPONSES}
    return {length: (parts[ACTIVATIONS] + parts[REST]) / MIB for length, parts in counted.items()}


def line(points, key):
    """Slope in bytes a token, and R², of the least-squares line."""
    points = [point for point in points if point["response"] >= FITTED_FROM]
    tokens, values = [PROMPT + 2 * point["response"] for point in points], [point[key] for point in points]
    mean_x, mean_y = sum(tokens) / len(tokens), sum(values) / len(values)
    pairs = list(zip(tokens, values, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in pairs) / sum((x - mean_x) ** 2 for x in tokens)
    left = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in pairs)
    return {"bytes_a_token": slope * MIB, "r2": 1 - left / sum((y - mean_y) ** 2 for y in values)}


def in_a_process(*words):
    """What a process of this script says."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row_of(how, lengths):
    """All points of one way, and the lines through them."""
    counted = in_a_process("--how", how)
    points = [{"response": length, "counted_mib": counted[str(length)]} for length in lengths]
    row = {"how": how, "points": points, "counted": line(points, "counted_mib")}
    if how in MEASURED:
        for point in points:
            point |= in_a_process("--how", how, "--length", str(point["response"]))
            print(how, point, flush=True)
        row["measured"] = line(points, "peak_mib")
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=RESPONSES[-1])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--how", choices=COUNTED, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.how:
        print(json.dumps(measure(args.how, args.length) if args.length else count(args.how)))
        return
    rows = [row_of(how, [n for n in RESPONSES if n <= args.longest]) for how in COUNTED]
    for row in rows:
        print(row["how"], "measured", row.get("measured"), "counted", row["counted"])
    about = {"layers": SHAPE["num_hidden_layers"], "hidden": SHAPE["hidden_size"], "vocab": VOCAB, "prompt": PROMPT}
    write("long_context", about | {"rows": rows}, args.out)


if __name__ == "__main__":
    main()
