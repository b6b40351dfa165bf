"""From a file to packs: rows read, checked, rendered, tokenised and packed, cold and with a warm cache.

    python benchmarks/data.py                       # 100,000 pairs of UltraFeedback's lengths, minutes
    python benchmarks/data.py --pairs 5000

The pairs are random words in JSON lines; the tokenizer is a byte-level BPE of up to 32,000 tokens trained on them,
with ChatML. Each measurement is a process of its own; memory is its peak resident set, imports included.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import peak_mib, write

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words(rng, count=20000):
    """Made-up words of two to ten letters."""
    return ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", k=rng.randint(2, 10))) for _ in range(count)]


def make_rows(path, count):
    """Pairs with log-normal lengths: prompts around 130 words, responses around 220, frequent words more often."""
    rng = random.Random(0)
    vocabulary = words(rng)
    weights = [1 / (rank + 10) for rank in range(len(vocabulary))]
    pool = rng.choices(vocabulary, weights, k=2_000_000)

    def text(median, sigma, most):
        size = max(4, min(most, round(median * rng.lognormvariate(0, sigma))))
        start = rng.randrange(len(pool) - size)
        return " ".join(pool[start : start + size])

    with path.open("w") as stream:
        for _ in range(count):
            row = {"prompt": text(80, 0.9, 400), "chosen": text(170, 0.7, 550), "rejected": text(165, 0.7, 550)}
            stream.write(json.dumps(row) + "\n")


def make_tokenizer(folder):
    """A tokenizer to which most of the words are one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    core.train_from_iterator(
        [" ".join(words(random.Random(0)))],
        trainers.BpeTrainer(vocab_size=32000, special_tokens=specials, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": specials[:2]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def child(args):
    """Read, tokenise and pack once; seconds of each part as one line of JSON."""
    begun = time.perf_counter()
    from dpo_ref.data.chat_templates import text_identity
    from dpo_ref.data.packing import optimiser_batches, pack
    from dpo_ref.data.sources import preferences
    from dpo_ref.data.tokenise import tokenise, tokenised_once
    from dpo_ref.models.loading import load_tokenizer
    from dpo_ref.types import silent

    seconds, marks = {}, [time.perf_counter()]
    seconds["imports"] = marks[-1] - begun

    def mark(name):
        marks.append(time.perf_counter())
        seconds[name] = marks[-1] - marks[-2]

    data = preferences(0, path=str(args.work / "pairs.jsonl"))
    mark("read")
    tokenizer = load_tokenizer(str(args.work / "tokenizer"))
    whole = partial(tokenise, max_length=None, over_length="truncate_response")
    tokenised = tokenised_once(data.train, tokenizer, whole, text_identity(tokenizer), args.work / "cache", silent)
    mark("tokenise")
    batches = optimiser_batches(tokenised.groups, 64, 0)
    tokens = 0
    for _ in range(-(-len(tokenised.groups) // 64)):
        packs = pack(next(batches)[1])
        tokens += sum(group.num_tokens for groups in packs for group in groups)
    mark("pack an epoch")
    total = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "total": total, "tokens": tokens, "peak_mib": peak_mib()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/data.json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        child(args)
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_rows(work / "pairs.jsonl", args.pairs)
        make_tokenizer(work / "tokenizer")
        content = {"pairs": args.pairs, "file_mib": (work / "pairs.jsonl").stat().st_size / 2**20}
        environment = os.environ | {"DPO_REF_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1"}
        for state in ("cold", "warm"):
            command = [sys.executable, __file__, "--work", name]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
            content[state] = json.loads(done.stdout.splitlines()[-1])
            parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in content[state]["seconds"].items())
            print(f"{state}: {content[state]['total']:.1f} s ({parts}), peak {content[state]['peak_mib']:.0f} MiB")
    write("data", content, args.out)


if __name__ == "__main__":
    main()
