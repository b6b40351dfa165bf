"""Questions in the layouts of their authors, and a tiny model that answers them."""

import json
from pathlib import Path

from dpo_ref.generation.engine import Sampling
from dpo_ref.generation.sampling import Local
from tests.support.tiny import tiny_model
from tests.support.tokenizers_here import byte_bpe

TOKENIZER = byte_bpe()
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["a cat", "the dog ran"]},
    {"question_id": 111, "category": "math", "turns": ["1 2 3", "what is it?"], "reference": ["6", "7"]},
]
ALPACA = [
    {"instruction": "a cat", "output": "A cat.", "generator": "text_davinci_003", "dataset": "helpful_base"},
    {"instruction": "the dog ran", "output": "It did.", "generator": "text_davinci_003", "dataset": "koala"},
]


def written(path: Path, rows) -> str:
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return str(path)


def engine(**options):
    model = tiny_model("llama", vocab_size=len(TOKENIZER))
    sampling = Sampling(
        **({"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, "samples_per_prompt": 2} | options)
    )
    return Local(TOKENIZER, sampling, 3, lambda: model)
