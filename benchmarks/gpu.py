"""Steps of full fine-tuning on a CUDA device: pairs/s, tokens/s, model FLOP utilisation, memory, with each technique.

    python benchmarks/gpu.py --shapes 1b
    python benchmarks/gpu.py --shapes 1b 8b --lengths ultrafeedback hh tldr

Weights are random, lengths are real distributions (benchmarks/pairs.py). Useful FLOPs of a step over G pairs of prompt
length P and response lengths C, R, with N_body the parameters of the layers and N_head = H V:

    3 sum_g [ 2 N_body (P + C + R) + 2 N_head (C + R) + 4 L H (sum of causal context lengths of P, C and R) ]

that is, the prompt once, the head on response tokens, nothing for the reference, padding or recomputation. Utilisation
is against --peak TFLOP/s (989 for a Hopper card in bfloat16).
"""

import argparse
import gc
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import Stepper, llama, write
from pairs import pairs

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCAB, KV_HEADS = 128256, 8
VARIANTS = {
    "as shipped": {},
    "compiled": {"compile": True},
    "recomputing activations": {"gradient_checkpointing": "full"},
    "from inputs in main memory": {"gradient_checkpointing": "offload"},
    "recomputing cheap ones": {"gradient_checkpointing": "selective"},
    "one group a pack": {"packing": "one_group"},
    "sdpa by piece": {"attention": "sdpa"},
}


def useful_flops(groups, shape):
    """Floating-point operations a step needs, by the formula above."""
    hidden, inner, layers = (shape[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    head_dim = hidden // shape["num_attention_heads"]
    body = layers * (2 * hidden * hidden + 2 * hidden * KV_HEADS * head_dim + 3 * hidden * inner)
    total = 0
    for group in groups:
        prompt, sizes = len(group.prompt_ids), list(map(len, group.response_ids))
        context = prompt * (prompt + 1) / 2 + sum(prompt * r + r * (r + 1) / 2 for r in sizes)
        total += 2 * body * group.num_tokens + 2 * hidden * VOCAB * sum(sizes) + 4 * layers * hidden * context
    return 3 * total


def measure(shape_name, lengths, variant, args):
    """One configuration, in a model of its own."""
    import torch

    from dpo_ref.data import packing
    from dpo_ref.models import layers
    from dpo_ref.models.attention import resolve_backend
    from dpo_ref.models.packable import install

    options = VARIANTS[variant]
    shape = SHAPES[shape_name] | {"num_key_value_heads": KV_HEADS, "max_position_embeddings": 8192}
    shape |= {"tie_word_embeddings": False, "pad_token_id": 0}
    torch.set_default_dtype(torch.bfloat16 if args.optimiser == "adamw_bf16" else torch.float32)
    try:
        with torch.device("cuda"):
            policy = llama(VOCAB, shape).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    reason = install(policy, resolve_backend(options.get("attention", "auto")))
    layers.CHECKPOINTING[options.get("gradient_checkpointing", "off")](policy)
    if options.get("compile"):
        layers.compile_layers(policy)
    policy.train()
    groups = pairs(lengths, args.pairs * (args.steps + 2), VOCAB)
    step = Stepper(policy, groups, args.tokens, args.optimiser)
    if "packing" in options:
        step.pack = lambda batch: packing.pack(batch, packing=options["packing"])
    batches = [groups[i : i + args.pairs] for i in range(0, len(groups), args.pairs)]
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        for batch in batches[:2]:
            step(batch)
        graphs = layers.graphs_compiled()
        torch.cuda.reset_peak_memory_stats()
        seconds = [step(batch) for batch in batches[2:]]
        graphs = layers.graphs_compiled() - graphs
    second = statistics.median(seconds)
    flops = statistics.mean(useful_flops(batch, shape) for batch in batches[2:])
    tokens = statistics.mean(
        sum(len(g.prompt_ids) * 2 + sum(map(len, g.response_ids)) for g in b) for b in batches[2:]
    )
    return {
        "shape": shape_name, "lengths": lengths, "variant": variant, "unpacked_because": reason,
        "pairs_per_second": args.pairs / second, "tokens_per_second": tokens / second,
        "mfu": flops / second / (args.peak * 1e12), "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "recompilations": graphs,
    }  # fmt: skip


def attempt(shape, lengths, variant, args):
    """The row of one configuration; what failed is a row too, and ends nothing else."""
    import torch

    try:
        return measure(shape, lengths, variant, args)
    except torch.OutOfMemoryError:
        failure = f"out of memory, at {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    except Exception as error:
        failure = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return {"shape": shape, "lengths": lengths, "variant": variant, "failure": failure}


def line_of(row):
    """One row of the printed table."""
    name = f"{row['shape']} {row['lengths']} {row['variant']}"
    if "failure" in row:
        return f"{name:34} {row['failure']}"
    return (
        f"{name:34} {row['pairs_per_second']:8.2f} {row['tokens_per_second']:9.0f} {row['mfu']:6.1%} "
        f"{row['peak_gib']:6.1f}  {row['recompilations']}"
    )


def main():
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["1b"], choices=SHAPES)
    parser.add_argument("--lengths", nargs="*", default=["ultrafeedback"])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--optimiser", default="adamw_bf16", choices=("adamw", "adamw_bf16"))
    parser.add_argument("--pairs", type=int, default=64, help="pairs per step")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per micro-batch")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peak", type=float, default=989.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    rows = []
    print(f"{'':34} {'pairs/s':>8} {'tokens/s':>9} {'MFU':>6} {'GiB':>6}  new graphs")
    for shape in args.shapes:
        for lengths in args.lengths:
            for variant in args.variants:
                rows.append(attempt(shape, lengths, variant, args))
                gc.collect()
                torch.cuda.empty_cache()
                print(line_of(rows[-1]), flush=True)
                write("gpu", {"peak_tflops": args.peak, "tokens_per_batch": args.tokens, "rows": rows}, args.out)
    if any("failure" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
