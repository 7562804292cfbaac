"""The prefix cache: the same prompts computed without it, exact bytes at every step, many threads, templates that rewrite."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config

from p2l_engine import Engine, checkpoint
from p2l_engine.engine.batcher import Batcher
from p2l_engine.engine.prefix_cache import LEAST_REUSED, checked_bytes
from p2l_engine.engine.prefix_tree import PrefixTree
from p2l_engine.learning.hidden import hidden_states
from p2l_engine.prompts.encode import PromptEncoder
from p2l_engine.prompts.tokenizer import TransformersTokenizer
from tests.support import tiny
from tests.support.cases import slow_but

MUCH = 2**26
BRIEF = "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}"  # a prefix that all prompts share
PLAIN = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
WORDS = ("moon", "rain", "17 * 23", "why?", "Schreibe", "ein Gedicht", "\n\n", "def f(x):", "é", "<|cls|>", "中")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return checkpoint.load(tiny.write(tmp_path_factory.mktemp("chats") / "tiny", template=BRIEF + tiny.TEMPLATE))


def engine_of(loaded, most=MUCH, dtype="float32", **options):
    return Engine(loaded, "cpu", dtype, prefix_cache_bytes=most, **options)


def chat(rng, turns, words=8):
    return [" ".join(rng.choice(WORDS, int(rng.integers(1, words)))) for _ in range(turns)]


def nodes(tree):
    found, waiting = [], [tree._root]
    while waiting:
        node = waiting.pop()
        for first, child in node.children.items():
            assert child.parent is node
            assert int(child.tokens[0]) == first
            assert child.kv.shape[1] == len(child.tokens)
            found.append(child)
            waiting.append(child)
    return found


def assert_exact(tree):
    """Bytes are those of the nodes, each in memory of its own, within the bound; and who uses a node uses those above it."""
    live = nodes(tree)
    assert set(live) == set(tree._order)
    assert tree.bytes == sum(node.kv.untyped_storage().nbytes() + node.tokens.nbytes for node in live) <= tree.most
    assert all(node.tokens.base is None for node in live)
    place = {node: i for i, node in enumerate(tree._order)}
    assert all(place[node] < place[child_of] for node in live if (child_of := node.parent) is not tree._root)


# The tree


def kv_of(tokens, start=0, layers=2):
    """Keys and values that say which token they are of, at which place, behind which tokens."""
    sums = np.cumsum(np.asarray(tokens) * (1 + np.arange(len(tokens))))[start:]
    return torch.from_numpy(sums.astype(np.float32))[None, :, None, None, None].repeat(layers, 1, 2, 1, 3).contiguous()


EACH = kv_of([0]).nbytes + 4  # bytes of a token
SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@pytest.mark.slow
@given(st.lists(st.tuples(SEQUENCES, st.booleans()), max_size=40), st.integers(1, 30))
def test_a_tree_knows_what_was_added_last(steps, most):
    tree, added = PrefixTree(most * EACH), list[list[int]]()
    for sequence, adds in steps:
        ids = np.array(sequence, np.int32)
        match = tree.find(ids)
        assert match.tokens == tree.known(ids) == sum(n for _, n in match.parts)
        if match.tokens:
            found = torch.cat([kv[:, :n] for kv, n in match.parts], 1)
            torch.testing.assert_close(found, kv_of(ids)[:, : match.tokens], rtol=0, atol=0)
        longest = max((in_common(sequence, other) for other in added), default=0)
        assert match.tokens == longest if tree.evictions == 0 else match.tokens <= longest
        if adds and match.tokens < len(ids):
            tree.add(ids, match.tokens, kv_of(ids, match.tokens))
        if adds and len(ids) <= most:
            assert tree.known(ids) == len(ids)
            added.append(sequence)
        if tree.evictions == 0:
            assert tree.bytes == EACH * len({tuple(other[:n]) for other in added for n in range(1, len(other) + 1)})
        assert_exact(tree)


def in_common(one, other):
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_the_least_recently_used_go_first():
    tree = PrefixTree(10 * EACH)
    chats = [np.array([first, *range(10, 13)], np.int32) for first in range(3)]
    for ids in chats[:2]:
        tree.add(ids, 0, kv_of(ids))
    tree.find(chats[0])
    tree.add(chats[2], 0, kv_of(chats[2]))  # 12 tokens with it
    assert [tree.known(ids) for ids in chats] == [4, 0, 4]
    assert (tree.evictions, tree.bytes) == (1, 8 * EACH)
    longer = np.concatenate([chats[0], [7, 8]]).astype(np.int32)
    tree.add(longer, 4, kv_of(longer, 4))
    assert [tree.known(ids) for ids in (longer, chats[2])] == [6, 4]  # full
    other = np.array([*chats[0][:2], 9], np.int32)  # shares two tokens with the first, which splits
    tree.add(other, 2, kv_of(other, 2))
    assert [tree.known(ids) for ids in (other, longer, chats[2])] == [3, 6, 0]
    assert_exact(tree)


def test_a_gap_or_too_much_is_not_added():
    tree = PrefixTree(5 * EACH)
    ids = np.arange(1, 6, dtype=np.int32)
    tree.add(ids, 3, kv_of(ids, 3))  # what was before has gone meanwhile
    assert tree.bytes == 0
    tree.add(ids, 0, kv_of(ids))
    longer = np.arange(1, 7, dtype=np.int32)
    tree.add(longer, 5, kv_of(longer, 5))
    assert (tree.known(longer), tree.evictions) == (5, 0)  # nothing went for what never fits
    found = tree.find(ids)
    other = np.arange(5, 10, dtype=np.int32)
    tree.add(other, 0, kv_of(other))
    assert tree.known(ids) == 0
    torch.testing.assert_close(found.parts[0][0], kv_of(ids))  # who has found it may read on
    assert_exact(tree)


def test_a_child_process_begins_empty():
    tree, ids = PrefixTree(100 * EACH), np.arange(1, 6, dtype=np.int32)
    tree.add(ids, 0, kv_of(ids))
    with tree._lock, warnings.catch_warnings():  # as if another thread were within, which the child does not have
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks while there are threads
        child = os.fork()
        if not child:
            os._exit(tree.known(ids) + tree.bytes)
    assert os.waitpid(child, 0)[1] == 0
    assert tree.known(ids) == 5


# Engines


def test_a_turn_computes_its_own_tokens_only(loaded, rng):
    cached, plain, turns = engine_of(loaded), engine_of(loaded, 0), chat(rng, 12)
    assert plain.prefix_cache is None
    cache, shared, known = cached.prefix_cache, len(cached.backbone.prefix), 0
    for n in range(1, 13):
        (ids,) = cached.encoder.encode([turns[:n]])
        before = cache.saved
        np.testing.assert_allclose(cached.forward([ids]), plain.forward([ids]), atol=1e-4)
        assert cache.saved - before == known
        known = len(ids) - 1 - shared  # the next turn computes all but these: the CLS token is another's place
        layers, _, kv_heads, size = 3, 2, 2, 8
        assert cache.bytes == known * (layers * 2 * kv_heads * size * 4 + 4)
    assert (cache.hits, cache.misses, cache.evictions) == (11, 1, 0)
    np.testing.assert_allclose(cached.forward([ids]), plain.forward([ids]), atol=1e-4)  # the same again: its CLS token alone
    cached.warmup()
    assert (cache.hits, cache.misses, cache.saved, cache.bytes) == (0, 0, 0, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.slow
def test_200_random_chats_under_a_tiny_budget(loaded, dtype, rng):
    """Chats that go on, that begin as others do, that are asked again, alone and together."""
    tokens = 3 * 2 * 2 * 8 * (2 if dtype == "bfloat16" else 4) + 4  # bytes of one
    cached, exact = engine_of(loaded, 1000 * tokens, dtype), engine_of(loaded, 0)
    plain = exact if dtype == "float32" else engine_of(loaded, 0, dtype)
    cache, chats, asked = cached.prefix_cache, [chat(rng, 1) for _ in range(200)], 0
    off, usual = [], []
    while asked < 800:
        recent = asked // 4  # chats come and go
        some = [(recent + int(i)) % 200 for i in rng.choice(8, int(rng.integers(1, 4)), replace=False)]
        for i in some:
            kind = rng.integers(8)
            if kind < 5:
                chats[i] = [*chats[i], *chat(rng, 1)]
            if kind == 5:  # goes on otherwise from an earlier turn
                chats[i] = [*chats[i][: int(rng.integers(len(chats[i])))], *chat(rng, 1)]
            if kind == 6:
                chats[i] = list(chats[some[0]])
        prompts, asked = [chats[i] for i in some], asked + len(some)
        one, other, right = (engine.coefficients(prompts).theta for engine in (cached, plain, exact))
        off.append(np.abs(one - right).max())
        usual.append(np.abs(other - right).max())
        if dtype.startswith("int"):  # a row's products depend on nothing else
            np.testing.assert_array_equal(one, other)
        assert_exact(cache._tree)
    assert max(off) < (1e-4 if dtype == "float32" else 2 * max(usual))
    assert cache.hits + cache.misses == asked
    assert cache.evictions > 100
    assert cache.hits > 400


def test_prompts_of_a_batch_use_what_is_known(loaded, rng):
    cached, plain = engine_of(loaded), engine_of(loaded, 0)
    chats = [chat(rng, 3, 20) for _ in range(6)]
    chats += [[*chats[0][:2], "another"], ["short"], chats[1], ["x" * 900]]
    cached.coefficients([each[:2] for each in chats[:5]])
    before = cached.prefix_cache.saved
    np.testing.assert_allclose(cached.coefficients(chats).theta, plain.coefficients(chats).theta, atol=1e-4)
    encode, shared = cached.encoder.encode, len(cached.backbone.prefix)
    known = [len(ids) - 1 - shared for ids in encode([each[:2] for each in chats[:5]])]
    assert cached.prefix_cache.saved - before >= sum(known) + known[0] + known[1]
    # What is known counts as an eighth in the tokens of a batch, as the template's prefix does.
    (ids,) = encode([[*chats[2], "more"]])
    own = len(ids) - len(encode([chats[2]])[0]) + 1
    assert cached.prefix_cache.weight(ids) == pytest.approx(own + (len(ids) - own) // 8, abs=1)
    np.testing.assert_allclose(cached.coefficients(chats).theta, plain.coefficients(chats).theta, atol=1e-4)
    assert_exact(cached.prefix_cache._tree)


def test_a_long_turn_behind_a_short_chat(loaded, rng):
    """More own tokens than known ones, and fewer: attention is computed in another way."""
    cached, plain = engine_of(loaded), engine_of(loaded, 0)
    turns = ["a" * 100, "b" * 300, "c" * 200, "d" * 900]
    for n in range(1, 5):
        np.testing.assert_allclose(cached.coefficients([turns[:n]]).theta, plain.coefficients([turns[:n]]).theta, atol=1e-4)
    assert cached.prefix_cache.hits == 3


@pytest.mark.parametrize("template", [BRIEF + tiny.TEMPLATE, PLAIN])
def test_truncated_prompts_hit_nothing_wrong(template, tmp_path):
    found = checkpoint.load(tiny.write(tmp_path, template=template))
    cached, plain = engine_of(found, max_tokens=300), engine_of(found, 0, max_tokens=300)
    turns = ["a" * 40] * 12  # alike, so that what is left of a truncated chat looks as it did
    for n in range(1, 13):
        (ids,) = cached.encoder.encode([turns[:n]])
        hits, kept = cached.prefix_cache.hits, cached.prefix_cache.bytes
        np.testing.assert_allclose(cached.forward([ids]), plain.forward([ids]), atol=1e-4)
        whole = len(ids) < 300
        assert (cached.prefix_cache.bytes > kept) == whole
        if template != PLAIN:  # there what is left may begin with the letter that the chat began with
            assert (cached.prefix_cache.hits > hits) == (whole and n > 1)
    assert len(ids) == 300
    assert_exact(cached.prefix_cache._tree)


@pytest.mark.parametrize("family", slow_but(("llama",), ("llama", "qwen2")))
def test_without_a_shared_prefix(family, tmp_path, rng):
    found = checkpoint.load(tiny.write(tmp_path, tiny.config(family), template=PLAIN))
    cached, plain, turns = engine_of(found), engine_of(found, 0), chat(rng, 5)
    assert cached.backbone.prefix is None
    for n in range(1, 6):
        np.testing.assert_allclose(cached.coefficients([turns[:n]]).theta, plain.coefficients([turns[:n]]).theta, atol=1e-4)
    assert cached.prefix_cache.hits >= 3
    few = [turns[0][0]], [turns[0][0], "other"]  # too few tokens in common to be worth it
    hits = cached.prefix_cache.hits
    for prompt in few:
        assert len(cached.encoder.encode([prompt])[0]) <= LEAST_REUSED
        np.testing.assert_allclose(cached.coefficients([prompt]).theta, plain.coefficients([prompt]).theta, atol=1e-4)
    assert cached.prefix_cache.hits == hits


def test_one_layer_splits_without_sharing_memory(tmp_path, rng):
    found = checkpoint.load(tiny.write(tmp_path, tiny.config(num_hidden_layers=1)))
    cached = engine_of(found)
    cached.coefficients([["a" * 50, "b" * 50], ["a" * 50, "c" * 50]])
    assert_exact(cached.prefix_cache._tree)
    assert len(nodes(cached.prefix_cache._tree)) == 3


def test_hidden_states_use_what_is_known(loaded, rng):
    """As a server that learns computes prompts."""
    cached, plain, turns = engine_of(loaded), engine_of(loaded, 0), chat(rng, 4)
    for n in range(1, 5):
        np.testing.assert_allclose(hidden_states(cached, [turns[:n]]), hidden_states(plain, [turns[:n]]), atol=1e-4)
    assert cached.prefix_cache.hits == 3


def test_outputs_of_chunks_do_not_depend_on_what_was_asked(loaded, rng):
    cached, prompts = engine_of(loaded), [chat(rng, 3) for _ in range(5)]
    (before,) = cached.outputs_of([prompts])
    cached.coefficients(prompts)
    (after,) = cached.outputs_of([prompts])
    np.testing.assert_array_equal(after.outputs, before.outputs)
    assert after.tokens == before.tokens


def test_threads_on_one_engine(loaded, rng):
    cached, plain = engine_of(loaded, 60_000), engine_of(loaded, 0)
    chats = [chat(rng, 6) for _ in range(4)]
    expected = [[plain.coefficients([turns[:n]]).theta[0] for n in range(1, 7)] for turns in chats]
    begin = threading.Barrier(8)

    def ask(who):
        begin.wait()
        for n in range(1, 7):  # two threads for each chat
            theta = cached.coefficients([chats[who % 4][:n]]).theta[0]
            np.testing.assert_allclose(theta, expected[who % 4][n - 1], atol=1e-4)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
    cache = cached.prefix_cache
    assert cache.hits + cache.misses == 48
    assert cache.evictions > 0
    assert_exact(cache._tree)


def test_callers_who_share_a_batch_share_what_is_known(loaded, rng):
    cached, plain = engine_of(loaded), engine_of(loaded, 0)
    chats = [chat(rng, 4, 20) for _ in range(8)]
    for turns in chats:
        cached.coefficients([turns[:3]])
    batcher = Batcher(cached)
    with batcher._engine_free:  # all wait for the engine: one batch
        waiting = [batcher.submit(turns, lambda c: c.theta[0]) for turns in chats]
    found = [each.result(60) for each in waiting]
    batcher.close()
    np.testing.assert_allclose(found, plain.coefficients(chats).theta, atol=1e-4)
    assert cached.prefix_cache.hits == 8


def test_a_later_prefix_of_the_decoder_changes_nothing(loaded, rng):
    cached, plain, turns = engine_of(loaded), engine_of(loaded, 0), chat(rng, 3)
    cached.coefficients([turns[:2]])
    cached.backbone.share(None)
    np.testing.assert_allclose(cached.coefficients([turns]).theta, plain.coefficients([turns]).theta, atol=1e-4)
    assert cached.prefix_cache.hits == 1


# Templates and settings


LAST_MARKED = "{% for m in messages %}{{ (loop.last and 'now: ' or 'then: ') + m['content'] + '<|im_end|>' }}{% endfor %}"
COUNTED = "{{ messages | length }} turns: " + tiny.TEMPLATE
NEWEST_FIRST = "{% for m in messages | reverse %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
LAST_TWO = "{% for m in messages[-2:] %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
    "{{ '[INST]' + m['content'] + '[/INST]' }}{% endfor %}"
)
CLOSED = tiny.TEMPLATE + "{{ 'The end.' }}"


@pytest.mark.parametrize("template", [LAST_MARKED, COUNTED, NEWEST_FIRST, LAST_TWO])
def test_templates_that_rewrite_history_are_not_cached(template, tmp_path, caplog):
    found = checkpoint.load(tiny.write(tmp_path, template=template))
    for most in (MUCH, "auto"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            engine = engine_of(found, most)
        assert engine.prefix_cache is None
        assert [record.message for record in caplog.records if "rewrites earlier turns" in record.message]
        caplog.clear()
        engine.coefficients([["a", "b"], ["a", "b", "c"]])
        assert not caplog.records  # said once


@pytest.mark.parametrize("template", [tiny.TEMPLATE, ALTERNATING, CLOSED, BRIEF + tiny.TEMPLATE])
def test_templates_that_append_are_cached(template, tmp_path, rng):
    found = checkpoint.load(tiny.write(tmp_path, template=template))
    cached, plain, turns = engine_of(found), engine_of(found, 0), chat(rng, 4, 20)
    for n in range(1, 5):
        np.testing.assert_allclose(cached.coefficients([turns[:n]]).theta, plain.coefficients([turns[:n]]).theta, atol=1e-4)
    assert cached.prefix_cache.hits == 3


def test_a_template_that_refuses_turns_appends_nothing():
    template = "{% if 'The' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + tiny.TEMPLATE
    assert not PromptEncoder(TransformersTokenizer(tiny.tokenizer(template=template))).appends()


@pytest.mark.parametrize(
    ("most", "message"),
    [
        (-1, "at least 0, got -1"),
        (True, "got True"),
        (1.5, "got 1.5"),
        ("512 MB", "or 'auto', got '512 MB'"),
        (None, "got None"),
    ],
)
def test_bytes_that_cannot_be_used_are_refused_by_name(loaded, most, message):
    with pytest.raises(ValueError, match=rf"prefix_cache_bytes: expected .*{message}"):
        engine_of(loaded, most)
    with pytest.raises(ValueError, match="prefix_cache_bytes"):
        Engine.from_pretrained("no-such-folder", "cpu", prefix_cache_bytes=most)  # before the checkpoint is read


def test_a_gpu_is_refused_by_name():
    with pytest.raises(
        ValueError, match="prefix_cache_bytes: expected 0 on cuda, got 1000: keys and values are kept on a CPU alone"
    ):
        checked_bytes(1000, torch.device("cuda"))
    assert checked_bytes(0, torch.device("cuda")) == 0


@pytest.mark.slow
def test_decoders_of_transformers_are_refused_by_name(tmp_path):
    found = checkpoint.load(tiny.write(tmp_path, GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=300, n_positions=1024)))
    with pytest.raises(ValueError, match="prefix_cache_bytes: expected 0 for the backbone 'transformers gpt2', got 1000"):
        engine_of(found, 1000)
    assert engine_of(found, "auto").prefix_cache is None


def test_auto_keeps_512_mib(loaded):
    assert engine_of(loaded, "auto").prefix_cache._tree.most == 2**29
