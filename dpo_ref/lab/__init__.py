"""The embedded world: instructions whose right answers code can compute, imperfect writers, an exact gold reward.

tasks        word tables, and what a task and a family of tasks are
families     the single-turn families            conversations  two-turn tasks; prompts drawn and read back
preferences  imperfect writers, labelled pairs, texts for SFT
gold         the reward, from text alone         models         checkpoints and their two tokenizers
bandits      worlds in which reward and KL are known exactly
"""
