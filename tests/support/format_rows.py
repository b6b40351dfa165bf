"""Rows written for the tests in the field layouts of published data sets, and the groups that they must become."""

import json
from typing import NamedTuple

from dpo_ref.types import Message, PromptGroup


class Case(NamedTuple):
    """Rows of one layout, the format `auto` must see in them, and the groups derived from them by hand."""

    format: str
    rows: list[dict]
    groups: list[PromptGroup]


def turns(*texts, system=None):
    """User and assistant in turns, after a system turn if there is one."""
    first = [Message(role="system", content=system)] if system else []
    return (*first, *(Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)))


def pair(prompt, better, worse, rewards=None, **more):
    """A pair after a prompt: a text is one user turn."""
    messages = turns(prompt) if isinstance(prompt, str) else prompt
    return PromptGroup(messages, (better, worse), ((0, 1),), rewards, **more)


def sft(prompt, answer, **more):
    """A demonstration."""
    return PromptGroup(turns(prompt) if isinstance(prompt, str) else prompt, (answer,), **more)


CASES: dict[str, Case] = {}


def case(name_as_format, rows, *groups, **fill):
    """Add a case; `fill` are words in the rows that stand for longer text."""
    name, format = name_as_format.split(" as ")
    for word, text in fill.items():
        rows = rows.replace(word, text)
    CASES[name] = Case(format, json.loads(f"[{rows}]"), list(groups))


# Pairs and demonstrations as TRL and the hub write them.

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}

case(
    "trl_explicit as preference",
    r"""{"prompt": "Name a warm colour.", "chosen": "Red.", "rejected": "Blue."},
    {"prompt": "说出一种水果。", "chosen": "苹果。", "rejected": "石头。"}""",
    pair("Name a warm colour.", "Red.", "Blue."),
    pair("说出一种水果。", "苹果。", "石头。"),
)
case(
    "trl_implicit as preference",
    r"""{"chosen": "The grass is green in spring.", "rejected": "The grass is purple."}""",
    pair("The grass is", "green in spring.", "purple."),
)
case(
    "trl_conversational_explicit as preference",
    r"""{"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two plus two?"}],
     "chosen": [{"role": "assistant", "content": "Four."}],
     "rejected": [{"role": "assistant", "content": "Five."}]}""",
    pair(turns("Two plus two?", system="Be brief."), "Four.", "Five."),
)
case(
    "trl_conversational_implicit as preference",
    r"""{"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
      {"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}],
     "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
      {"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Square."}]}""",
    pair(turns("Hi", "Hello!", "Sky?"), "Blue.", "Square."),
)
case(
    "trl_tools_and_system as preference",
    r"""{"system": "Use the tools.", "prompt": "Weather in Rome?", "chosen": "Let me look.", "rejected": "Sunny.",
     "tools": [TOOL]},
    {"system": "", "prompt": "Weather in Bonn?", "chosen": "One moment.", "rejected": "Rain.",
     "tools": [TOOL]}""",
    pair(turns("Weather in Rome?", system="Use the tools."), "Let me look.", "Sunny.", tools=(WEATHER,)),
    pair("Weather in Bonn?", "One moment.", "Rain.", tools=(WEATHER,)),
    TOOL=json.dumps(WEATHER),
)
case(
    "ultrafeedback_binarized as preference",
    r"""{"prompt": "Rhyme with cat", "prompt_id": "f3a1", "score_chosen": 8.5, "score_rejected": 3.0,
     "chosen": [{"content": "Rhyme with cat", "role": "user"}, {"content": "Hat", "role": "assistant"}],
     "rejected": [{"content": "Rhyme with cat", "role": "user"}, {"content": "Dog", "role": "assistant"}],
     "messages": [{"content": "Rhyme with cat", "role": "user"}, {"content": "Hat", "role": "assistant"}]}""",
    pair("Rhyme with cat", "Hat", "Dog", (8.5, 3.0)),
)
case(
    "ultrafeedback_cleaned as preference",
    r"""{"source": "sharegpt", "prompt": "Capital of Peru?", "chosen-rating": 4.75, "rejected-rating": 1.5,
     "chosen-model": "gpt-4", "rejected-model": "alpaca-7b",
     "chosen": [{"content": "Capital of Peru?", "role": "user"}, {"content": "Lima", "role": "assistant"}],
     "rejected": [{"content": "Capital of Peru?", "role": "user"}, {"content": "Cusco", "role": "assistant"}]}""",
    pair("Capital of Peru?", "Lima", "Cusco", (4.75, 1.5)),
)
case(
    "refdpo as preference",
    r"""{"prompt": "Opposite of hot?", "prompt_id": "0b7c", "score_chosen": 9.0, "score_rejected": 4.0,
     "chosen": [{"content": "Opposite of hot?", "role": "user"}, {"content": "Cold", "role": "assistant"}],
     "rejected": [{"content": "Opposite of hot?", "role": "user"}, {"content": "Warm", "role": "assistant"}],
     "messages": [{"content": "Opposite of hot?", "role": "user"}, {"content": "Cold", "role": "assistant"}],
     "chosen_logprob": -12.25, "rejected_logprob": -7.5}""",
    pair("Opposite of hot?", "Cold", "Warm", (9.0, 4.0), logps=(-12.25, -7.5)),
)
case(
    "kto as unpaired",
    r"""{"prompt": "Spell yes.", "completion": "y-e-s", "label": true},
    {"prompt": "Spell no.", "completion": "n-i", "label": false}""",
    sft("Spell yes.", "y-e-s", labels=(True,)),
    sft("Spell no.", "n-i", labels=(False,)),
)
case(
    "kto_conversational as unpaired",
    r"""{"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
      {"role": "user", "content": "Bye"}], "completion": [{"role": "assistant", "content": "Oh."}], "label": false}""",
    sft(turns("Hi", "Yes?", "Bye"), "Oh.", labels=(False,)),
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
case(
    "sft_messages as messages",
    r"""{"prompt": "Greet me.", "prompt_id": "77aa", "tools": null, "messages": [
      {"role": "system", "content": "Polite."}, {"role": "user", "content": "Greet me."},
      {"role": "assistant", "content": "Good day."}]}""",
    sft(turns("Greet me.", system="Polite."), "Good day."),
)
case(
    "sft_tool_calls as messages",
    r"""{"tools": [TOOL], "messages": [{"role": "user", "content": "Weather in Rome?"},
      {"role": "assistant", "content": null, "tool_calls": [CALL]},
      {"role": "tool", "name": "weather", "content": "18 degrees"},
      {"role": "assistant", "content": "It has 18 degrees."}]}""",
    sft(
        (
            Message(role="user", content="Weather in Rome?"),
            Message(role="assistant", content="", tool_calls=[CALL]),
            Message(role="tool", content="18 degrees", name="weather"),
        ),
        "It has 18 degrees.",
        tools=(WEATHER,),
    ),
    TOOL=json.dumps(WEATHER),
    CALL=json.dumps(CALL),
)
case(
    "sft_completion as completion",
    r"""{"prompt": "Count to three.", "completion": "1 2 3"}""",
    sft("Count to three.", "1 2 3"),
)
case("sft_text as text", r"""{"text": " Once upon a time.\n"}""", PromptGroup((), (" Once upon a time.\n",)))
case(
    "alpaca as instruction",
    r"""{"instruction": "Add the numbers.", "input": "1, 2", "output": "3", "text": "Below is an instruction."},
    {"instruction": "Say hi.", "input": "", "output": "Hi.", "text": "Below is an instruction."}""",
    sft("Add the numbers.\n\n1, 2", "3"),
    sft("Say hi.", "Hi."),
)

case(
    "alpaca_history as instruction",
    r"""{"instruction": "Which is longer?", "input": "", "output": "The Elbe.", "system": "Be brief.",
     "history": [["Where does the Elbe end?", "In the sea."]]}""",
    sft(turns("Where does the Elbe end?", "In the sea.", "Which is longer?", system="Be brief."), "The Elbe."),
)
case(
    "kto_messages as unpaired",
    r"""{"messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}], "label": true},
    {"messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Round."}], "label": false}""",
    sft("Sky?", "Blue.", labels=(True,)),
    sft("Sky?", "Round.", labels=(False,)),
)
case(
    "kto_alpaca as unpaired",
    r"""{"instruction": "Name a metal.", "input": "", "output": "Wood.", "kto_tag": false}""",
    sft("Name a metal.", "Wood.", labels=(False,)),
)
case(
    "kto_sharegpt as unpaired",
    r"""{"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue"}], "kto_tag": true}""",
    sft("Sky?", "Blue", labels=(True,)),
)
case(
    "sharegpt as messages",
    r"""{"id": 7, "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"},
      {"from": "gpt", "value": "Hello!"}, {"from": "human", "value": "Sky?"}, {"from": "model", "value": "Blue."}]}""",
    sft(turns("Hi", "Hello!", "Sky?", system="Be kind."), "Blue."),
)
case(
    "sharegpt_tools as messages",
    r"""{"conversation": [{"from": "human", "value": "Weather in Rome?"},
      {"from": "function_call", "value": "{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}"},
      {"from": "observation", "value": "18 degrees"}, {"from": "gpt", "value": "It has 18 degrees."}],
     "system": "Use the tools.", "tools": TOOLS}""",
    sft(
        (
            *turns("Weather in Rome?", system="Use the tools."),
            Message(role="assistant", content="", tool_calls=[CALL]),
            Message(role="tool", content="18 degrees"),
        ),
        "It has 18 degrees.",
        tools=(WEATHER,),
    ),
    TOOLS=json.dumps(json.dumps([WEATHER])),
)
case(
    "sharegpt_pairs as preference",
    r"""{"conversations": [{"from": "human", "value": "Two plus two?"}], "chosen": {"from": "gpt", "value": "Four."},
     "rejected": {"from": "gpt", "value": "Five."}}""",
    pair("Two plus two?", "Four.", "Five."),
)
case(
    "openai_preference as openai_preference",
    r"""{"input": {"messages": [{"role": "user", "content": "How cold is it?"}], "tools": [TOOL],
      "parallel_tool_calls": true}, "preferred_output": [{"role": "assistant", "content": "Which city?"}],
     "non_preferred_output": [{"role": "assistant", "content": "Very."}]}""",
    pair("How cold is it?", "Which city?", "Very.", tools=(WEATHER,)),
    TOOL=json.dumps(WEATHER),
)
case(
    "swift_rejected_response as rejected_response",
    r"""{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sky?"},
      {"role": "assistant", "content": "Blue."}], "rejected_response": "Round."}""",
    pair(turns("Sky?", system="Be brief."), "Blue.", "Round."),
)
case(
    "swift_rejected_messages as rejected_response",
    r"""{"messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}],
     "rejected_messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Round."}]}""",
    pair("Sky?", "Blue.", "Round."),
)
case(
    "swift_query as preference",
    r"""{"system": "Be brief.", "history": [["Hi", "Hello!"]], "query": "Sky?", "response": "Blue.",
     "rejected_response": "Round."}""",
    pair(turns("Hi", "Hello!", "Sky?", system="Be brief."), "Blue.", "Round."),
)
case(
    "messages_beside_sides as preference",
    r"""{"messages": [{"role": "user", "content": "Sky?"}], "chosen": [{"role": "assistant", "content": "Is blue."}],
     "rejected": [{"role": "assistant", "content": "Is round."}]}""",
    pair("Sky?", "Is blue.", "Is round."),
)
case(
    "alpaca_pairs as preference",
    r"""{"instruction": "Correct it.", "input": "I haev time.", "chosen": "It is: I have time.",
     "rejected": "It is: I haev time."}""",
    pair("Correct it.\n\nI haev time.", "It is: I have time.", "It is: I haev time."),
)
case(
    "question_and_context as preference",
    r"""{"context": "Ann has a cat.", "question": "Who has a cat?", "chosen": "Ann has.", "rejected": "Bob has."}""",
    pair("Ann has a cat.\n\nWho has a cat?", "Ann has.", "Bob has."),
)
case(
    "template_options as preference",
    r"""{"prompt": "Is 91 prime?", "chosen": "No.", "rejected": "Yes.",
     "chat_template_kwargs": {"enable_thinking": false}}""",
    pair("Is 91 prime?", "No.", "Yes.", template_options={"enable_thinking": False}),
)
case(
    "thoughts as preference",
    r"""{"prompt": [{"role": "user", "content": "Is 91 prime?"}],
     "chosen": [{"role": "assistant", "content": "No.", "reasoning_content": "7 times 13."}],
     "rejected": [{"role": "assistant", "content": "No.", "reasoning_content": "A guess."}]}""",
    pair(
        "Is 91 prime?",
        *((Message(role="assistant", content="No.", reasoning_content=why),) for why in ("7 times 13.", "A guess.")),
    ),
)

# Rows of published preference sets.

case(
    "hh as hh",
    r"""{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why\n\nis it dark?\n\nAssistant: It is night.",
     "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why\n\nis it dark?\n\nAssistant: Go away."}""",
    pair(turns("Hi", "Hello", "Why\n\nis it dark?"), "It is night.", "Go away."),
)
case(
    "ultrafeedback as ultrafeedback",
    r"""{"source": "evol_instruct", "instruction": "Name a fish.", "models": ["gpt-4", "llama-2-7b-chat", "bard"],
     "correct_answers": ["None"], "incorrect_answers": ["None"], "completions": [
      {"annotations": {"helpfulness": {"Type": ["1"], "Rating": "2", "Rationale": "r", "Rationale For Rating": "s"},
        "honesty": {"Rating": "N/A", "Rationale": "r"}, "instruction_following": {"Rating": "1", "Rationale": "r"},
        "truthfulness": {"Type": ["1"], "Rating": "3", "Rationale": "r", "Rationale For Rating": "s"}},
       "custom_system_prompt": "You are helpful.", "model": "bard", "principle": "helpfulness", "response": "A dog.",
       "critique": "Wrong.", "overall_score": 10.0, "fine-grained_score": 2.0},
      {"annotations": {"helpfulness": {"Type": ["1"], "Rating": "5", "Rationale": "r", "Rationale For Rating": "s"},
        "honesty": {"Rating": "5", "Rationale": "r"}, "instruction_following": {"Rating": "4", "Rationale": "r"},
        "truthfulness": {"Type": ["1"], "Rating": "5", "Rationale": "r", "Rationale For Rating": "s"}},
       "custom_system_prompt": "You are helpful.", "model": "gpt-4", "principle": "honesty", "response": "A cod.",
       "critique": "Fine.", "overall_score": 9.0, "fine-grained_score": 4.75}]}""",
    pair("Name a fish.", "A cod.", "A dog.", (4.75, 2.0)),
)
SHP = r"""{"post_id": "p1", "domain": "askbaking_train", "upvote_ratio": 0.97, "history": "Flat bread?",
     "c_root_id_A": "a1", "c_root_id_B": "b1", "created_at_utc_A": 1600000000, "created_at_utc_B": 1600000900,
     "score_A": %d, "score_B": %d, "human_ref_A": "More yeast.", "human_ref_B": "Warm it.", "labels": %d,
     "seconds_difference": 900.0, "score_ratio": 3.0}"""
case(
    "shp as shp",
    f"{SHP % (3, 9, 0)}, {SHP % (12, 4, 1)}",
    pair("Flat bread?", "Warm it.", "More yeast.", (9.0, 3.0)),
    pair("Flat bread?", "More yeast.", "Warm it.", (12.0, 4.0)),
)
case(
    "stack_exchange as stack_exchange",
    r"""{"qid": 11, "question": "<p>How to <b>compare</b>?</p>", "date": "2014/05/14",
     "metadata": ["https://example.com/questions/11"], "answers": [
      {"answer_id": 1, "author": "ann", "author_id": 3, "author_profile": "https://example.com/3", "pm_score": 0,
       "selected": false, "text": "<p>Use <code>a &lt; b</code></p>\n"},
      {"answer_id": 2, "author": "bob", "author_id": 4, "author_profile": "https://example.com/4", "pm_score": 5,
       "selected": true, "text": "<p>Sort &amp; search</p>"}]}""",
    pair("How to compare?", "Sort & search", "Use a < b", (5.0, 0.0)),
)
case(
    "summarize_from_feedback as tldr",
    r"""{"info": {"id": "t3_1", "post": "I lost my hat.", "title": "Hat", "subreddit": "tifu", "site": null,
      "article": null}, "choice": 1, REST, "summaries": [{"text": " Cat.", "policy": "sup1", "note": null},
      {"text": " Hat is lost.", "policy": "ref", "note": "short"}]},
    {"info": {"id": "c_2", "post": null, "title": "Rain", "subreddit": null, "site": "cnndm",
      "article": "It rained all day."}, "choice": 0, REST, "summaries": [{"text": "Rain.", "policy": "sup1",
      "note": null}, {"text": "Snow.", "policy": "ref", "note": null}]}""",
    PromptGroup(
        turns("SUBREDDIT: r/tifu\n\nTITLE: Hat\n\nPOST: I lost my hat.\n\nTL;DR:"), ("Hat is lost.", "Cat."), ((0, 1),)
    ),
    pair("ARTICLE: It rained all day.\n\nTL;DR:", "Rain.", "Snow."),
    REST='"worker": "w1", "batch": "b1", "split": "train", "extra": {"confidence": 7}',
)
case(
    "alpaca_farm as annotated",
    r"""{"instruction": "Translate.", "input": "oui", "output_1": "no", "output_2": "yes", "preference": 2,
     "raw_preference": 4}""",
    pair("Translate.\n\noui", "yes", "no", (1.0, 0.0)),
)
case(
    "alpaca_eval as annotated",
    r"""{"instruction": "Name a bird.", "output_1": "Owl", "generator_1": "gpt4_turbo", "dataset": "koala",
     "output_2": "Bat", "generator_2": "model", "annotator": "weighted_gpt4_turbo", "preference": 1.25,
     "time_per_example": 1.5, "price_per_example": 0.01, "raw_completion": "m"}""",
    pair("Name a bird.", "Owl", "Bat", (0.75, 0.25)),
)
case(
    "llmbar as annotated",
    r"""{"input": "Write one word.", "output_1": "One.", "output_2": "Two words.", "label": 1}""",
    pair("Write one word.", "One.", "Two words.", (1.0, 0.0)),
)
HELPSTEER2 = r"""{"prompt": "%s", "response": "%s", "helpfulness": %d, "correctness": 3, "coherence": 4,
    "complexity": 1, "verbosity": %d}"""
ASKED = [("Boil an egg?", "Burn it.", 1, 4), ("Boil an egg?", "Eight minutes.", 4, 2)]
ASKED += [("Fry it?", "Oil.", 3, 1), ("Fry it?", "Ice.", 0, 0)]
case(
    "helpsteer2 as helpsteer",
    ", ".join(HELPSTEER2 % row for row in ASKED),
    pair("Boil an egg?", "Eight minutes.", "Burn it.", (4.0, 1.0)),
    pair("Fry it?", "Oil.", "Ice.", (3.0, 0.0)),
)
case(
    "helpsteer3 as helpsteer3",
    r"""{"domain": "general", "language": "english", "context": [{"role": "user", "content": "Hi"},
      {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "A metal?"}], "response1": "Wood",
     "response2": "Iron", "overall_preference": 2, "individual_preference": [
      {"score": 2, "reasoning": "Wood is none.", "feedback1": "Wrong.", "feedback2": "Right."}]}""",
    pair(turns("Hi", "Yes?", "A metal?"), "Iron", "Wood", (2.0, -2.0)),
)
case(
    "ranked_scores as ranked",
    r"""{"prompt": "Pick.", "responses": ["low", "high", "mid"], "scores": [0.5, 2.5, 1.5]}""",
    pair("Pick.", "high", "low", (2.5, 0.5)),
)
case(
    "ranked_ranks as ranked",
    r"""{"prompt": "Pick.", "responses": ["third", "first", "second"], "ranks": [3, 1, 2]}""",
    pair("Pick.", "first", "third", (-1.0, -3.0)),
)
case(
    "ranked_by_order as ranked",
    r"""{"prompt": "Pick.", "responses": ["best", "middle", "worst"]}""",
    pair("Pick.", "best", "worst", (0.0, -2.0)),
)
case(
    "trajectories as ranked",
    r"""{"prompt": [{"role": "user", "content": "Rome?"}], "rewards": [0.0, 1.0], "trajectories": [
      [{"role": "assistant", "content": "Warm."}],
      [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "18 degrees"},
       {"role": "assistant", "content": "It has 18 degrees."}]]}""",
    pair(
        "Rome?",
        (
            Message(role="assistant", content="", tool_calls=[CALL]),
            Message(role="tool", content="18 degrees"),
            Message(role="assistant", content="It has 18 degrees."),
        ),
        "Warm.",
        (1.0, 0.0),
    ),
    CALL=json.dumps(CALL),
)
case(
    "helpsteer2_rounds as helpsteer",
    ", ".join(
        HELPSTEER2 % (r"A river?\n<extra_id_1>Assistant\nElbe.\n<extra_id_1>User\nIts end?", *row)
        for row in (("The sea.", 4, 1), ("A lake.", 0, 1))
    ),
    pair(turns("A river?", "Elbe.", "Its end?"), "The sea.", "A lake.", (4.0, 0.0)),
)
case(
    "helpsteer2_preference as helpsteer3",
    r"""{"split": "train", "prompt": "A metal?", "response_1": "Iron", "response_2": "Wood", "preference_strength": -3,
     "preference_statement": "Response 1 is much better than Response 2.", "preference_elaboration": "Wood is none.",
     "three_most_similar_preferences": [{"statement": "s", "elaboration": "e", "strength": -3}],
     "all_preferences_unprocessed": [{"strength": -3, "statement": "s", "elaboration": "e"}]}""",
    pair("A metal?", "Iron", "Wood", (3.0, -3.0)),
)
case(
    "nectar as ranked",
    r"""{"prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: A metal?\n\nAssistant: ", "turns": 2,
     "num_responses": 3, "source": ["lmsys-chat-1m"], "good_natured": true, "answers": [
      {"answer": "Tin, say.", "model": "gpt-4", "rank": 1.0}, {"answer": "Wood.", "model": "llama", "rank": 3.0},
      {"answer": "Iron.", "model": "mistral", "rank": 2.0}]}""",
    pair(turns("Hi", "Yes?", "A metal?"), "Tin, say.", "Wood.", (-1.0, -3.0)),
)
case(
    "safe_rlhf as safe_rlhf",
    r"""{"prompt": "A metal?", "response_0": "Wood", "response_1": "Iron", "prompt_source": "GPT-3.5",
     "response_0_source": "Alpaca-7B", "response_1_source": "Alpaca-7B", "is_response_0_safe": true,
     "is_response_1_safe": false, "response_0_harm_category": {"Privacy Violation": false},
     "response_1_harm_category": {"Privacy Violation": true}, "response_0_severity_level": 0,
     "response_1_severity_level": 2, "better_response_id": 1, "safer_response_id": 0,
     "response_0_sha256": "ab", "response_1_sha256": "cd"}""",
    pair("A metal?", "Iron", "Wood"),
)
case(
    "skywork as preference",
    r"""{"chosen": [{"content": "A metal?", "role": "user"}, {"content": "Iron", "role": "assistant"}],
     "rejected": [{"content": "A metal?", "role": "user"}, {"content": "Wood", "role": "assistant"}],
     "source": "magpie_ultra", "chosen_score": 9.5, "rejected_score": 2.0}""",
    pair("A metal?", "Iron", "Wood", (9.5, 2.0)),
)
case(
    "tulu3 as preference",
    r"""{"id": "personas_1", "source": "personahub", "prompt": "A metal?", "constraints": ["one word"],
     "chosen": [{"content": "A metal?", "role": "user"}, {"content": "Iron", "role": "assistant"}],
     "rejected": [{"content": "A metal?", "role": "user"}, {"content": "Wood", "role": "assistant"}],
     "chosen_model": "gpt-4o", "rejected_model": "llama"}""",
    pair("A metal?", "Iron", "Wood"),
)
case(
    "olmo3 as preference",
    r"""{"chosen": [{"content": "A metal?", "role": "user", "function_calls": null},
      {"content": "Iron", "role": "assistant", "function_calls": null}],
     "rejected": [{"content": "A metal?", "role": "user", "function_calls": null},
      {"content": "Wood", "role": "assistant", "function_calls": null}],
     "prompt_id": "dolci-1", "dataset_source": "allenai/wildchat", "chosen_model": "qwen3-32b",
     "rejected_model": "qwen3-0.6b", "preference_type": "delta"}""",
    pair("A metal?", "Iron", "Wood"),
)
case(
    "ultrafeedback_argilla as preference",
    r"""{"source": "evol_instruct", "instruction": "A metal?", "chosen_response": "Iron", "rejected_response": "Wood",
     "chosen_avg_rating": 4.5, "rejected_avg_rating": 1.25, "chosen_model": "gpt-4", "rejected_model": "bard"}""",
    pair("A metal?", "Iron", "Wood", (4.5, 1.25)),
)
case(
    "orca_pairs as preference",
    r"""{"system": "Be brief.", "question": "A metal?", "chosen": "Iron it is", "rejected": "Iron not"}""",
    pair(turns("A metal?", system="Be brief."), "Iron it is", "Iron not"),
)
case(
    "orca_distilabel as preference",
    r"""{"system": "", "input": "A metal?", "chosen": "Iron", "rejected": "Wood", "generations": ["Wood", "Iron"],
     "order": ["gpt", "llama"], "labelling_model": "gpt-4", "labelling_prompt": [
      {"role": "user", "content": "Rate two answers to: A metal?"}], "raw_labelling_response": "9 1",
     "rating": [9.0, 1.0], "rationale": "Wood is none.", "status": "swapped", "original_chosen": "Wood",
     "original_rejected": "Iron", "chosen_score": 9.0, "in_gsm8k_train": false}""",
    pair("A metal?", "Iron", "Wood"),
)
case(
    "orpo_mix as preference",
    r"""{"source": "distilabel", "question": "A metal?", "prompt": "A metal?",
     "chosen": [{"content": "A metal?", "role": "user"}, {"content": "Iron", "role": "assistant"}],
     "rejected": [{"content": "A metal?", "role": "user"}, {"content": "Wood", "role": "assistant"}]}""",
    pair("A metal?", "Iron", "Wood"),
)
case(
    "stack_exchange_paired as preference",
    r"""{"qid": 11, "question": "How to compare?", "date": "2014/05/14", "metadata": ["https://example.com/11"],
     "response_j": "Sort & search", "response_k": "Use a < b"}""",
    pair("How to compare?", "Sort & search", "Use a < b"),
)
