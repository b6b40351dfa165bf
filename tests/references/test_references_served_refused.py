"""A served reference: answers, options and servers that cannot be used."""

import re
from dataclasses import replace

import pytest

from dpo_ref.data.groups import from_groups
from tests.support.completions_server import CompletionsServer
from tests.support.served_references import NUM_PROBE_REQUESTS, Served, big, context_of, sequences, serve, surroundings  # noqa: F401


def without_logprobs(answer):
    return {"choices": [choice | {"prompt_logprobs": None, "logprobs": None} for choice in answer["choices"]]}


def only_generated(answer):
    return {"choices": [choice | {"logprobs": {"token_logprobs": [-0.5]}} for choice in answer["choices"]]}


def each(change):
    """An answer whose lists of log-probs are changed, whichever protocol they are of."""

    def altered(answer):
        for choice in answer["choices"]:
            change(choice["prompt_logprobs"] or choice["logprobs"]["token_logprobs"])
        return answer

    return altered


def renamed(entries):
    entries[-1] = {"399": next(iter(entries[-1].values()))}


def last_is(value):
    return each(lambda entries: next(iter(entries[-1].values())).update(logprob=value))


ALTERED = {
    "no log-probs": (without_logprobs, {}, "gives no log-probs of the prompt .*try reference.protocol=echo"),
    "no echo": (only_generated, {"protocol": "echo"}, "gives no log-probs .*try reference.protocol=prompt_logprobs"),
    "one too few": (each(list.pop), {}, r"pairs.jsonl row \d+, response [12]: .*log-probs of (\d+) tokens for \d+"),
    "echo, one too many": (
        each(lambda entries: entries.insert(0, None)),
        {"protocol": "echo"},
        r"pairs.jsonl row \d+, .*must be the tokenizer of the model",
    ),
    "a token before the first": (each(lambda e: e.__setitem__(0, -1.0)), {"protocol": "echo"}, "put tokens before"),
    "other tokens": (each(renamed), {}, r"pairs.jsonl row \d+, .*no log-prob of token \d+: it scored other tokens"),
    "not a number": (last_is(float("nan")), {}, r"pairs.jsonl row \d+, response [12]: .*log-prob nan, .*not finite"),
    "minus infinity as vLLM writes it": (last_is(-9999.0), {}, r"log-prob -9999\.0, which is not finite"),
    "null": (last_is(None), {}, "log-prob None, which is not finite"),
    "too few choices": (lambda answer: {"choices": answer["choices"][1:]}, {}, "gave 3 choices for 4 prompts"),
    "another JSON": (lambda answer: ["hello"], {}, "gave no choices for 4 prompts"),
    "no JSON": (lambda answer: b"<html>hello</html>", {}, "not JSON; it begins with '<html>hello"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_answers_that_cannot_be_used_are_refused(case, serve, tmp_path):  # noqa: F811
    alter, options, message = ALTERED[case]
    server = serve(alter=alter, healthy=NUM_PROBE_REQUESTS)
    with pytest.raises(ValueError, match=message):
        Served(context_of(tmp_path), url=server.url, retries=1, **options)


def test_a_row_longer_than_the_server_takes_is_named(serve, tmp_path):  # noqa: F811
    context = context_of(tmp_path)
    longer = replace(context.groups[0], prompt_ids=[*context.groups[0].prompt_ids] * 9)
    context = replace(context, groups=from_groups([*list(context.groups)[1:], longer], context.groups.texts))
    size = max(map(len, sequences([longer])))
    message = rf"context length is {size} tokens.*pairs.jsonl row 1, response 1, with {size} tokens.*max_length"
    with pytest.raises(ValueError, match=message):
        Served(context, url=serve(limit=size).url)


def test_a_refused_first_question_names_the_protocol(serve, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"refused a first, short question .*reference.protocol=prompt_logprobs"):
        Served(context_of(tmp_path), url=serve(limit=10).url)


def test_nothing_listens(tmp_path):
    server = CompletionsServer(big())
    server.__exit__()
    with pytest.raises(
        ValueError, match=r"no answer to a first question .*refused.*vllm serve big.*correct the address"
    ):
        Served(context_of(tmp_path), url=server.url)


def test_an_unknown_model_or_path(serve, tmp_path):  # noqa: F811
    context = context_of(tmp_path)
    with pytest.raises(ValueError, match="has no model big; it serves llama: set reference"):
        Served(context, url=serve(name="llama").url)
    with pytest.raises(ValueError, match=r"completions was not found .*such as http://host:8000/v1"):
        Served(context, url=serve(name="llama", lists=False).url)
    with pytest.raises(ValueError, match=r"completions was not found .*such as http://host:8000/v1"):
        Served(context, url=serve().url.removesuffix("/v1"))


def test_a_redirection_is_not_followed(serve, tmp_path):  # noqa: F811
    """Its target might be anyone's, and the key would go there."""
    server = serve(faults=["moved"], healthy=NUM_PROBE_REQUESTS)
    with pytest.raises(ValueError, match=r"refused a request \(302: try again\)"):
        Served(context_of(tmp_path), url=server.url, concurrency=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"url": "http://me:secret@host/v1"},
            "must hold no user, password or query; a key goes into DPO_REF_SERVED_KEY",
        ),
        ({"url": "http://host/v1?key=secret"}, "must hold no user, password or query"),
        ({"url": "host:8000"}, "reference.url=host:8000 must be the base of a server, such as http://host:8000/v1"),
        ({"url": "http://host/v1/completions/"}, "must be the base, without /completions"),
        ({"batch_size": 0}, "reference.batch_size=0 must be positive"),
        ({"timeout": float("nan")}, "reference.timeout=nan must be positive"),
        ({"retries": -1}, "reference.retries=-1 must not be negative"),
    ],
)
def test_options_that_cannot_be_meant(options, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Served(context_of(tmp_path), **{"url": "http://127.0.0.1:9/v1"} | options)
    assert "secret" not in str(error.value)
