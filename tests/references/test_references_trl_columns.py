"""TRL trains from an exported folder, as docs/references_table.md says, and computes our losses."""

import json

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from dpo_ref.data.packing import epoch_order
from dpo_ref.lab.models import locate
from tests.support.command import train
from tests.support.exported import COMMON, LAB, exported
from tests.support.quick import only

BATCH, LR, BETA, PAIRS = 8, 3e-4, 0.2, 40


class Watched(DPOTrainer):
    """Keeps every step's loss, which the log rounds, and asks no reference."""

    def __init__(self, **options):
        super().__init__(**options)
        self.losses = []

    def compute_loss(self, *args, **options):
        loss = super().compute_loss(*args, **options)
        self.losses.append(float(loss.detach()))
        return loss

    def compute_ref_log_probs(self, *args, **options):
        raise AssertionError("the columns are there")


def trainer_on(folder, tmp_path):
    data, model = load_dataset(str(folder), cache_dir=str(tmp_path / "datasets")), locate("lab:tiny")
    settings = DPOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=BATCH, per_device_eval_batch_size=12,
        num_train_epochs=1, learning_rate=LR, lr_scheduler_type="constant", beta=BETA, max_length=None, use_cpu=True,
        bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential",
        precompute_ref_log_probs=False,
    )  # fmt: skip
    trainer = Watched(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=settings,
        train_dataset=data["train"].select(epoch_order(PAIRS, 0, 0)),  # the order in which our run visits them
        eval_dataset=data["validation"],
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.precompute_ref_logps, trainer.ref_model = True, None
    return trainer


@pytest.mark.parametrize("reference", only(["initial", "lab:strong"], "lab:strong"))
def test_trl_computes_our_losses_from_the_columns(reference, tmp_path):
    words = ["reference=initial"] if reference == "initial" else ["reference=other", f"reference.path={reference}"]
    assert exported(tmp_path / "table", *LAB, *words).returncode == 0
    trainer = trainer_on(tmp_path / "table", tmp_path)
    trainer.train()
    theirs = trainer.losses[:]
    options = [f"optim.lr={LR}", "optim.schedule=constant", "optim.warmup_ratio=0", f"beta={BETA}"]
    options += [f"trainer.batch_size={BATCH}", f"output_dir={tmp_path / 'run'}"]
    done = train(*COMMON, *LAB, *words, *options)
    assert done.returncode == 0, done.stderr
    metrics = list(map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()))
    ours = [row["train/loss"] for row in metrics if "train/loss" in row]
    assert len(ours) == PAIRS // BATCH
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(metrics[-1]["eval/loss"], abs=1e-5)
    assert abs(ours[-1] - 0.6931) > 1e-3
