"""Folders of models as users bring them, and files of pairs: small, random weights, tokenizers of their own."""

import json
import random
from pathlib import Path

from tests.support.tiny import tiny_model
from tests.support.tokenizers_here import byte_bpe

WORDS = ["the", "cat", "sat", "on", "mat", "and", "dog", "ran", "what", "is", "it", "yes", "no", "maybe", "of"]


def model_folder(folder: Path, tokenizer=None, kind: str = "llama", **options) -> Path:
    """A model of which transformers knows the architecture; its end token is the tokenizer's EOS, as of base models,
    whatever ends a turn of the template."""
    tokenizer = byte_bpe() if tokenizer is None else tokenizer
    shape = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    tiny_model(kind, **(shape | options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pairs_file(path: Path, number: int = 12, prompt: int = 4, answer: int = 3, seed: int = 0) -> Path:
    """Preference pairs of so many words; the rejected answer has two words more."""
    draw = random.Random(seed)

    def say(size):
        return " ".join(draw.choice(WORDS) for _ in range(size))

    rows = [{"prompt": say(prompt), "chosen": say(answer), "rejected": say(answer + 2)} for _ in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_for(model: Path, pairs: Path, run: Path, *more: str) -> list[str]:
    """What one types after `train.py` for a run of two steps."""
    words = ["model=pretrained", f"model.path={model}", "data=jsonl", f"data.path={pairs}", "data.eval_fraction=0.2"]
    steps = ["trainer.max_steps=2", "trainer.batch_size=4", "tracking=none", "optim.lr=1e-3"]
    return [*words, *steps, f"output_dir={run}", *more]
