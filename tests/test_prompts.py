"""Prompts to tokens: the published text, and every kind of bad prompt."""

from __future__ import annotations

from datetime import datetime, time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine.errors import PromptError
from p2l_engine.prompts.encode import MAX_TOKENS, PromptEncoder
from p2l_engine.prompts.parse import user_turns
from p2l_engine.prompts.template import ChatTemplate
from p2l_engine.prompts.tokenizer import FastTokenizer, TransformersTokenizer
from tests.support import tiny


def encoder_of(max_tokens=MAX_TOKENS, **changes):
    return PromptEncoder(TransformersTokenizer(tiny.tokenizer(**changes)), max_tokens)


@pytest.fixture(scope="module")
def encoder():
    return encoder_of()


def test_text_is_the_template_and_the_cls_token(encoder):
    assert encoder.text(["hi"]) == "<|im_start|>user\nhi<|im_end|>\n<|cls|>"
    two = "<|im_start|>user\nfirst<|im_end|>\n<|im_start|>user\nsecond<|im_end|>\n<|cls|>"
    assert encoder.text(["first", "second"]) == two


def test_only_user_turns_are_used():
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "two"},
    ]
    assert user_turns(messages) == ["one", "two"]
    assert user_turns(["one", "two"]) == user_turns(messages)
    assert user_turns("one") == ["one"]


def test_the_users_own_cls_token_is_replaced(encoder):
    ids = encoder.encode(["tell me about <|cls|> please <|cls|>"])[0]
    cls = encoder.tokenizer.id_of(encoder.cls_token)
    assert (ids == cls).sum() == 1
    assert ids[-1] == cls
    assert "<cls> please <cls>" in tiny.tokenizer().decode(ids)


def test_truncation_keeps_the_end():
    encoder = encoder_of(max_tokens=16)
    ids = encoder.encode(["x" * 100 + "the end"])[0]
    whole = encoder_of().encode(["x" * 100 + "the end"])[0]
    assert len(ids) == 16
    assert (ids == whole[-16:]).all()


def test_a_batch_is_tokenised_as_its_prompts_are(encoder):
    prompts = ["a", "", "  ", "日本語", ["x", "y"]]
    for together, prompt in zip(encoder.encode(prompts), prompts, strict=True):
        assert (together == encoder.encode([prompt])[0]).all()
    assert encoder.encode([]) == []


def test_200_000_characters_and_every_special_token(encoder):
    long, special = encoder.encode(["word " * 40_000, " ".join(encoder.tokenizer.special_tokens.values())])
    assert len(long) == 8192
    assert special[-1] == encoder.tokenizer.id_of(encoder.cls_token)


@pytest.mark.parametrize("template", [tiny.TEMPLATE, "{{ messages[0]['content'] }}"])
def test_a_giant_prompt_is_cut_before_it_is_tokenised(template, monkeypatch):
    """The tokens equal those of the whole text, truncated; memory follows max_tokens, not the prompt."""
    monkeypatch.setattr("p2l_engine.prompts.encode.BOUNDARY_WITHIN", 50)
    short = encoder_of(max_tokens=40, template=template)
    seen = []
    real = short.tokenizer.ids
    monkeypatch.setattr(short.tokenizer, "ids", lambda texts: seen.extend(map(len, texts)) or real(texts))
    for text in ("so many words " * 1000, "12345" * 3000, "é " * 5000, "\n\n" * 4000):
        whole = real([short.text([text])])[0][-40:]
        assert short.encode([text])[0].tolist() == whole
    assert max(seen) <= 40 * short.tokenizer.longest_token + 50
    # A tokenizer that leaves characters out gets the whole text.
    lossy = encoder_of(max_tokens=40, template=template)
    monkeypatch.setattr(lossy.tokenizer, "ids", lambda texts: real([text.replace(" ", "") for text in texts]))
    text = "ab" * 100 + " " * 5000
    assert lossy.encode([text])[0].tolist() == real([lossy.text([text]).replace(" ", "")])[0][-40:]


@pytest.mark.slow
@given(st.text())
@settings(max_examples=100, deadline=None)
def test_any_text_is_tokens_or_a_named_error(text):
    encoder = encoder_of()
    try:
        ids = encoder.encode(["ok", text])[1]
    except PromptError as error:
        assert error.index == 1
        assert any(0xD800 <= ord(c) <= 0xDFFF for c in text)
    else:
        assert ids[-1] == encoder.tokenizer.id_of(encoder.cls_token)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "expected at least one user turn, got none"),
        ([{"role": "system", "content": "x"}], "expected at least one user turn, got none"),
        ([{"role": "user"}], "message 0: expected a 'content' of type str or a list of text parts, got NoneType"),
        ([{"content": "x"}], "message 0: expected a 'role' of type str, got None"),
        (["a", 3], "message 1: expected a user turn of type str, or a message, got int"),
        (7, "expected a string, a list of user turns or a list of messages, got int"),
        (b"bytes", "got bytes"),
        ("bad \ud800 text", "invalid Unicode at character 4"),
        (["fine", "\udfff"], "invalid Unicode at character 0"),
    ],
)
def test_a_bad_prompt_is_named_by_its_index(encoder, prompt, message):
    with pytest.raises(PromptError) as caught:
        encoder.encode(["good", "good", prompt])
    assert caught.value.index == 2
    assert str(caught.value).startswith("prompts[2]: ")
    assert message in str(caught.value)


def test_other_users_of_the_tokenizer_change_nothing():
    tokenizer = tiny.tokenizer()
    encoder = PromptEncoder(TransformersTokenizer(tokenizer))
    texts = ["hello", "hello there <|im_start|>"]
    before = [ids.tolist() for ids in encoder.encode(texts)]
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=6)
    tokenizer(["a"], split_special_tokens=True)
    assert [ids.tolist() for ids in encoder.encode(texts)] == before


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + message['role'] + '\n' + (message['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
)
PICKY = "{% for m in messages %}{{ raise_exception('no x') if 'x' in m['content'] else m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (MISTRAL, "<|im_start|>[INST] one\n\ntwo\n\nthree [/INST]<|cls|>"),
        (GEMMA, "<|im_start|><start_of_turn>user\none\n\ntwo\n\nthree<end_of_turn>\n<|cls|>"),
        (tiny.TEMPLATE, "".join(f"<|im_start|>user\n{turn}<|im_end|>\n" for turn in ("one", "two", "three")) + "<|cls|>"),
        (PICKY, "onetwothree<|cls|>"),
    ],
)
def test_turns_are_joined_where_the_template_demands_alternating_roles(template, text):
    encoder = encoder_of(template=template)
    assert encoder.text(["one", "two", "three"]) == text
    assert encoder.tokenizer.template.joins == (template in (MISTRAL, GEMMA))
    assert [len(ids) for ids in encoder.encode(["one", ["one", "two", "three"]])][1] > 0


@pytest.mark.parametrize(
    "template",
    [
        PICKY,
        "{{ (messages[0]['content'] | replace('x', '') | length) // (messages[0]['content'].count('x') - 1) }}",  # 0 for an x
        "{{ [1, 2][messages[0]['content'].count('x') * 9].y }}",  # undefined
        "{{ messages[0]['content'].index('a') }}",  # ValueError
    ],
)
@given(data=st.data())
@settings(max_examples=20)
def test_a_prompt_that_the_template_refuses_is_named_and_fails_no_other(template, data):
    encoder = encoder_of(template=template)
    prompts = data.draw(st.lists(st.sampled_from(["x", "ab", "a", "abab", "xa", "\u00e9"]), min_size=1, max_size=6))
    refused = {}
    for i, prompt in enumerate(prompts):
        try:
            encoder.text([prompt])
        except ValueError as error:
            refused[i] = str(error)
    found, problems = encoder.encode_each(prompts, 10)
    assert problems == {10 + i: why for i, why in refused.items()}
    cls = encoder.tokenizer.id_of(encoder.cls_token)
    for i, prompt in enumerate(prompts):
        assert found[i].tolist() == ([cls] if i in refused else encoder.encode([prompt])[0].tolist())
        assert encoder.problem([prompt]) == refused.get(i)
    if refused:
        with pytest.raises(PromptError, match="chat template cannot be rendered") as caught:
            encoder.encode(prompts)
        assert caught.value.index == min(refused)


PARTS = "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("body", "whole"),
    [
        ("{{ m['content'] }}", True),
        (PARTS, False),
        (f"{{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}{PARTS}{{% endif %}}", True),
        ("{% if m['content'] is not string %}{{ m['content'] }}{% endif %}", False),
        ("{{ m['text'] }}", False),
        ("{{ m['role'] }}", False),
    ],
)
def test_a_template_that_leaves_out_what_the_user_says_is_refused(body, whole):
    encoder = encoder_of(template=f"{{% for m in messages %}}<{body}>{{% endfor %}}")
    if whole:
        encoder.check()
        return
    assert encoder.text(["one"]) == encoder.text(["another"])
    with pytest.raises(ValueError, match="chat template leaves out what the user says"):
        encoder.check()


def test_a_prompt_that_the_tokenizer_refuses_is_named():
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0, "you": 1}, unk_token="<unk>"))  # which it lacks
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.add_special_tokens(["<|cls|>"])
    encoder = PromptEncoder(FastTokenizer(core, "{{ messages[0]['content'] }}", {"cls_token": "<|cls|>"}))
    assert encoder.encode(["hello you"])[0].tolist() == [0, 1, 2]
    with pytest.raises(PromptError, match=r"prompts\[1\]: the tokenizer cannot encode it: .*UNK"):
        encoder.encode(["hello", "what", "you", "why"])
    found, problems = encoder.encode_each(["hello", "what", "you", "why"])
    assert [ids.tolist() for ids in found] == [[0, 2], [2], [1, 2], [2]]
    assert list(problems) == [1, 3]


CLOCK = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %H:%M') }}{% endif %} " + tiny.TEMPLATE


@pytest.mark.slow
@given(shown=st.datetimes(), whole=st.booleans())
@settings(max_examples=20)
def test_a_template_with_a_clock_writes_the_date_that_it_is_given(shown, whole):
    given_ = shown.date() if whole else shown
    expected = (datetime.combine(given_, time()) if whole else shown).strftime("%d %b %Y, %H:%M")
    for date in (given_, given_.isoformat(), str(given_)):
        assert ChatTemplate(CLOCK, {}, date).render(["hi"]).startswith(f"{expected} <|im_start|>")


def test_a_template_with_a_clock_needs_a_date():
    tokenizer = tiny.tokenizer(template=CLOCK)
    encoder = PromptEncoder(TransformersTokenizer(tokenizer))
    with pytest.raises(PromptError, match=r"prompts\[0\]: .*reads the clock .*: give the date .*--date 2026-01-31"):
        encoder.encode(["hi"])
    assert len(encoder.prefix()) == 0
    assert not encoder.tokenizer.template.joins
    pinned = PromptEncoder(TransformersTokenizer(tokenizer, "2026-01-31"))
    assert pinned.text(["hi"]).startswith("31 Jan 2026, 00:00 ")
    assert TransformersTokenizer(tiny.tokenizer(), "2026-01-31").template.date is None  # which it does not read
    with pytest.raises(ValueError, match="date: expected a date like 2026-01-31, got 'yesterday'"):
        ChatTemplate(CLOCK, {}, "yesterday")


def test_the_prefix_is_what_all_prompts_start_with():
    assert encoder_of().prefix().tolist() == tiny.tokenizer()("<|im_start|>user\n").input_ids
    refusing = encoder_of(template="{{ raise_exception('no') if '<' in messages[0]['content'] }}" + tiny.TEMPLATE)
    assert len(refusing.prefix()) == 0
    content_first = encoder_of(template="{{ messages[0]['content'] }}<|im_end|>")
    assert len(content_first.prefix()) == 0
    broken = encoder_of(template="{{ 1 + 'x' }}")
    with pytest.raises(ValueError, match="chat template cannot be rendered"):
        broken.encode(["a"])
