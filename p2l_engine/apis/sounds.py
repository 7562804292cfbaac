"""How long the audio of a request lasts."""

from __future__ import annotations

import base64
import binascii

HEAD = 1024  # characters of Base64 in which a WAV file must say how many bytes a second has
COMPRESSED = 16_000  # bytes a second of audio whose rate is not read here: 128 kbit/s, as MP3 often has
SLOWEST = 1_000  # bytes a second: no usual audio has fewer


def seconds_of(source: object) -> float:
    """Seconds of audio as OpenAI's APIs write it: an object with Base64 under ``data``. WAV files say how long they last,
    others are taken to have 128 kbit/s; 0 where there is no audio."""
    data = source.get("data") if isinstance(source, dict) else None
    if not isinstance(data, str):
        return 0.0
    try:
        head = base64.b64decode(data[: min(HEAD, len(data) - len(data) % 4)])
    except (binascii.Error, ValueError):
        return 0.0
    return len(data) * 3 / 4 / _bytes_per_second(head)


def _bytes_per_second(head: bytes) -> int:
    """See https://www.mmsp.ece.mcgill.ca/Documents/AudioFormats/WAVE/WAVE.html."""
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return COMPRESSED
    at = 12
    while at + 20 <= len(head):
        if head[at : at + 4] == b"fmt ":
            return max(int.from_bytes(head[at + 16 : at + 20], "little"), SLOWEST)
        size = int.from_bytes(head[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return COMPRESSED
