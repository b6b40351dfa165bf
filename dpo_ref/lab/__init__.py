"""The embedded world: instructions whose right answers code can compute, imperfect writers, an exact gold reward.

    facts        word tables              tasks         what a task and a family of tasks are
    number_families, word_families           the single-turn families
    conversations  two-turn tasks; prompts drawn and read back
    writers      imperfect answers        gold          the reward, from text alone
    preferences  labelled pairs           demonstrations  texts for SFT
    vocabularies the two tokenizers

`WORLD_VERSION` names the meaning of all of it: raise it when tables, wordings, writers or templates change, because
checkpoints trained on the old world do not fit the new one.
"""

WORLD_VERSION = 1
