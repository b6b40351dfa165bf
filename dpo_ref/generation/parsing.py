"""What an answer says: its thought, its calls and its words, told apart."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpo_ref.data.bounded import OverLimit, bounded
from dpo_ref.data.thoughts import begun_thought, thought_and_words

Said = dict[str, Any]  # a message: `content`, `thinking` or another name of a thought, `tool_calls`


class Drawn(NamedTuple):
    """An answer as tokens and as text."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    output: str


def parsed(tokenizer: Any, answers: Sequence[Drawn]) -> list[Said | None]:
    """Each answer as a message, by the tokenizer's response schema, else by the end of a thought (`</think>`); None
    where there is nothing to tell apart, or the answer does not keep to the schema.

    A thought that the prompt opened and that does not end is all there is. A schema is made of a stranger's regular
    expressions: it is looked at where it can take neither all time nor all memory.
    """
    schema = getattr(tokenizer, "response_template", None) or getattr(tokenizer, "response_schema", None)
    if not schema:
        return [_by_mark(tokenizer, answer) for answer in answers]
    found: list[Said | None] = []
    try:
        found.extend(bounded(lambda answer: _by_schema(tokenizer, answer), answers))
    except OverLimit:
        found += [None] * (len(answers) - len(found))
    return found


def _by_mark(tokenizer: Any, answer: Drawn) -> Said | None:
    if split := thought_and_words(answer.output):
        return {"thinking": split[0].strip(), "content": split[1].strip()}
    if begun_thought(tokenizer.decode(list(answer.prompt_ids[-8:]))):
        return {"thinking": answer.output.strip(), "content": ""}
    return None


def _by_schema(tokenizer: Any, answer: Drawn) -> Said | None:
    takes_prefix = "prefix" in inspect.signature(tokenizer.parse_response).parameters  # transformers 5.13 and later
    options = {"prefix": list(answer.prompt_ids)} if takes_prefix else {}
    try:
        message = tokenizer.parse_response(list(answer.token_ids), **options)
    except Exception:  # an answer need not keep to the schema: it stays as it is
        return None
    if not isinstance(message, dict):
        return None
    return {"content": ""} | {key: value for key, value in message.items() if key != "role" and value is not None}
