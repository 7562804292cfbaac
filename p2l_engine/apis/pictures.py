"""How large the images of a request are, and how closely they are to be looked at."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

READ = 128 * 1024  # characters of Base64 in which an image's size must be found
# Markers of a JPEG's frame, which has its size: all from C0 to CF but the tables' (DHT, JPG, DAC).
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True, slots=True)
class Picture:
    """size: width and height in pixels; None where they are not known here, as of an address. low: whether a closer look was
    ruled out by ``detail: low``."""

    size: tuple[int, int] | None
    low: bool = False


def picture_of(source: object) -> Picture:
    """An image as any of the APIs writes it: an address or a data URL, or an object with one, or with Base64."""
    low = False
    if isinstance(source, dict):
        low = source.get("detail") == "low"
        given = next((source[name] for name in ("url", "image_url", "data") if isinstance(source.get(name), str)), None)
    else:
        given = source
    if not isinstance(given, str):
        return Picture(None, low)
    if given[:5].lower() == "data:":
        head, comma, given = given[: READ + 200].partition(",")
        if not comma or not head.lower().endswith(";base64"):
            return Picture(None, low)
    text = given[: READ - READ % 4]
    try:
        data = base64.b64decode(text[: len(text) - len(text) % 4])
    except (binascii.Error, ValueError):
        return Picture(None, low)
    return Picture(_size(data), low)


def _size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG, GIF, WebP or JPEG from its first bytes; None where they do not tell."""
    found = None
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        found = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    elif data[:6] in (b"GIF87a", b"GIF89a") and len(data) >= 10:
        found = int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        found = _of_webp(data)
    elif data[:2] == b"\xff\xd8":
        found = _of_jpeg(data)
    return found if found is not None and min(found) > 0 else None


def _of_webp(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def _of_jpeg(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a filler
            at += 1
        elif marker in FRAMES:
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
