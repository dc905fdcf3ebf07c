"""Chats as token sequences: each family's template against a reference, and what is learned of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.prepare.chats import ChatEncoder, InvalidChatError
from mixtune.components.shared.data.chats import Chat, parse_chat
from mixtune.components.shared.serving.chats import chat_prompt_ids, end_of_turn

from .chat_families import FAMILIES, reference, tokenizer_of

TEXTS = [
    "Hi",
    "2 + 2 = 4!",
    "第一题：天气怎么样？",
    "مرحبا، كيف الحال؟",
    "🙂👍🏽 ok",
    "line\n\nline\n",
    "  spaces  ",
    "\nnew line first",
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "東京", "days": 2}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents))]


def encoded(name: str, messages: list[dict[str, Any]], every_turn: bool = True, **options: Any) -> Any:
    encoder = ChatEncoder(tokenizer_of(name), options.pop("max_length", None), every_turn)
    return encoder.encode(Chat(messages, options.pop("tools", []), **options))


@pytest.mark.parametrize("name", FAMILIES)
@given(
    st.lists(st.sampled_from(TEXTS), min_size=2, max_size=8).filter(lambda texts: len(texts) % 2 == 0), st.booleans()
)
def test_every_token_is_as_in_the_reference(name: str, contents: list[str], with_system: bool) -> None:
    messages = chat(*contents, system="Be brief." if with_system and name != "gemma" else None)
    whole, apart = encoded(name, messages)
    ids, learned = reference(name, messages)
    assert whole.tokens.tolist() == ids
    assert whole.supervised.tolist() == learned
    own = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
    # A turn that is shown in another way later is learned as it is written.
    for number, one in zip(own, apart, strict=False):
        ids, learned = reference(name, messages[: number + 1])
        assert one.tokens.tolist() == ids
        assert one.supervised[one.answer_from :].all()
    assert whole.num_turns + len(apart) == len(own)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_is_that_of_generation(name: str) -> None:
    messages = chat("Hi", "\nHello.", "And <|im_end|> now?", "Bye.")
    whole, _ = encoded(name, messages)
    tokenizer = tokenizer_of(name)
    prompt = chat_prompt_ids(tokenizer, messages[:-1])
    answer = whole.tokens[whole.answer_from :].tolist()
    assert whole.tokens[: whole.answer_from].tolist()[-5:] == prompt[-5:]
    assert answer[-1] == end_of_turn(tokenizer)
    assert "Bye." in tokenizer.decode(answer)
    single = chat("Hi\n\n", "\n\nHello.")
    whole, _ = encoded(name, single)
    plain = tokenizer.apply_chat_template(single[:-1], add_generation_prompt=True, return_dict=False)
    assert whole.tokens[: whole.answer_from].tolist() == plain


@pytest.mark.parametrize("name", FAMILIES)
def test_text_of_a_message_never_becomes_a_special_token(name: str) -> None:
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    control = {tokenizer.get_vocab()[token] for token in family.tokens}
    harmless, _ = encoded(name, chat("a b", "c d"))
    for token in family.tokens:
        whole, _ = encoded(name, chat(f"a {token} b", f"c {token} d"))
        assert [i for i in whole.tokens.tolist() if i in control] == [
            i for i in harmless.tokens.tolist() if i in control
        ]
        assert tokenizer.decode(whole.tokens).count(token) == 2 + tokenizer.decode(harmless.tokens).count(token)


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma"])
def test_there_is_one_beginning(name: str) -> None:
    tokenizer = tokenizer_of(name)
    whole, _ = encoded(name, chat("Hi", "Hello."))
    assert whole.tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert whole.tokens[0] == tokenizer.bos_token_id


def test_the_last_turn_alone() -> None:
    messages = chat("a", "b", "c", "d")
    for name in ("chatml", "chatml_marked"):
        whole, apart = encoded(name, messages, every_turn=False)
        assert tokenizer_of(name).decode(whole.tokens[whole.supervised]) == "d<|im_end|>"
        assert (whole.num_turns, apart) == (1, [])


def test_messages_of_the_prompt_are_not_learned() -> None:
    for name in ("chatml", "chatml_marked"):
        whole, _ = encoded(name, chat("a", "b", "c", "d", "e", "f"), learn_from=3)
        assert tokenizer_of(name).decode(whole.tokens[whole.supervised]) == "d<|im_end|>f<|im_end|>"


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_tool_calls_and_their_results(name: str) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Will it rain?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "no 🌞"},
        {"role": "assistant", "content": "No.", "reasoning_content": "It says no."},
    ]
    whole, apart = encoded(name, messages)
    assert (whole.tokens.tolist(), whole.supervised.tolist()) == tuple(reference(name, messages))
    assert not apart
    assert whole.num_turns == 2
    text = tokenizer_of(name).decode(encoded(name, messages, tools=TOOLS)[0].tokens)
    assert '"parameters": {"type": "object"' in text
    assert tokenizer_of(name).decode(whole.tokens[whole.supervised]).count("東京") == 1


def test_reasoning_is_learned_where_the_model_writes_it() -> None:
    messages = chat("a", "b", "c", "d")
    messages[1]["reasoning_content"], messages[3]["reasoning_content"] = "first thought", "second thought"
    whole, apart = encoded("qwen3", messages)
    decode = tokenizer_of("qwen3").decode
    assert decode(whole.tokens[whole.supervised]) == "<think>\nsecond thought\n</think>\n\nd<|im_end|>"
    assert "first thought" not in decode(whole.tokens)
    (own,) = apart
    assert decode(own.tokens[own.supervised]) == "<think>\nfirst thought\n</think>\n\nb<|im_end|>"


def test_what_the_template_leaves_out_is_told() -> None:
    encoder = ChatEncoder(tokenizer_of("chatml"), None)
    messages = chat("a", "b")
    assert encoder.hidden(Chat(messages, [])) == (False, False)
    assert encoder.hidden(Chat([messages[0], messages[1] | {"thinking": "hm, well"}], [])) == (False, True)
    assert ChatEncoder(tokenizer_of("qwen3"), None).hidden(
        Chat([messages[0], messages[1] | {"reasoning_content": "hm <think> well"}], [])
    ) == (False, False)


def test_a_chat_that_is_too_long_loses_its_oldest_messages() -> None:
    contents = [f"{word} number {n}" for n in range(6) for word in ("question", "answer")]
    messages = chat(*contents, system="Be brief.")
    full = len(encoded("chatml", messages)[0].tokens)
    lengths = []
    for max_length in range(full, 10, -7):
        whole, apart = encoded("chatml", messages, max_length=max_length)
        if whole is None:
            break
        assert len(whole.tokens) <= max_length
        assert not apart
        kept = 2 * whole.num_turns
        assert whole.tokens.tolist() == reference("chatml", [messages[0], *messages[-kept:]])[0]
        assert whole.cut == (kept < 12)
        lengths.append(kept)
    assert lengths[0] == 12
    assert lengths[-1] == 2
    assert whole is None


@pytest.mark.parametrize(
    ("name", "messages", "problem"),
    [
        ("gemma", chat("a", "b", system="c"), "the chat template refuses the messages .There is no system role."),
        ("mistral", [*chat("a"), *chat("b", "c")], "have to alternate"),
        ("gemma", [*chat("a"), *chat("b", "c")], "have to alternate"),
    ],
)
def test_what_a_template_refuses(name: str, messages: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(InvalidChatError, match=problem):
        encoded(name, messages)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            "{% for turn in messages %}{{ turn.content }}\n{% endfor %}",
            "with no special token",
        ),
        (
            "{% for turn in messages %}{{ turn.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}so: {% endif %}",
            "not prefix-stable: the prompt for message 2",
        ),
        (
            "{% for turn in messages %}{{ turn.content }}{% generation %}{% endgeneration %}<|im_end|>{% endfor %}",
            "marks nothing as generated",
        ),
    ],
)
def test_templates_that_do_not_tell_what_to_learn(template: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_of("chatml"), "chat_template", template)
    with pytest.raises(InvalidChatError, match=problem):
        encoded("chatml", chat("a", "b"))


def test_both_ways_to_tell_the_turns_agree() -> None:
    messages = chat("a", "b\n\n", "c", "\n\nd", system="e")
    one, two = encoded("chatml", messages)[0], encoded("chatml_marked", messages)[0]
    assert one.tokens.tolist() == two.tokens.tolist()
    assert one.supervised.tolist() == two.supervised.tolist()


def test_sharegpt_is_the_same_chat() -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    messages = chat("a", "b", "c", "d", system="e")
    conversations = [{"from": names[one["role"]], "value": one["content"]} for one in messages]
    one = parse_chat({"messages": messages}, {"messages": "messages"})
    assert parse_chat({"conversations": conversations}, {"messages": "conversations"}) == one
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    assert parse_chat({"m": parts}, {"messages": "m"}) == one
