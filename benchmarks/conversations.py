"""Tokenising long conversations: time against a row's tokens and against its turns; the growth must be linear.

    OMP_NUM_THREADS=1 python benchmarks/conversations.py

A pair of one conversation, ChatML, made-up words. `data.score=last` writes it once for each side; `all` has to know
where generation begins each turn, as the template writes it there. The exponent is the slope of log time over log
size.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

from common import write
from data import make_tokenizer, words
from scaling import exponent

TOKENS = (2000, 4000, 8000, 16000, 32000, 64000)  # in turns of about 80 tokens
EXCHANGES = (25, 50, 100, 200, 400)  # of 32,000 tokens altogether
OPTIONS = {"last": {}, "all": {"score": "all"}, "all, answers": {"score": "all", "score_thinking": "answer"}}
WORDS_PER_TOKEN = 1.4  # of these words, most of them longer than what the tokenizer learnt


def conversation(pool, exchanges, tokens):
    """A pair at the end of so many exchanges, of about so many tokens."""
    from dpo_ref.types import Message, PromptGroup

    rng, size = random.Random(0), max(2, round(tokens / exchanges / 2 / WORDS_PER_TOKEN))

    def text(number):
        return f"{number} {' '.join(rng.choices(pool, k=size))}"

    prompt = [
        Message(role="assistant" if index % 2 else "user", content=text(index)) for index in range(2 * exchanges - 1)
    ]
    return PromptGroup(tuple(prompt), (f"yes {text(0)}", f"no {text(1)}"), ((0, 1),), origin="row 1")


def measured(tokenizer, group, options, repeats):
    """Tokens of the chosen side, and the fewest seconds that tokenising took."""
    from dpo_ref.data.tokenise import tokenise

    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        (found,) = tokenise([group], tokenizer, max_length=10**6, **options).groups
        seconds.append(time.perf_counter() - begun)
    return len(found.prompt_ids) + len(found.response_ids[0]), min(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/conversations.json")
    args = parser.parse_args()
    from dpo_ref.models.loading import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(folder)
        tokenizer = load_tokenizer(folder)
    pool = words(random.Random(0))
    sweeps = {
        "tokens": [(tokens, max(1, tokens // 160), tokens) for tokens in TOKENS],
        "exchanges": [(exchanges, exchanges, 32000) for exchanges in EXCHANGES],
    }
    rows = []
    for against, points in sweeps.items():
        for name, options in OPTIONS.items():
            sizes = [size for size, _, _ in points]
            found = [measured(tokenizer, conversation(pool, *rest), options, args.repeats) for _, *rest in points]
            seconds = [value for _, value in found]
            slope = exponent(sizes, seconds)
            rows.append({"against": against, "score": name, "sizes": sizes, "seconds": seconds, "exponent": slope})
            rows[-1]["tokens"] = [tokens for tokens, _ in found]
            cells = ", ".join(f"{size} {1000 * value:.0f}" for size, value in zip(sizes, seconds, strict=True))
            print(f"score {name}, ms by {against}: {cells}; exponent {slope:.2f}", flush=True)
    write("conversations", {"rows": rows}, args.out)


if __name__ == "__main__":
    main()
