"""How files are compressed, as their names say."""

from __future__ import annotations

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # endings and pyarrow's names


def compression_of(path: str) -> str | None:
    """gzip, zstd or None."""
    return next((name for ending, name in COMPRESSED.items() if path.lower().endswith(ending)), None)


def without_compression(path: str) -> str:
    """The path in lower case, without such an ending."""
    path = path.lower()
    return path.rpartition(".")[0] if compression_of(path) else path
