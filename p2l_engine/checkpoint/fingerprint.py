"""Fingerprints of checkpoints: a run is resumed only with the same weights, and figures are shown only for their own head."""

from __future__ import annotations

import hashlib
from pathlib import Path

from p2l_engine.backbone.head import Head

SAMPLES, SAMPLE = 64, 1 << 16  # pieces of a large file, evenly spread, and bytes of each
NOT_COMPUTED_WITH = ("README.md", "evaluation.json")


def of_folder(folder: Path) -> dict[str, str]:
    """A fingerprint for each file of a checkpoint that its coefficients may depend on, by name."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    return {file.name: of_file(file) for file in files if file.name not in NOT_COMPUTED_WITH}


def of_checkpoint(folder: Path, base: Path) -> dict[str, str]:
    """``of_folder``, and of an adapter's backbone in the folder ``base``, whose names start with "backbone/"."""
    of_base = {} if base == folder else of_folder(base)
    return of_folder(folder) | {f"backbone/{name}": found for name, found in of_base.items()}


def of_backbone(folder: Path) -> str:
    """One fingerprint for a decoder's config and weights."""
    files = [file for file in (*sorted(folder.glob("*.safetensors")), folder / "config.json") if file.is_file()]
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.name} {of_file(file)}\n".encode())
    return found.hexdigest()


def of_weights(folder: Path, base: Path) -> str:
    """One fingerprint for what the decoder's weights of a checkpoint depend on, an adapter's backbone in the folder ``base``
    among it: ``of_file`` of each file, its inode, and when it was last written or changed in any other way.

    It takes milliseconds, and says nothing of the same files elsewhere: a copy has another one.
    """
    found = hashlib.sha256()
    for place in dict.fromkeys((folder, base)):
        settings = [place / name for name in ("config.json", "adapter_config.json", "model.safetensors.index.json")]
        for file in (*sorted(place.glob("*.safetensors")), *(each for each in settings if each.is_file())):
            about = file.stat()
            times = f"{about.st_ino} {about.st_mtime_ns} {about.st_ctime_ns}"
            found.update(f"{file.name} {times} {of_file(file)}\n".encode())
        found.update(b"\n")
    return found.hexdigest()


def of_file(file: Path) -> str:
    """SHA-256 of a file's size and contents; of a sample of the contents above 4 MiB: hashing gigabytes takes too long."""
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        if size <= SAMPLES * SAMPLE:
            found.update(opened.read())
            return found.hexdigest()
        for piece in range(SAMPLES):
            opened.seek(max(0, size - SAMPLE) * piece // (SAMPLES - 1))
            found.update(opened.read(SAMPLE))
    return found.hexdigest()


def of_head(head: Head) -> str:
    """SHA-256 of the head's weights; the figures of an evaluation carry it."""
    found = hashlib.sha256()
    for part in (head.weight, head.bias):
        found.update(part.cpu().numpy().tobytes())
    return found.hexdigest()
