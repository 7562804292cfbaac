"""The engine on a GPU: against transformers, captured graphs against eager passes, and no compilation after the warm-up."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import subjects
from bench.peers.transformers import Transformers
from p2l_engine import Engine
from p2l_engine.backbone.head import Head, after_norm
from p2l_engine.backbone.packing import Packed
from p2l_engine.backbone.topics import Topics
from p2l_engine.backbone.words import words
from p2l_engine.engine.graphs import BUCKETS, MOST_PROMPTS, Graphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

CUDA = torch.device("cuda")


@pytest.fixture(scope="module", params=["smollm2-135m", "qwen2.5-0.5b"])
def pair(request):
    """An engine in bfloat16, warmed up, and transformers with the same weights."""
    loaded = subjects.checkpoint(request.param, 130, CUDA, torch.bfloat16)
    engine = Engine(loaded, "cuda")
    engine.warmup()
    return engine, Transformers(loaded, CUDA, torch.float32)


def test_theta_is_that_of_transformers(pair):
    engine, peer = pair
    texts = subjects.prompts(400, seed=1)
    theirs = peer.batched(texts, 8192)[:, :130]
    ours = engine.coefficients(texts).theta
    scale = theirs.std()
    assert np.abs(ours - theirs).mean() < 2e-2 * scale
    # Rounding may exchange two models that are almost equal, and of random ones many are: how good is the chosen one?
    chosen = theirs[np.arange(400), ours.argmax(1)]
    assert (theirs.max(1) - chosen < 5e-2 * scale).mean() >= 0.99


def same_as_eager(engine, prompts, graphs=None):
    """Whether a graph ran the prompts; if so, its outputs are those of an eager pass."""
    graphed = (graphs or engine._graphs).run(prompts)
    if graphed is None:
        return False
    with torch.inference_mode():
        eager = engine.outputs(engine.backbone(Packed.of(prompts, engine.backbone.prefix).to(CUDA))).cpu().numpy()
    # Products of other widths round otherwise: 0.4% of a deviation on average, 7% at most.
    np.testing.assert_allclose(graphed.outputs, eager, atol=0.15 * eager.std())
    assert np.abs(graphed.outputs - eager).mean() < 2e-2 * eager.std()
    return True


def test_a_graph_gives_what_an_eager_pass_gives(pair, rng):
    engine, _ = pair
    prefix = engine.backbone.prefix

    def prompts(*lengths):
        return [np.concatenate([prefix, rng.integers(0, 8000, own)]).astype(np.int32) for own in lengths]

    longest = max(b.longest for b in BUCKETS)
    lengths = sorted({1, 2, 3, *(b.longest + d for b in BUCKETS for d in (-1, 0, 1))})
    for own in lengths:
        assert same_as_eager(engine, prompts(own)) == (own <= longest)
    for b in BUCKETS:
        most = b.prompts - 1
        for n in {1, 2, most // 2, most} - {0}:
            each = min(b.tokens // n, b.longest)
            assert same_as_eager(engine, prompts(*[each] * n))
            assert same_as_eager(engine, prompts(*rng.integers(1, each + 1, n)))
    assert same_as_eager(engine, prompts(*[1] * MOST_PROMPTS))
    assert not same_as_eager(engine, prompts(*[1] * (MOST_PROMPTS + 1)))
    assert not same_as_eager(engine, prompts(1000, 1000, 1000, 1000, 97))
    for own in (1, 5, longest - len(prefix)):  # not behind the prefix
        ids = np.arange(own + len(prefix), dtype=np.int32)
        assert engine._graphs.run([ids]) is None
        assert engine._graphs.run([*prompts(7), ids]) is None
        assert np.isfinite(engine.forward([ids])).all()


def test_graphs_without_a_shared_prefix(pair, rng):
    engine, _ = pair
    decoder = engine.backbone
    prefix, kv = decoder.prefix, decoder.prefix_kv
    decoder.share(None)
    try:
        graphs = Graphs(lambda packed: engine.outputs(decoder(packed)), None, CUDA, decoder.rope(0))
        for lengths in ([1], [5, 5], [64], [3, 30, 300], [1] * MOST_PROMPTS):
            assert same_as_eager(engine, [rng.integers(0, 8000, n).astype(np.int32) for n in lengths], graphs)
    finally:
        decoder.prefix, decoder.prefix_kv = prefix, kv  # the tensors that the engine's graphs read


def test_nothing_compiles_after_the_warm_up(pair, caplog):
    engine, _ = pair
    with caplog.at_level(logging.WARNING):
        for count in (1, 2, 3, 15, 16, 17, 32, 100, 1000):
            engine.coefficients(subjects.prompts(count, seed=count))
    assert "Triton compiled" not in caplog.text


def test_a_shared_prefix_changes_nothing(pair):
    engine, _ = pair
    texts = subjects.prompts(100, seed=2)
    decoder, shared = engine.backbone, engine.coefficients(texts).theta
    prefix, kv = decoder.prefix, decoder.prefix_kv
    assert len(prefix) >= 16
    decoder.share(None)
    try:
        alone = engine.coefficients(texts).theta
    finally:
        decoder.prefix, decoder.prefix_kv = prefix, kv  # the tensors that the graphs read
    assert np.abs(shared - alone).mean() < 2e-2 * alone.std()


def test_many_threads_share_a_card(pair):
    engine, _ = pair
    texts = subjects.prompts(64, seed=3)
    alone = np.concatenate([engine.coefficients([text]).theta for text in texts])
    with ThreadPoolExecutor(16) as pool:
        together = np.concatenate([c.theta for c in pool.map(lambda text: engine.coefficients([text]), texts)])
    np.testing.assert_allclose(together, alone, atol=0.15 * alone.std())
    assert np.abs(together - alone).mean() < 2e-2 * alone.std()


def test_the_largest_batches_fit_on_a_small_card():
    """7B in bfloat16, batches of 32,768 tokens: at most 24 GiB once it is loaded (its random weights are made on the card)."""
    engine = Engine(subjects.checkpoint("qwen2.5-7b", 130, CUDA, torch.bfloat16), "cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine.coefficients(["word " * 300] * 120)
    assert torch.cuda.max_memory_allocated() < 24 * 2**30


def test_topics_and_words_are_those_of_the_definition():
    loaded = subjects.checkpoint("tiny", 20, CUDA, torch.bfloat16)
    width, names = int(loaded.config.hidden_size), tuple("abc")
    draw = torch.Generator().manual_seed(0)
    weight, bias, of_words, rows = (torch.randn(n, generator=draw) for n in ((3, width), (3,), (3, width), (21, width + 3)))
    topics = Topics(weight, bias, names, 20 * of_words)
    engine = Engine(replace(loaded, topics=topics, head=Head(rows, torch.zeros(21), 20)), "cuda")
    engine.warmup()
    texts = subjects.prompts(60, seed=2)
    for some, (states, outputs) in engine.stream(texts, lambda states, _: (states, engine.outputs(states))):
        tokens = engine.encoder.encode([texts[i] for i in some])
        hidden, bags = torch.from_numpy(states).split([width, width], 1)
        torch.testing.assert_close(bags, words(tokens, engine.backbone.embedding.cpu()), rtol=1e-5, atol=1e-6)
        read = topics(after_norm(hidden, engine.backbone.norm.cpu(), engine.backbone.eps), bags)
        np.testing.assert_allclose(outputs, (read.double() @ rows.double().T).numpy(), rtol=1e-2, atol=1e-2)
    assert np.isfinite(engine.coefficients(texts[:1]).theta).all()
