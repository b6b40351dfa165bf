"""A completions server on the loopback interface that lets a tiny model answer, token by token and without a cache."""

import torch

from dpo_ref.data.tokenise import end_of_turn_ids
from tests.support.completions_server import CompletionsServer, true_logps


def _ids(tokens, end):
    """vLLM with `return_token_ids`."""
    return {"token_ids": [*tokens, *end]}


def _ids_without_end(tokens, end):
    return {"token_ids": tokens}


def _logprobs(tokens, end):
    """vLLM with `return_tokens_as_token_ids`."""
    return {"logprobs": {"tokens": [f"token_id:{token}" for token in (*tokens, *end)]}}


def _text(tokens, end):
    """OpenAI."""
    return {}


TELLS = {"ids": _ids, "ids without the end": _ids_without_end, "log-probs": _logprobs, "text": _text}


class GenerationServer(CompletionsServer):
    """Answers with `model`, whose tokenizer it has, in `most` tokens at most; `tells` says how it names the tokens it
    drew. `bodies` are all requests."""

    def __init__(self, model, tokenizer, name, tells="ids", most=10**6, **options):
        self.most, self.tokenizer, self.tells, self.bodies = most, tokenizer, TELLS[tells], []
        super().__init__(model, name, **options)

    def choice(self, asked, ids):
        """Ends at `stop_token_ids`, or where none are given at the ends that the tokenizer knows, as servers do."""
        self.bodies.append(asked)
        drawn = self.drawn(asked, list(ids))
        ends = asked.get("stop_token_ids") or end_of_turn_ids(self.tokenizer)
        end = drawn[-1:] if drawn[-1] in ends else []
        tokens = drawn[: len(drawn) - len(end)]
        choice = {
            "text": self.tokenizer.decode(tokens, skip_special_tokens=False),
            "finish_reason": "stop" if end else "length",
            "stop_reason": end[0] if end else None,
        }
        return choice | self.tells(tokens, end) | self.logprobs(asked, list(ids), drawn)

    def answering(self, asked):
        """The model that a request names."""
        return self.model

    def logprobs(self, asked, ids, drawn):
        """vLLM with `logprobs`: those of the tokens that were drawn, before any option changed them."""
        if asked.get("logprobs") is None:
            return {}
        return {"logprobs": {"token_logprobs": true_logps(self.answering(asked), ids + drawn)[len(ids) - 1 :]}}

    @torch.no_grad()
    def drawn(self, asked, ids):
        """One draw, the end token included."""
        assert asked["top_p"] == 1
        generator, tokens = torch.Generator().manual_seed(asked["seed"]), []
        ends = asked.get("stop_token_ids") or end_of_turn_ids(self.tokenizer)
        while len(tokens) < min(asked["max_tokens"], self.most) and (not tokens or tokens[-1] not in ends):
            logits = self.answering(asked)(torch.tensor([ids + tokens])).logits[0, -1]
            for token, bias in asked.get("logit_bias", {}).items():
                logits[int(token)] += bias
            if asked["temperature"] == 0:
                tokens.append(int(logits.argmax()))
            else:
                weights = (logits / asked["temperature"]).softmax(-1)
                tokens.append(int(torch.multinomial(weights, 1, generator=generator)))
        return tokens
