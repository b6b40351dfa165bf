"""Time and memory of a step against tokens, pairs, vocabulary and the prompt's share; the growth must be linear.

    OMP_NUM_THREADS=2 python benchmarks/scaling.py

Prints a table; the exponent is the slope of log time over log size. Every size is a process of its own.
"""

import argparse
import json
import math
import subprocess
import sys

from common import TINY, Stepper, llama, peak_mib, write

SIZES = {
    "pairs": [{"pairs": n} for n in (2, 4, 8, 16, 32)],
    "response_tokens": [{"response": n} for n in (50, 100, 200, 400, 800)],
    "vocabulary": [{"vocab": n} for n in (4000, 8000, 16000, 32000, 64000)],
    "prompt_share": [{"prompt": n, "response": (800 - n) // 2} for n in (100, 300, 500, 700)],
}
SWEPT = {"pairs": "pairs", "response_tokens": "response", "vocabulary": "vocab", "prompt_share": "prompt"}


def child(args):
    """Median of timed steps, and peak memory over what the imports and the model took."""
    import torch

    from dpo_ref.models.packable import install
    from dpo_ref.types import TokenGroup

    torch.set_num_threads(args.threads)
    policy = llama(args.vocab, TINY).eval()
    assert install(policy, "sdpa") is None
    ids = [4 + i % (args.vocab - 4) for i in range(args.prompt + args.response)]
    response = ids[: args.response]
    groups = [
        TokenGroup(i, str(i), [*ids[: args.prompt - 1], 4 + i], (response, response[::-1]), (1, 1), ((0, 1),))
        for i in range(args.pairs)
    ]
    step = Stepper(policy, groups, tokens_per_batch=10**9)
    step(groups[:1])
    before = peak_mib()
    seconds = sorted(step(groups) for _ in range(args.repeats))
    print(json.dumps({"seconds": seconds[len(seconds) // 2], "peak_mib": peak_mib() - before}))


def exponent(sizes, values):
    """Least-squares slope of log value over log size."""
    xs, ys = [math.log(x) for x in sizes], [math.log(y) for y in values]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    products = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return products / sum((x - mean_x) ** 2 for x in xs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    for name, value in (("pairs", 4), ("prompt", 200), ("response", 200), ("vocab", 8000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    rows = []
    for name, settings in SIZES.items():
        points = []
        for options in settings:
            command = [sys.executable, __file__, "--child", "--threads", str(args.threads)]
            command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            points.append(options | json.loads(done.stdout.splitlines()[-1]))
        sizes = [row[SWEPT[name]] for row in points]
        slope = exponent(sizes, [row["seconds"] for row in points])
        rows.append({"against": name, "points": points, "exponent": slope})
        print(f"\n{name}: time grows with exponent {slope:.2f}")
        for size, row in zip(sizes, points, strict=True):
            print(f"  {size:>7}  {1000 * row['seconds']:8.1f} ms  {row['peak_mib']:8.0f} MiB", flush=True)
    write("scaling", {"threads": args.threads, "rows": rows})


if __name__ == "__main__":
    main()
