"""Rows that bring log-probs of their responses."""

import json

PAIR = {"prompt": "why?", "chosen": "because", "rejected": "no idea"}


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def given(chosen, rejected, **more):
    return PAIR | {"chosen_logprob": chosen, "rejected_logprob": rejected} | more
