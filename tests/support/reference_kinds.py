"""Every kind of reference as one types it, and rows that all of them read."""

import json

from dpo_ref.lab.preferences import lab

KINDS = {
    "auto": [],
    "initial": ["reference=initial"],
    "initial, asked live": ["reference=initial", "reference.cache=off"],
    "initial, tempered": ["reference=initial", "reference.strength=0.5"],
    "other": ["reference=other", "reference.path=lab:strong"],
    "another tokenizer": ["reference=other", "reference.path=lab:foreign"],
    "interpolate": ["reference=interpolate", "reference.path=lab:strong", "reference.share=0.5"],
    "prior": ["reference=prior"],
    "uniform_token": ["reference=uniform_token"],
    "none": ["reference=none"],
    "columns": ["reference=columns", "reference.provenance=made up"],
    "moving": ["reference=moving", "reference.every=1"],
    "bema": ["reference=bema", "reference.every=1"],
    "adapter_base": ["reference=adapter_base", "model.lora_rank=2"],
    "trajectory": ["reference=trajectory", "reference.path=[lab:initial_2,lab:strong]"],
    "mixture": ["reference=mixture", "reference.parts=[{reference: initial}, {reference: moving, every: 1}]"],
    "mixture of probabilities": [
        "reference=mixture", "reference.mean=arithmetic",
        "reference.parts=[{reference: initial}, {reference: other, path: 'lab:strong'}]",
    ],
}  # fmt: skip


def written(path):
    """Pairs of the lab as rows with scores and with log-probs."""
    pairs = []
    for group in lab(0, num_pairs=12, num_eval_pairs=1, num_test_prompts=1).train:
        better, worse = group.pairs[0]
        told = {"score_chosen": 4.0, "score_rejected": 1.5, "ref_chosen_logps": -9.0, "ref_rejected_logps": -11.0}
        sides = {"chosen": group.responses[better], "rejected": group.responses[worse]}
        pairs.append({"prompt": list(group.prompt), **sides, **told})
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path
