"""What images and audio cost: tokens by an image's size, prices of their own, and bounds that hold whatever is sent."""

from __future__ import annotations

import asyncio
import base64
import io
import wave
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.mock_provider import MockProvider
from p2l_engine.apis.api import Usage
from p2l_engine.apis.pictures import Picture, picture_of
from p2l_engine.apis.registry import APIS
from p2l_engine.apis.sounds import seconds_of
from p2l_engine.serve.image_tokens import ImageTokens
from p2l_engine.serve.model_entry import Model
from p2l_engine.serve.prices import Prices
from tests.support.serving import PRICES, config_for, serving

TILES = ImageTokens(tile=170, base=85)  # GPT-4o
PATCHES = ImageTokens(patch=1.62)  # GPT-4.1 mini
PIXELS = ImageTokens(pixels=750, most=1600)  # Claude
RULES = st.sampled_from([TILES, PATCHES, PIXELS, ImageTokens(tile=170, base=85, most=500), ImageTokens(most=7)])
PRICED = {"usd_per_m_in": 2.5, "usd_per_m_out": 10, "tokens_in": 10, "tokens_out": 10, "max_output": 1000}


@pytest.mark.parametrize(
    ("rule", "size", "low", "tokens"),
    [
        (TILES, (1024, 1024), False, 765),
        (TILES, (2048, 4096), False, 1105),
        (TILES, (4096, 8192), True, 85),
        (TILES, None, True, 85),
        (TILES, None, False, 85 + 8 * 170),
        (TILES, (512, 512), False, 255),
        (TILES, (2048, 768), False, 85 + 8 * 170),
        (TILES, (10**6, 1), False, 85 + 4 * 170),
        (PATCHES, (1024, 1024), False, 1659),  # 1,024 patches
        (PATCHES, (1800, 2400), False, 2353),  # 1,452
        (PATCHES, (2400, 1800), False, 2353),
        (PATCHES, (10**6, 10**6), False, 2465),  # 39 by 39: whole ones fit into both sides
        (PATCHES, None, False, 2489),
        (PIXELS, (1092, 1092), False, 1590),
        (PIXELS, (200, 200), False, 54),
        (PIXELS, (1568, 1568), False, 1600),
        (PIXELS, None, True, 1600),
    ],
)
def test_images_count_as_their_providers_document(rule, size, low, tokens):
    assert rule.of(Picture(size, low)) == tokens


@pytest.mark.slow
@given(RULES, st.tuples(st.integers(1, 10**7), st.integers(1, 10**7)) | st.none(), st.booleans())
def test_no_image_counts_more_than_the_most(rule, size, low):
    assert 1 <= rule.of(Picture(size, low)) <= rule.bound


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile": 170, "patch": 1}, "one of tile, patch and pixels"),
        ({"pixels": 750}, "expected most"),
        ({}, "expected most"),
        ({"base": 85, "patch": 1}, "expected a tile"),
        ({"tiles": 170}, "did you mean 'tile'"),
        ({"patch": 0}, "greater than 0"),
    ],
)
def test_rules_that_say_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ImageTokens(**fields)


def encoded(kind: str, size: tuple[int, int], **options: Any) -> str:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    written = io.BytesIO()
    image.new("RGBA" if kind in ("PNG", "WEBP") else "RGB", size).save(written, kind, **options)
    return base64.b64encode(written.getvalue()).decode()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("GIF", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"exif": b"Exif\0\0" + b"\xff\xc0" * 20_000, "icc_profile": b"x" * 30_000}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0x"}),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (37, 211), (1025, 513)])
def test_an_images_size_is_read_from_it(kind, options, size):
    data = encoded(kind, size, **options)
    url = f"data:image/{kind.lower()};base64,{data}"
    sources = [{"url": url, "detail": "low"}, url, {"type": "input_image", "image_url": url}, {"type": "base64", "data": data}]
    assert [picture_of(source) for source in sources] == [Picture(size, True), *[Picture(size)] * 3]


HEADS = [
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"GIF89a",
    b"RIFF\0\0\0\0WEBPVP8X",
    b"RIFF\0\0\0\0WEBPVP8 ",
    b"\xff\xd8\xff\xc0",
    b"\xff\xd8",
]


@pytest.mark.slow
@given(st.sampled_from(HEADS), st.binary(max_size=60), st.integers(0, 3), st.sampled_from(["", "=", "\n", "é"]))
def test_whatever_an_image_is_it_is_read_as_one_or_as_none(head, rest, lost, tail):
    text = base64.b64encode(head + rest).decode()
    for source in (
        text[: len(text) - lost] + tail,
        {"url": "data:image/png;base64," + text + tail},
        {"url": text},
        None,
        7,
        {},
    ):
        size = picture_of(source).size
        assert size is None or min(size) > 0


def body_with(source: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": source}]
    return {"model": "auto", "messages": [{"role": "user", "content": parts}], "max_tokens": 10}


def test_each_model_counts_images_its_own_way_and_its_bound_holds_for_any_size(tmp_path):
    """The size decides what an image is expected to cost; a hard limit does not believe it."""
    url = f"data:image/png;base64,{encoded('PNG', (64, 64))}"
    accepts = {"accepts": ["text", "image"]}
    models = {
        "large": accepts | {"image_tokens": {"tile": 170, "base": 85}},
        "medium": accepts | {"image_tokens": {"pixels": 750, "most": 1600}, "context": 1000},
        "small": accepts,
    }

    async def one() -> Any:
        async with MockProvider(PRICES) as provider:
            limits = {"limits": [{"amount": 100}], "store": str(tmp_path / "serve.sqlite")}
            async with serving(config_for(provider, models, **limits)) as server:
                found = []
                for source in ({"url": url}, {"url": url, "detail": "low"}, {"url": "https://example.com/a.png"}):
                    call = await server.service.call(APIS["chat"], body_with(source), {}, None, "chat")
                    await server.service.decide(call)
                    tokens = [call.bill.tokens_in(k) - call.bill.counted.total for k in range(3)]
                    found.append((tokens, [call.bill.most_tokens_in(k) for k in range(3)], call.mask.tolist()))
                return found

    sized, low, unknown = asyncio.run(one())
    assert [tokens for tokens, _, _ in (sized, low, unknown)] == [[255, 6, 1600], [85, 6, 1600], [1445, 1600, 1600]]
    assert sized[1] == low[1] == unknown[1]
    assert sized[1][0] >= 85 + 8 * 170
    assert sized[2] == [True, False, True]  # its window might not hold the largest image


def test_usage_is_billed_by_kind_as_it_is_reported():
    details = {"cached_tokens": 4, "audio_tokens": 60, "image_tokens": 10}
    usage = {
        "prompt_tokens": 100, "completion_tokens": 50, "prompt_tokens_details": details,
        "completion_tokens_details": {"audio_tokens": 40, "reasoning_tokens": 3},
    }  # fmt: skip
    assert APIS["chat"].usage({"usage": usage}) == Usage(100, 50, 4, reasoning=3, audio_in=60, image_in=10, audio_out=40)
    usage = {
        "input_tokens": 100, "output_tokens": 50, "input_tokens_details": details,
        "output_tokens_details": {"audio_tokens": 400},
    }  # fmt: skip
    found = APIS["responses"].usage({"usage": usage})
    assert found == Usage(100, 50, 4, audio_in=60, image_in=10, audio_out=50)  # never more than all
    prices = Prices(
        {"a": Model(**PRICED, usd_per_m_audio_in=40, usd_per_m_audio_out=80, usd_per_m_image_in=5, usd_per_m_cached=1)}
    )
    exact = Fraction(26 * 25, 10) + 4 * 1 + 60 * 40 + 10 * 5 + 50 * 80
    assert prices.cost(0, found) == exact / 10**6


def wav(seconds: float, rate: int, channels: int, width: int, chunk: bytes = b"") -> bytes:
    """A WAV file of silence; chunk: what stands before its format."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(width)
        writer.setframerate(rate)
        writer.writeframes(bytes(round(seconds * rate) * channels * width))
    data = file.getvalue()
    return data[:12] + chunk + data[12:]


@given(
    st.floats(0.05, 3),
    st.sampled_from([8000, 16000, 24000, 44100]),
    st.integers(1, 2),
    st.integers(1, 4),
    st.sampled_from([b"", b"JUNK\x04\0\0\0abcd", b"LIST\x03\0\0\0abc\0"]),
)
def test_a_wav_file_lasts_as_long_as_it_plays(seconds, rate, channels, width, chunk):
    data = wav(seconds, rate, channels, width, chunk)
    found = seconds_of({"data": base64.b64encode(data).decode(), "format": "wav"})
    assert found == pytest.approx(seconds, abs=0.02)  # of headers


@given(st.binary(max_size=80) | st.binary(max_size=40).map(lambda rest: b"RIFF1234WAVEfmt " + rest), st.integers(0, 3))
def test_whatever_audio_is_it_has_a_length(data, lost):
    found = seconds_of({"data": base64.b64encode(data).decode()[lost:]})
    assert 0 <= found <= 0.2
    for none in (None, {}, {"data": 5}, {"data": "\u00e9" * 8}, "x", {"data": ""}):
        assert seconds_of(none) == 0


def test_audio_is_expected_at_its_price():
    """Of two models alike, the one that hears for less takes it; expected is what an exact provider would bill."""
    dear = {**PRICED, "usd_per_m_audio_in": 40, "usd_per_m_audio_out": 80}
    prices = Prices({"dear": Model(**dear), "cheap": Model(**{**PRICED, "audio_tokens_per_s": 32})})
    data = base64.b64encode(wav(60, 8000, 1, 1)).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    asks = [
        APIS["chat"].ask({"model": "auto", "messages": [{"role": "user", "content": [part]}], "modalities": ["audio"]}),
        APIS["chat"].ask({"model": "auto", "messages": [{"role": "user", "content": [part, part]}]}),
        APIS["responses"].ask({"model": "auto", "input": [{"role": "user", "content": [part]}]}),
    ]
    zero, out = np.zeros(2), np.full(2, 50.0)
    for ask, minutes, spoken in zip(asks, (1, 2, 1), (True, False, False), strict=True):
        assert ask.sound == pytest.approx(60 * minutes, rel=1e-3)
        assert ask.spoken == spoken
        bills = [
            prices.cost(k, Usage(7 + n, 50, audio_in=n, audio_out=50 * spoken))
            for k, n in enumerate((600 * minutes, 1920 * minutes))
        ]
        np.testing.assert_allclose(prices.expected(7, zero, out, ask.sound, ask.spoken), [float(b) for b in bills], rtol=1e-3)


PRICE = st.decimals(0, 200, places=3)
COUNT = st.integers(0, 10**6)


@pytest.mark.slow
@given(st.tuples(*[PRICE] * 6), st.tuples(*[COUNT] * 6))
def test_a_cost_with_media_is_exact_and_never_beyond_the_worst_case(amounts, counts):
    names = (
        "usd_per_m_in",
        "usd_per_m_out",
        "usd_per_m_cached",
        "usd_per_m_audio_in",
        "usd_per_m_image_in",
        "usd_per_m_audio_out",
    )
    entry = {name: float(amount) for name, amount in zip(names, amounts, strict=True)}
    prices = Prices({"other": Model(cost=0.1), "a": Model(**{**PRICED, **entry, "max_output": None})})
    text, cached, audio, image, out, spoken = counts
    usage = Usage(text + audio + image, out + spoken, cached, audio_in=audio, image_in=image, audio_out=spoken)
    cached = min(cached, text)
    each = (text - cached, out, cached, audio, image, spoken)
    exact = sum(Fraction(repr(float(amount))) * n for amount, n in zip(amounts, each, strict=True)) / 10**6
    assert prices.cost(1, usage) == exact
    assert exact <= prices.worst(1, usage.tokens_in, usage.tokens_out, 1, audio=True, images=True)
    assert prices.is_free(1) == (not any(amounts))


@pytest.mark.parametrize(
    ("body", "audio"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "A", "format": "wav"}}]}
                ]
            },
            True,
        ),
        ({"messages": [{"role": "user", "content": "a"}], "modalities": ["text", "audio"], "audio": {"voice": "ash"}}, True),
        ({"messages": [{"role": "user", "content": "a"}]}, False),
    ],
)
def test_audio_is_reserved_and_estimated_at_its_price(body, audio):
    async def one() -> Any:
        dear = {"accepts": ["text", "audio"], "context": 1000, "usd_per_m_audio_in": 40, "usd_per_m_audio_out": 80}
        async with MockProvider(PRICES) as provider, serving(config_for(provider, {"small": dear})) as server:
            asked = {"model": "small", "max_tokens": 10, **body}
            return (await server.service.call(APIS["chat"], asked, {}, None, "chat")).bill

    bill = asyncio.run(one())
    k, bound = 2, bill.input_bound(2)
    per_in, per_out = (
        (Fraction(40), Fraction(80)) if audio else (Fraction(str(PRICES["small"][0])), Fraction(str(PRICES["small"][1])))
    )
    assert bill.worst(k) == (bound * per_in + 10 * per_out) / 10**6
    estimated = bill.estimated(k, 30, None, 0.1)
    assert bill.cost(k, estimated) == bill.worst(k)
    assert bill.estimated(k, 30, Usage(5, 10, audio_in=2), 0.1) == Usage(5, 10, audio_in=2)  # what is told, is believed
