"""The didactic bandits of Tajwar et al. (arXiv:2404.14367): worlds in which reward and KL are known exactly.

`worlds` holds the two worlds, what can be written down about them (reference, reward, optimum, frontier), the two
kinds of policy as causal language models, and how draws become preferences; `study` trains policies in them with the
project's own trainer and objectives, and compares what they came to; `report` shows it.
"""
