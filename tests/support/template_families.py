"""Chat templates that do as those of the families in use, in our own words, and what each of them can write.

A record says what cannot be written: a feature of a row (see `features`) -> words of the refusal. Rows without these
features must pass. What is scored of a turn is told here without the template (`Family.said`), as the text before the
answer and the answer through the token that ends it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from tokenizers import AddedToken, processors

from dpo_ref.data.chat_templates import install_template
from dpo_ref.types import Message, PromptGroup, conversation, thoughts_of
from tests.support.tokenizer_families import byte_level, finished

# --- templates

_OWN = r"""
{%- set own = messages[0].role == 'system' %}
{%- set turns = messages[1:] if own else messages %}
"""
_ASKED = r"""
{%- set ns = namespace(asked=-1) %}
{%- for m in turns %}
    {%- if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}
{%- endfor %}
"""
_IM_CALLS = r"""
{%- for call in m.tool_calls or [] %}
    {{- ('\n' if m.content or not loop.first else '') + '<tool_call>\n{"name": "' + call.function.name }}
    {{- '", "arguments": ' + call.function.arguments | tojson + '}\n</tool_call>' }}
{%- endfor %}
"""
_IM_RESULT = r"""
{{- '' if loop.previtem and loop.previtem.role == 'tool' else '<|im_start|>user' }}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{{- '' if loop.nextitem and loop.nextitem.role == 'tool' else '<|im_end|>\n' }}
"""
_IM_TOOLS = r"""
{{- '# Functions\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}
{{- '\n</tools>\nTo call one:\n<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>' }}
"""
_IM_START = r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

QWEN25 = (
    _OWN
    + r"{{- '<|im_start|>system\n' + (messages[0].content if own else 'You are Qwen, a model that helps.') }}"
    + r"{%- if tools %}{{ '\n\n' }}" + _IM_TOOLS + r"{% endif %}{{ '<|im_end|>\n' }}"
    + r"{%- for m in turns %}{% if m.role == 'tool' %}" + _IM_RESULT
    + r"{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}" + _IM_CALLS + r"{{ '<|im_end|>\n' }}{% endif %}"
    + r"{%- endfor %}" + _IM_START
)  # fmt: skip

QWEN3 = (
    _OWN
    + r"{%- if own or tools %}{{ '<|im_start|>system\n' + (messages[0].content if own else '') }}"
    + r"{%- if tools %}{{ '\n\n' if own else '' }}" + _IM_TOOLS + r"{% endif %}{{ '<|im_end|>\n' }}{% endif %}"
    + _ASKED + r"""
{%- for m in turns %}
    {%- if m.role == 'tool' %}""" + _IM_RESULT + r"""
    {%- else %}
        {%- set ns.words = m.content %}
        {%- set ns.thought = m.reasoning_content if m.reasoning_content is string else '' %}
        {%- if m.role == 'assistant' and m.reasoning_content is not string and '</think>' in ns.words %}
            {%- set ns.thought = ns.words.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set ns.words = ns.words.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + m.role + '\n' }}
        {%- if m.role == 'assistant' and loop.index0 > ns.asked and (loop.last or ns.thought) %}
            {{- '<think>\n' + ns.thought.strip('\n') + '\n</think>\n\n' + ns.words.lstrip('\n') }}
        {%- else %}
            {{- ns.words }}
        {%- endif %}""" + _IM_CALLS.replace("m.content", "ns.words") + r"""
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
""" + _IM_START
    + r"{% if add_generation_prompt and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)  # fmt: skip

# Content beside calls is passed over; behind a result more is written once a turn follows.
HERMES = (
    r"{{- bos_token + '<|im_start|>system\n' }}"
    + r"{%- if tools %}" + _IM_TOOLS + r"{% endif %}{{ '<|im_end|>\n' }}"
    + r"""
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '' if loop.previtem and loop.previtem.role == 'tool' else '<|im_start|>tool\n' }}
        {{- '<tool_response>\n' + m.content + '\n</tool_response>' + ('' if loop.last else '\n') }}
        {{- '' if loop.nextitem and loop.nextitem.role == 'tool' else '<|im_end|>' }}
    {%- elif m.tool_calls is defined %}
        {{- '<|im_start|>assistant' }}
        {%- for call in m.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
""" + _IM_START
)  # fmt: skip

# The mode comes from an option or from the system turn, which loses the word. Results are written as the user's.
SMOLLM3 = (
    _OWN
    + r"""
{%- set ns = namespace(mode='/no_think' if enable_thinking is false else '/think') %}
{%- set ns.wish = messages[0].content if own else '' %}
{%- if '/no_think' in ns.wish %}
    {%- set ns.mode = '/no_think' %}
{%- elif '/think' in ns.wish %}
    {%- set ns.mode = '/think' %}
{%- endif %}
{%- set ns.wish = ns.wish.replace('/no_think', '').replace('/think', '').rstrip() %}
{{- '<|im_start|>system\n# Facts\nToday: ' + strftime_now('%d %B %Y') + '\nThinking: ' + ns.mode + '\n\n' }}
{{- '# Wishes\n' + (ns.wish or 'You are SmolLM, a model that helps.') + '\n\n' }}
{%- if xml_tools %}
    {{- '# Functions\n<tools>\n' }}{% for tool in xml_tools %}{{ tool | string + '\n' }}{% endfor %}{{ '</tools>\n' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- set begin = '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if ns.mode == '/no_think' else '') %}
{%- for m in turns %}
    {%- if m.role == 'assistant' %}
        {{- begin + m.content.lstrip('\n') + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ begin }}{% endif %}
"""
)

LLAMA31 = (
    _OWN
    + r"""
{%- set header = '<|start_header_id|>%s<|end_header_id|>\n\n' %}
{{- bos_token + header % 'system' + ('Python runs here.\n' if builtin_tools is defined or tools else '') }}
{{- 'Knows up to: December 2023\nToday: ' + date_string | default('26 Jul 2024') + '\n\n' }}
{{- (messages[0].content | trim if own else '') + '<|eot_id|>' }}
{%- for m in turns %}
    {%- if m.role == 'tool' %}
        {{- header % 'ipython' + m.content | tojson + '<|eot_id|>' }}
    {%- elif m.tool_calls is defined %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
        {%- set function = m.tool_calls[0].function %}
        {{- header % 'assistant' }}
        {%- if function.name in builtin_tools | default([]) %}
            {{- '<|python_tag|>' + function.name + '.call(' }}
            {%- for key, value in function.arguments | items %}
                {{- key + '="' + value + '"' + ('' if loop.last else ', ') }}
            {%- endfor %}
            {{- ')' }}
        {%- else %}
            {{- '{"name": "' + function.name + '", "parameters": ' + function.arguments | tojson + '}' }}
        {%- endif %}
        {{- '<|eom_id|>' if builtin_tools is defined else '<|eot_id|>' }}
    {%- else %}
        {{- header % m.role }}
        {%- if tools and loop.first %}
            {{- 'Functions, to be called as {"name": ..., "parameters": ...}:\n\n' }}
            {%- for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}
        {%- endif %}
        {{- m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ header % 'assistant' }}{% endif %}
"""
)

# The system turn is folded into a user's turn that is the last of all: once it is answered, it is gone.
MISTRAL = (
    _OWN
    + r"""
{%- macro checked(id) -%}
    {{ id if id | default('') | length == 9 else raise_exception('ids of calls have 9 characters') }}
{%- endmacro %}
{%- set asked = turns | selectattr('role', 'equalto', 'user') | list %}
{%- set ns = namespace(users=true) %}
{%- for m in turns if m.role != 'tool' and m.tool_calls is not defined %}
    {%- if (m.role == 'user') != ns.users %}{{ raise_exception('user and assistant take turns') }}{% endif %}
    {%- set ns.users = not ns.users %}
{%- endfor %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' if tools and m == asked[-1] else '' }}
        {{- '[INST] ' + (messages[0].content + '\n\n' if own and loop.last else '') + m.content + '[/INST]' }}
    {%- elif m.tool_calls is defined %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in m.tool_calls %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + checked(call.id) + '"}' + ('' if loop.last else ', ') }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' }}
        {{- checked(m.tool_call_id) + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- ' ' + m.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
)  # fmt: skip

GEMMA = r"""
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 is even) %}{{ raise_exception('user and model take turns') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""

TULU = r"""
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|assistant|>\n' + m.content + eos_token + ('' if loop.last else '\n') }}
    {%- elif m.role in ('system', 'user') %}
        {{- '<|' + m.role + '|>\n' + m.content + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
"""

ZEPHYR = r"""
{%- for m in messages if m.role in ('system', 'user', 'assistant') %}
    {{- '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
"""

# A turn that is the last ends with <|return|>, a call with <|call|>; what was thought before a final answer is gone.
HARMONY = (
    r"""
{%- macro type_of(schema) -%}
    {%- if schema.enum is defined %}{{ '"' ~ schema.enum | join('" | "') ~ '"' }}
    {%- elif schema.type == 'array' %}{{ type_of(schema['items'] or {}) + '[]' }}
    {%- elif schema.type == 'object' and schema.properties %}{{ '{\n' + fields(schema) + '}' }}
    {%- elif schema.type in ('integer', 'number') %}{{ 'number' }}
    {%- else %}{{ schema.type or 'any' }}
    {%- endif %}
{%- endmacro %}
{%- macro fields(schema) -%}
    {%- for name, inner in schema.properties | items %}
        {{- '// ' + inner.description + '\n' if inner.description else '' }}
        {{- name + ('' if name in schema.required | default([]) else '?') + ': ' + type_of(inner) + ',' }}
        {{- ' // default: ' + inner.default | tojson if inner.default is defined else '' }}{{ '\n' }}
    {%- endfor %}
{%- endmacro %}
"""
    + _OWN
    + r"""
{{- '<|start|>system<|message|>You are a large language model.\nToday: ' + strftime_now('%Y-%m-%d') }}
{{- '\n\nReasoning: ' + reasoning_effort | default('medium') }}
{{- '\n\n# Channels: analysis, commentary, final.<|end|>' }}
{%- if own or tools %}
    {{- '<|start|>developer<|message|>' + ('# Wishes\n\n' + messages[0].content + '\n\n' if own else '') }}
    {%- if tools %}
        {{- '# Functions\n\nnamespace functions {\n\n' }}
        {%- for tool in tools %}
            {%- set function = tool.function %}
            {{- '// ' + function.description + '\n' if function.description else '' }}
            {{- 'type ' + function.name + ' = (' }}
            {{- '_: {\n' + fields(function.parameters) + '}' if function.parameters.properties else '' }}
            {{- ') => any;\n\n' }}
        {%- endfor %}
        {{- '}' }}
    {%- endif %}
    {{- '<|end|>' }}
{%- endif %}
{%- set ns = namespace(called='') %}
{%- for m in turns %}
    {%- set later = turns[loop.index:] | selectattr('role', 'equalto', 'assistant') %}
    {%- set answered = later | selectattr('tool_calls', 'undefined') | list | length > 0 %}
    {%- if m.role == 'assistant' and m.tool_calls is defined %}
        {%- if m.content and m.thinking %}{{ raise_exception('thoughts or words beside calls, not both') }}{% endif %}
        {%- if (m.content or m.thinking) and not answered %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' }}
        {%- endif %}
        {%- set ns.called = m.tool_calls[0].function.name %}
        {{- '<|start|>assistant to=functions.' + ns.called + '<|channel|>commentary json<|message|>' }}
        {{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
    {%- elif m.role == 'assistant' and loop.last and not add_generation_prompt %}
        {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' if m.thinking else '' }}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
    {%- elif m.role == 'tool' %}
        {%- if not ns.called %}{{ raise_exception('a result without a call') }}{% endif %}
        {{- '<|start|>functions.' + ns.called + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- m.content | tojson + '<|end|>' }}
    {%- else %}
        {{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""
)

# Arguments are put together with text, so they must be text. Functions are not offered: they stand in the system turn.
DEEPSEEK = r"""
{{- bos_token + messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') }}
{%- set ns = namespace(asked=false, answers=false) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<｜User｜>' + m.content }}
        {%- set ns.asked = true %}{% set ns.answers = false %}
    {%- elif m.role == 'assistant' %}
        {{- '<｜Assistant｜></think>' if ns.asked else '' }}
        {%- set ns.asked = false %}
        {%- if m.tool_calls is defined %}
            {{- m.content + '<｜tool▁calls▁begin｜>' }}
            {%- for call in m.tool_calls %}
                {{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments }}
                {{- '<｜tool▁call▁end｜>' }}
            {%- endfor %}
            {{- '<｜tool▁calls▁end｜>' }}
        {%- else %}
            {{- m.content if ns.answers else m.content.split('</think>', 1)[-1] }}
        {%- endif %}
        {%- set ns.answers = false %}
        {{- eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
        {%- set ns.answers = true %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.asked %}{{ '<｜Assistant｜></think>' }}{% endif %}
"""

# Generation begins within a thought, and what is answered has none: what a model wrote is cut.
R1 = r"""
{{- bos_token + messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
    {%- elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}
"""

# Generation begins within a thought or, where that is switched off, behind an empty one, as all answers without do.
NEMOTRON = (
    _OWN
    + r"""
{{- '<|im_start|>system\n' + (messages[0].content if own else '') + '\n\n' if own or tools else '' }}
{%- if tools %}""" + _IM_TOOLS + r"""{% endif %}{{ '<|im_end|>\n' if own or tools else '' }}
""" + _ASKED + r"""
{%- for m in turns %}
    {%- if m.role == 'tool' %}""" + _IM_RESULT + r"""
    {%- elif m.role == 'assistant' %}
        {%- set thought = m.reasoning_content | default('') if loop.index0 > ns.asked else '' %}
        {{- '<|im_start|>assistant\n<think>' + ('\n' + thought + '\n' if thought else '') + '</think>' }}
        {%- set words = m.content.split('</think>')[-1] if loop.index0 < ns.asked else m.content %}
        {{- ('\n' if thought else '') + words }}""" + _IM_CALLS + r"""
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>' + ('</think>' if enable_thinking is false else '\n') }}
{%- endif %}
"""
)  # fmt: skip

# Nothing ends a turn but the mark by which the next begins: the user's, or a tool's where functions are called.
GLM = (
    r"""
{{- '[gMASK]<sop>' }}
{%- if tools %}{{ '<|system|>\n' }}"""
    + _IM_TOOLS
    + r"""{% endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '' if loop.previtem.role == 'tool' else '<|observation|>' }}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
    {%- else %}
        {{- '<|' + m.role + '|>\n' + m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<tool_call>' + call.function.name + '\n' + call.function.arguments | tojson + '\n</tool_call>' }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
)

# --- what is said, told without a template

Turns = Sequence[Message]
Said = Callable[[Turns, int, Mapping[str, Any]], tuple[str, str]]  # turns, an assistant's, options
Calls = list[tuple[str, Any]]  # names and arguments


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def calls_of(turn: Message) -> Calls:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in turn.get("tool_calls", [])]


def thought_of(turn: Message) -> str:
    return "".join(thoughts_of(turn))


def last_asked(turns: Turns) -> int:
    return max((index for index, turn in enumerate(turns) if turn["role"] == "user"), default=-1)


def im_calls(turn: Message) -> list[str]:
    return [
        f'<tool_call>\n{{"name": "{name}", "arguments": {as_json(arguments)}}}\n</tool_call>'
        for name, arguments in calls_of(turn)
    ]


def qwen25_said(turns: Turns, index: int, options: Mapping[str, Any]) -> tuple[str, str]:
    words = turns[index]["content"]
    return "", "\n".join([*([words] if words else []), *im_calls(turns[index])]) + "<|im_end|>"


def qwen3_said(turns: Turns, index: int, options: Mapping[str, Any]) -> tuple[str, str]:
    turn, thought = turns[index], thought_of(turns[index])
    words = turn["content"]
    if not thought and "</think>" in words:
        thought, words = words.removeprefix("<think>").split("</think>")
        words = words.lstrip("\n")
    block = ""
    if index > last_asked(turns) and (thought or index == len(turns) - 1):
        block, words = "<think>\n" + thought.strip("\n") + "\n</think>\n\n", words.lstrip("\n")
    if options.get("enable_thinking") is False:  # then it stands in the prompt
        block = ""
    return block, "\n".join([*([words] if words else []), *im_calls(turn)]) + "<|im_end|>"


def hermes_said(turns: Turns, index: int, options: Mapping[str, Any]) -> tuple[str, str]:
    calls = im_calls(turns[index])
    return "", ("\n".join(calls) if calls else turns[index]["content"]) + "<|im_end|>"


def our_hermes_said(turns: Turns, index: int, options: Mapping[str, Any]) -> tuple[str, str]:
    turn, thought = turns[index], thought_of(turns[index])
    answer = "\n".join([*([turn["content"]] if turn["content"] else []), *im_calls(turn)]) + "<|im_end|>"
    return f"<think>\n{thought}\n</think>\n\n" if thought else "", answer


def smollm3_said(turns: Turns, index: int, options: Mapping[str, Any]) -> tuple[str, str]:
    return "", turns[index]["content"].lstrip("\n") + "<|im_end|>"


def llama31_said(turns: Turns, index: int, options: Mapping[str, Any]) -> tuple[str, str]:
    calls = [f'{{"name": "{name}", "parameters": {as_json(arguments)}}}' for name, arguments in calls_of(turns[index])]
    words = turns[index]["content"].strip()
    return "", "\n".join([*([words] if words else []), *calls]) + "<|eot_id|>"


def mistral_said(turns: Turns, index: int, options: Mapping[str, Any]) -> tuple[str, str]:
    calls = [as_json(call["function"] | {"id": call["id"]}) for call in turns[index].get("tool_calls", [])]
    return "", (f"[TOOL_CALLS] [{', '.join(calls)}]" if calls else f" {turns[index]['content'].strip()}") + "</s>"


def words_said(end: str, turns: Turns, index: int, options: Mapping[str, Any], trims: bool = False) -> tuple[str, str]:
    words = turns[index]["content"]
    return "", (words.strip() if trims else words) + end


def harmony_said(turns: Turns, index: int, options: Mapping[str, Any]) -> tuple[str, str]:
    thought, words, behind = thought_of(turns[index]), turns[index]["content"], "<|end|><|start|>assistant"
    analysis = f"<|channel|>analysis<|message|>{thought}{behind}" if thought else ""
    for name, arguments in calls_of(turns[index]):
        call = f" to=functions.{name}<|channel|>commentary json<|message|>{as_json(arguments)}<|call|>"
        return ("<|channel|>analysis<|message|>", words + behind + call) if words else (analysis, call)
    return f"{analysis}<|channel|>final<|message|>", words + "<|return|>"


def deepseek_said(turns: Turns, index: int, options: Mapping[str, Any]) -> tuple[str, str]:
    turn = turns[index]
    calls = [f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{as_json(a)}<｜tool▁call▁end｜>" for n, a in calls_of(turn)]
    all_calls = f"<｜tool▁calls▁begin｜>{''.join(calls)}<｜tool▁calls▁end｜>" if calls else ""
    return "", turn["content"] + all_calls + "<｜end▁of▁sentence｜>"


def r1_said(turns: Turns, index: int, options: Mapping[str, Any]) -> tuple[str, str]:
    thought, words = thought_of(turns[index]), turns[index]["content"]
    if not thought:
        return "", words.removeprefix("<think>\n") + _SENTENCE[1]
    return f"{thought.strip()}\n</think>\n\n", words.lstrip() + _SENTENCE[1]


def nemotron_said(turns: Turns, index: int, options: Mapping[str, Any]) -> tuple[str, str]:
    turn, thought = turns[index], thought_of(turns[index])
    words = turn["content"].removeprefix("<think>\n")  # which stands in the prompt
    answer = "\n".join([*([words] if words else []), *im_calls(turn)]) + "<|im_end|>"
    return f"{thought}\n</think>\n" if thought else "", answer


def glm_said(turns: Turns, index: int, options: Mapping[str, Any]) -> tuple[str, str]:
    calls = [f"\n<tool_call>{name}\n{as_json(arguments)}\n</tool_call>" for name, arguments in calls_of(turns[index])]
    return "", "\n" + turns[index]["content"] + "".join(calls) + ("<|observation|>" if calls else "<|user|>")


# --- calls read back


def _values(text: str, mark: str, at: int = 0) -> Iterator[tuple[re.Match[str], Any]]:
    """JSON behind every mark outside of JSON."""
    while match := re.compile(mark).search(text, at):
        value, at = json.JSONDecoder().raw_decode(text, match.end())
        yield match, value


def read_objects(mark: str, key: str, text: str) -> Calls:
    """Of calls that are an object with a name and, under `key`, arguments."""
    return [(value["name"], value[key]) for _, value in _values(text, mark)]


def read_lists(text: str) -> Calls:
    """Of calls in Mistral's lists."""
    return [(value["name"], value["arguments"]) for _, values in _values(text, r"\[TOOL_CALLS\] ") for value in values]


def read_arguments(mark: str, text: str) -> Calls:
    """Of calls whose names stand in the mark."""
    return [(match[1], value) for match, value in _values(text, mark)]


# --- what rows have that a template may not write


def features(group: PromptGroup, score: str = "last") -> set[str]:
    """What there is in a row that some template cannot write; `score` as in `data.score`."""
    found = {"system"} if group.prompt[0]["role"] == "system" else set()
    found |= {"tools"} if group.tools else set()
    for response in group.responses:
        turns = conversation(group.prompt, response)
        of_prompt = [index for index, turn in enumerate(group.prompt) if turn["role"] == "assistant"]
        first = of_prompt[0] if of_prompt and score == "all" else len(group.prompt)
        found |= set(_of_conversation(turns, first, group))
    return found


def _of_conversation(turns: Turns, first: int, group: PromptGroup) -> Iterator[str]:
    asked, last, options = last_asked(turns), len(turns) - 1, group.template_options or {}
    for index, turn in enumerate(turns):
        calls, thought, scored = turn.get("tool_calls", []), thought_of(turn), index >= first
        if turn["role"] == "tool":
            yield "results"
        if turn["role"] != "assistant":
            continue
        yield from ["calls"] * bool(calls) + ["several calls"] * (len(calls) > 1)
        yield from ["words beside calls"] * bool(calls and turn["content"])
        yield from ["thought"] * bool(thought) + ["thought and words beside calls"] * bool(
            thought and calls and turn["content"]
        )
        if calls and any(later["role"] == "assistant" and "tool_calls" not in later for later in turns[index + 1 :]):
            yield from ["thought beside calls, then an answer"] * bool(thought)
            yield from ["words beside calls, then an answer"] * bool(turn["content"])
        yield from ["earlier thought"] * bool(thought and index < asked)
        if "</think>" in turn["content"]:
            yield "earlier thought in words" if index < asked else "thought in words"
            yield from ["thought in words behind a question"] * (turns[index - 1]["role"] == "user" and not calls)
        if scored:
            other = turns[last_asked(turns[:index])] != turns[asked]
            yield from ["tools and another question later"] * bool(group.tools and other)
            thinks, is_off = thought or "</think>" in turn["content"], options.get("enable_thinking") is False
            yield from ["scored behind a result"] * (turns[index - 1]["role"] == "tool")
            yield from ["scored, then others"] * (index < last and not calls)
            yield from ["scored without a thought"] * bool(not thinks and not is_off)
            yield from ["scored behind an empty thought, then others"] * bool(index < last and not thinks and is_off)
            yield from ["thought that is switched off"] * bool(
                is_off and (thought or turn["content"].startswith("<think>"))
            )


class Family(NamedTuple):
    """A tokenizer with a template, and what it writes."""

    tokenizer: Any
    end: str  # ends the assistant's turn
    said: Said
    cannot: dict[str, str]  # feature -> words of the refusal
    read: Callable[[str], Calls] = lambda text: []
    thoughts: str = "reasoning_content"  # the key of thoughts
    arguments_as_text: bool = False
    options: tuple[dict[str, Any], ...] = ()  # that rows may give
    call_end: str = ""  # ends a turn that calls, where that is another token
    is_written_otherwise: bool = False  # than a model would write it

    @property
    def begins_within_a_thought(self) -> bool:
        return "scored without a thought" in self.cannot

    @property
    def ends(self) -> tuple[str, ...]:
        return (self.end, self.call_end) if self.call_end else (self.end,)

    @property
    def writes_bos(self) -> bool:
        return "bos_token" in self.tokenizer.chat_template or self.tokenizer.chat_template.startswith("{{ '<|begin")

    def written(self, group: PromptGroup, response: Any) -> str:
        """The template's own text of the whole conversation through the token that ends it; where it writes no such
        token, or an answer differently, what is said behind the prompt."""
        turns: Any = list(map(dict, conversation(group.prompt, response)))
        if self.arguments_as_text:
            for turn in turns:
                turn |= {"tool_calls": [_as_text(call) for call in turn["tool_calls"]]} if "tool_calls" in turn else {}
        if self.is_written_otherwise:
            del turns[len(group.prompt) + (not isinstance(response, str)) * (len(response) - 1) :]
        text = self.tokenizer.apply_chat_template(
            turns, tools=list(group.tools) if group.tools else None, tokenize=False,
            add_generation_prompt=self.is_written_otherwise, **group.template_options or {},
        )  # fmt: skip
        if self.is_written_otherwise:
            return text + "".join(self.expected(group, response, "last")[-1])
        return text[: max(text.rfind(end) + len(end) for end in self.ends if end in text)]

    def expected(self, group: PromptGroup, response: Any, score: str) -> list[tuple[str, str]]:
        """What is scored of each turn."""
        turns = conversation(group.prompt, response)
        first = 0 if score == "all" else len(group.prompt)
        said = []
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant" and index >= first:
                before, answer = self.said(turns, index, group.template_options or {})
                thought = re.match(
                    r"\s*(?:<think>)?.*</think>\s*" if "</think>" in turn["content"] else "", answer, re.DOTALL
                )
                size = 0 if thought is None else thought.end()
                said.append((before + answer[:size], answer[size:]))
        return said


def _as_text(call: Any) -> Any:
    return call | {"function": call["function"] | {"arguments": as_json(call["function"]["arguments"])}}


# --- families

_IM = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
_IM_MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
_LLAMA = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
]
_MISTRAL = ["INST", "AVAILABLE_TOOLS", "TOOL_RESULTS"]
_GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
_HARMONY = ["start", "end", "message", "channel", "constrain", "call", "return", "startoftext", "endoftext"]
_SENTENCE = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
_GLM = ["[gMASK]", "<sop>", *(f"<|{name}|>" for name in ("system", "user", "assistant", "observation", "endoftext"))]
_DEEPSEEK = ["User", "Assistant", "tool▁calls▁begin", "tool▁calls▁end", "tool▁call▁begin", "tool▁call▁end", "tool▁sep"]
_DEEPSEEK += ["tool▁output▁begin", "tool▁output▁end"]
_NO_THOUGHT = {"thought": "leaves out reasoning_content"}
_WORDS_ONLY = {"tools": "leaves out tools", "calls": "leaves out tool_calls", **_NO_THOUGHT}
_NO_WORDS = "leaves out (content|part of what)"
_REWRITTEN = "writes a turn differently once others follow"
_UNSEEN = "writes the prompt differently once it is answered"
_OFF = "begins the assistant's turn behind an empty one"
_BEGUN = "has no thought, and the chat template begins the assistant's turn within one"


def _tokenizer(
    template: str, specials: list[str], bos: str | None, eos: str, marks: Sequence[str] = (), inside: bool = False
) -> Any:
    """Byte-level, with line breaks and blanks merged into words, and BOS before every text. As in the real ones some
    special tokens are pieces of the vocabulary (where `inside`), most come behind it."""
    tokenizer = finished(byte_level(specials if inside else [], digits=True), template, bos, eos, specials)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer


def _ours(tokenizer: Any, name: str) -> Any:
    install_template(tokenizer, name)
    return tokenizer


def _im(template: str, bos: str | None = None) -> Any:
    return _tokenizer(template, _IM, bos, "<|im_end|>", _IM_MARKS, inside=bos is not None)


_READ_IM = partial(read_objects, r"<tool_call>\n", "arguments")
_READ_LLAMA = partial(read_objects, r'(?=\{"name": )', "parameters")

_MAKE: dict[str, Callable[[], Family]] = {
    "qwen 2.5": lambda: Family(_im(QWEN25), "<|im_end|>", qwen25_said, _NO_THOUGHT, _READ_IM),
    "qwen 3": lambda: Family(
        _im(QWEN3), "<|im_end|>", qwen3_said,
        {
            "earlier thought": "leaves out reasoning_content",
            "earlier thought in words": "leaves out part of what",
            "scored behind an empty thought, then others": _REWRITTEN,
            "thought that is switched off": _OFF,
        },
        _READ_IM, options=({"enable_thinking": False},),
    ),
    "hermes": lambda: Family(
        _im(HERMES, "<|endoftext|>"), "<|im_end|>", hermes_said,
        _NO_THOUGHT | {"words beside calls": _NO_WORDS, "scored behind a result": _UNSEEN}, _READ_IM,
    ),
    "hermes, ours": lambda: Family(
        _ours(_im("", "<|endoftext|>"), "hermes"), "<|im_end|>", our_hermes_said, {}, _READ_IM, thoughts="thinking"
    ),
    "smollm 3": lambda: Family(
        _im(SMOLLM3), "<|im_end|>", smollm3_said,
        _WORDS_ONLY | {"results": "leaves out the role", "thought that is switched off": _OFF},
        options=({"enable_thinking": False},),
    ),
    "llama 3.1": lambda: Family(
        _tokenizer(LLAMA31, [*_LLAMA, "<|python_tag|>"], _LLAMA[0], "<|eot_id|>"), "<|eot_id|>", llama31_said,
        _NO_THOUGHT | {"several calls": "one call at a time", "words beside calls": _NO_WORDS},
        _READ_LLAMA, options=({"date_string": "1 May 2031"},),
    ),
    "llama 3.1, ours": lambda: Family(
        _ours(_tokenizer("", _LLAMA, _LLAMA[0], "<|end_of_text|>"), "llama31"), "<|eot_id|>", llama31_said,
        _NO_THOUGHT, _READ_LLAMA,
    ),
    "mistral": lambda: Family(
        _tokenizer(
            MISTRAL, ["<s>", "</s>", "[TOOL_CALLS]", *(f"[{end}{name}]" for name in _MISTRAL for end in ("", "/"))],
            "<s>", "</s>", inside=True,
        ),
        "</s>", mistral_said,
        _NO_THOUGHT | {
            "system": "leaves out|differently", "words beside calls": _NO_WORDS,
            "tools and another question later": "differently",
        },
        read_lists,
    ),
    "gemma": lambda: Family(
        _tokenizer(GEMMA, _GEMMA, "<bos>", "<eos>", inside=True), "<end_of_turn>",
        partial(words_said, "<end_of_turn>", trims=True),
        _WORDS_ONLY | {"system": "no system turns here", "results": "user and model take turns"},
    ),
    "tulu": lambda: Family(
        _tokenizer(TULU, ["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>"), "<|endoftext|>",
        partial(words_said, "<|endoftext|>"), _WORDS_ONLY | {"results": "leaves out content"},
    ),
    "zephyr": lambda: Family(
        _tokenizer(ZEPHYR, ["<s>", "</s>"], "<s>", "</s>", inside=True), "</s>", partial(words_said, "</s>"),
        _WORDS_ONLY | {"results": "leaves out content"},
    ),
    "gpt-oss": lambda: Family(
        _tokenizer(HARMONY, [f"<|{name}|>" for name in _HARMONY], "<|startoftext|>", "<|return|>"), "<|return|>",
        harmony_said,
        {
            "earlier thought": "leaves out thinking",
            "thought and words beside calls": "leaves out|differently|not both",
            "thought beside calls, then an answer": "leaves out|differently",
            "words beside calls, then an answer": "leaves out|differently",
            "several calls": "leaves out", "scored, then others": _REWRITTEN,
        },
        partial(read_arguments, r"to=functions\.(\w+)<\|channel\|>commentary json<\|message\|>"),
        thoughts="thinking", options=({"reasoning_effort": "high"},), call_end="<|call|>",
    ),
    "r1": lambda: Family(
        _tokenizer(R1, [*_SENTENCE, "<｜User｜>", "<｜Assistant｜>"], *_SENTENCE, ["<think>", "</think>"]),
        _SENTENCE[1], r1_said,
        {
            "tools": "leaves out tools", "calls": "leaves out tool_calls", "results": "leaves out",
            "earlier thought": "leaves out reasoning_content", "earlier thought in words": "leaves out part of what",
            "scored without a thought": _BEGUN, "scored, then others": _REWRITTEN,
        },
        is_written_otherwise=True,
    ),
    "nemotron": lambda: Family(
        _im(NEMOTRON), "<|im_end|>", nemotron_said,
        {
            "earlier thought": "leaves out reasoning_content", "earlier thought in words": "leaves out part of what",
            "scored without a thought": _BEGUN, "thought that is switched off": _OFF,
        },
        _READ_IM, options=({"enable_thinking": False},), is_written_otherwise=True,
    ),
    "glm": lambda: Family(
        _tokenizer(GLM, _GLM, None, "<|endoftext|>", ["<tool_call>", "</tool_call>"]), "<|user|>", glm_said,
        _NO_THOUGHT, partial(read_arguments, r"<tool_call>(\w+)\n"), call_end="<|observation|>",
        is_written_otherwise=True,
    ),
    "deepseek": lambda: Family(
        _tokenizer(
            DEEPSEEK, [*_SENTENCE, *(f"<｜{name}｜>" for name in _DEEPSEEK)], _SENTENCE[0], _SENTENCE[1],
            ["<think>", "</think>"],
        ),
        "<｜end▁of▁sentence｜>", deepseek_said,
        {
            "thought": f"leaves out reasoning_content|{_OFF}", "tools": "leaves out tools",
            "thought in words behind a question": f"leaves out part of what|{_OFF}",
        },
        partial(read_arguments, "<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>"), arguments_as_text=True,
    ),
}  # fmt: skip
NAMES = tuple(_MAKE)


@cache
def family(name: str) -> Family:
    return _MAKE[name]()
