"""The options of small runs of reward models, and transformers' own classifier on what they saved."""

import torch
from transformers import AutoModelForSequenceClassification

SMALL = ["model.path=lab:tiny", "trainer.batch_size=16", "tracking=none"]


def classified(folder, sequences):
    """Transformers' own classifier on one sequence after the other."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model, [model(input_ids=torch.tensor([ids])).logits[0, 0].item() for ids in sequences]
