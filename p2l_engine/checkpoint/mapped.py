"""Tensors in a file that processes map into memory and share, checked as a whole each time that it is opened.

The file: ``MAGIC`` in 24 bytes, the length of the header (8 bytes, little-endian), a SHA-256 (32 bytes), the header (JSON: the
key, and each tensor's dtype, shape and place), then the tensors. The header and each tensor fill whole pages, so that tensors
are aligned for any instruction. The SHA-256 is that of the header and, for each page of tensors, of the sum of its 64-bit words
modulo 2^64. That takes 0.1 s for a gigabyte in memory, a sixth of a hash of all bytes. Any changed word shows, and any page
that was lost, exchanged or written twice; what does not show is several changes within one page that leave its sum as it was.
It is no protection from an attacker.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2l_engine.tables.atomic import write_file

MAGIC = b"p2l-engine tensors 1\n"
PAGE = 4096
BEGIN = struct.Struct("<24sQ32s")

Bytes = npt.NDArray[np.uint8]


class DamagedFile(Exception):
    """A file that is not what ``write`` has written under this key; the message says why."""


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """The bytes of a file of these tensors, but for its header."""
    return sum(_pages(tensor.nbytes) * PAGE for tensor in tensors.values())


def write(path: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors on the CPU, atomically. Raises OSError."""
    arrays = {name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for name, tensor in tensors.items()}
    places, at = {}, 0
    for name, tensor in tensors.items():
        places[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), at]
        at += _pages(tensor.nbytes) * PAGE
    header = json.dumps({"key": key, "tensors": places}).encode()
    sums = np.concatenate([_sums(array) for array in arrays.values()])
    begin = BEGIN.pack(MAGIC, len(header), _digest(header, sums)) + header
    parts = [memoryview(begin), _padding(len(begin))]
    for array in arrays.values():
        parts += [array.data, _padding(array.nbytes)]
    write_file(path, parts)


def read(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a file, mapped: memory that all processes share. What is written into them stays in this process.

    Raises DamagedFile, FileNotFoundError, and OSError where it cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < PAGE or size % PAGE:
            raise DamagedFile(f"expected whole pages, found {size} bytes")
        mapped = np.memmap(file, np.uint8, "c")
    magic, length, digest = BEGIN.unpack(bytes(mapped[: BEGIN.size]))
    if magic.rstrip(b"\0") != MAGIC:
        raise DamagedFile("expected a file of tensors, found another")
    first = _pages(BEGIN.size + length) * PAGE
    header, data = bytes(mapped[BEGIN.size : BEGIN.size + length]), mapped[first:]
    if first > size or digest != _digest(header, _sums(data)):
        raise DamagedFile("its content is not what was written")
    about = json.loads(header)
    if about["key"] != key:
        raise DamagedFile(f"expected the key {key}, found {about['key']}")
    whole = torch.from_numpy(data)
    found = {}
    for name, (dtype, shape, at) in about["tensors"].items():
        kind = getattr(torch, dtype)
        found[name] = whole[at : at + prod(shape) * kind.itemsize].view(kind).view(shape)
    return found


def _digest(header: bytes, sums: npt.NDArray[np.int64]) -> bytes:
    return hashlib.sha256(header + sums.tobytes()).digest()


def _sums(data: Bytes) -> npt.NDArray[np.int64]:
    """The sum of each page's words [pages]; zeros fill the last page."""
    whole = data[: len(data) // PAGE * PAGE]
    found: npt.NDArray[np.int64] = whole.view(np.int64).reshape(-1, PAGE // 8).sum(1)
    if len(whole) == len(data):
        return found
    last = np.zeros(PAGE, np.uint8)
    last[: len(data) - len(whole)] = data[len(whole) :]
    return np.append(found, last.view(np.int64).sum())


def _pages(size: int) -> int:
    return -(-size // PAGE)


def _padding(size: int) -> memoryview:
    return memoryview(bytes(_pages(size) * PAGE - size))
