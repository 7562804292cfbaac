"""Products of a decoder's linear layers on CPU tensors, by weights that are packed once: float32, bfloat16, or int8 weights
under float32 rows.

The native core has the products where it is faster than torch: float32 with AVX2 and AVX-512, bfloat16 with AVX512-BF16 but not
beside AMX, which torch uses; int8 everywhere. Reference implementation: ``Panels.plain``, a matrix for torch's product.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from p2l_engine.native.binding import lib, tensor, threads

PANEL = 32  # columns whose weights lie together
GROUP = 192  # values of a row that int8 products scale together
OFFSET = 128  # packed int8 weights are stored as weight + OFFSET
PRODUCTS_PER_THREAD = 1 << 19  # below this a thread costs more than it saves
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
LAYOUT = 2  # of what ``Panels.tensors`` returns: count it up with each change, so that files of earlier ones are made anew


def level(dtype: torch.dtype) -> int:
    """The best instruction set of the products of weights of this dtype: see p2l_native.h; -1 where torch's are faster."""
    if dtype == torch.int8:
        return int(lib.p2l_int8_level())
    if dtype not in DTYPES or (dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()):
        return -1
    return int(lib.p2l_linear_level(dtype == torch.bfloat16)) or -1


class Panels:
    """The weight of a linear layer [out, in] in panels of 32 outputs, and its bias [out] or None. Not to be changed.

    data: float32 [panels, in, 32], bfloat16 [panels, in / 2, 32, 2], or uint8 [panels, in / 4, 32, 4] (in, rounded up to a
    multiple of 4), which are int8 weights plus OFFSET, for ``scale`` [out] float32. columns, depth: out and in. level: of the
    instruction set.
    """

    __slots__ = ("bias", "columns", "data", "depth", "level", "pointers", "scale")

    def __init__(self, data: Tensor, columns: int, depth: int, bias: Tensor | None, scale: Tensor | None, level: int) -> None:
        self.data, self.columns, self.depth = data, columns, depth
        self.bias, self.scale, self.level = bias, scale, level
        self.pointers = (tensor("void", data), tensor("float", scale), tensor("void", bias))

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, at_level: int | None = None) -> Panels:
        """Packs a weight [out, in]. dtype: float32, bfloat16, or int8 (rounded to 8 bits, with one scale for each output).
        Raises ValueError for another dtype, and for bfloat16 with an odd number of inputs."""
        chosen = level(dtype) if at_level is None else at_level
        columns, depth = weight.shape
        together = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}.get(dtype)
        if together is None or (dtype == torch.bfloat16 and depth % 2):
            raise ValueError(f"weight: expected float32, int8, or bfloat16 with even inputs, got {dtype} and {depth} inputs")
        scale = None
        if dtype == torch.int8:
            wide = weight.float()
            scale = wide.abs().amax(1) / 127
            values = (wide / torch.where(scale > 0, scale, 1.0)[:, None]).round_().clamp_(-127, 127).to(torch.int16)
            packed = (values + OFFSET).to(torch.uint8)
        else:
            packed = weight.to(dtype)
        bias = None if bias is None else bias.to(torch.float32 if dtype == torch.int8 else dtype).contiguous()
        packed = F.pad(packed, (0, -depth % together, 0, -columns % PANEL))
        data = packed.view(-1, PANEL, packed.shape[1] // together, together).transpose(1, 2).contiguous()
        return cls(data, columns, depth, bias, scale, chosen)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Panels:
        """From what ``tensors`` returned."""
        columns, depth, level = map(int, tensors["sizes"])
        return cls(tensors["data"], columns, depth, tensors.get("bias"), tensors.get("scale"), level)

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors, without those that it does not have."""
        sizes = torch.tensor([self.columns, self.depth, self.level])
        found = {"data": self.data, "bias": self.bias, "scale": self.scale, "sizes": sizes}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def part(self, first: int, last: int) -> Panels:
        """The outputs first to last; a view where both are multiples of 32 or ends."""
        bias, scale = (None if each is None else each[first:last] for each in (self.bias, self.scale))
        if first % PANEL == 0 and (last % PANEL == 0 or last == self.columns):
            data = self.data[first // PANEL : -(-last // PANEL)]
        else:
            rows = F.pad(self._rows()[first:last], (0, 0, 0, 0, 0, (first - last) % PANEL))
            data = rows.view(-1, PANEL, *rows.shape[1:]).transpose(1, 2).contiguous()
        return Panels(data, last - first, self.depth, bias, scale, self.level)

    def plain(self) -> Tensor:
        """The weight [out, in] that the products use, as float32."""
        rows = self._rows().flatten(1)[:, : self.depth].float()
        return rows if self.scale is None else (rows - OFFSET) * self.scale[:, None]

    def scratch(self, rows: int) -> int:
        """The bytes that ``multiply`` needs beside its result."""
        if self.scale is None:
            return 0
        size = 2 if self.level == 1 else 1  # of a quantised value, in bytes
        return rows * (8 * -(-self.depth // GROUP) + size * -(-self.depth // 4) * 4)

    def _rows(self) -> Tensor:
        """[out, in / together, together]"""
        return self.data.transpose(1, 2).flatten(0, 1)[: self.columns]


def multiply(x: Tensor, weight: Panels, out: Tensor, scratch: Tensor | None = None) -> Tensor:
    """out [T, out] = x [T, in] times the weight, plus its bias. Sums do not depend on the number of rows or threads.

    x and out: contiguous, bfloat16 for bfloat16 weights, else float32. scratch: uint8 of ``weight.scratch(T)`` bytes, for int8
    weights. Raises ValueError for other dtypes, shapes, strides and devices.
    """
    dtype = torch.bfloat16 if weight.data.dtype == torch.bfloat16 else torch.float32
    rows = x.shape[0]
    for name, given, shape in (("x", x, (rows, weight.depth)), ("out", out, (rows, weight.columns))):
        if given.dtype != dtype or given.shape != shape or not given.is_contiguous() or not given.is_cpu:
            raise ValueError(
                f"{name}: expected contiguous {dtype} {list(shape)} on the CPU, got {given.dtype} {list(given.shape)}, strides "
                f"{given.stride()}, on {given.device}"
            )
    count = threads(rows * weight.depth * weight.columns, PRODUCTS_PER_THREAD)
    if weight.scale is None:
        data, _, bias = weight.pointers
        lib.p2l_linear(
            tensor("void", x), rows, weight.depth, data, bias, weight.columns, tensor("void", out), dtype == torch.bfloat16,
            weight.level, count,
        )  # fmt: skip
        return out
    needed = weight.scratch(rows)
    fits = scratch is not None and scratch.dtype == torch.uint8 and scratch.numel() >= needed and scratch.is_contiguous()
    if needed and not fits:
        raise ValueError(f"scratch: expected {needed} contiguous bytes, got {None if scratch is None else list(scratch.shape)}")
    data, scale, bias = weight.pointers
    lib.p2l_int8_linear(
        tensor("float", x), rows, weight.depth, data, scale, bias, weight.columns,
        tensor("uint8_t", scratch), tensor("float", out), weight.level, count,
    )  # fmt: skip
    return out
