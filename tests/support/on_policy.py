"""The options of small on-policy runs."""

SMALL = [
    "data=on_policy", "model.path=lab:tiny", "data.prompts.num_pairs=64", "data.prompts.num_eval_pairs=8",
    "data.prompts.num_test_prompts=0", "data.rounds=3", "data.prompts_per_round=12", "data.max_new_tokens=12",
    "trainer.batch_size=8", "tracking=none", "optim.lr=3e-4",
]  # fmt: skip
