"""What a device computes of a packed decoder: the steps of a layer, or a whole layer at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from p2l_engine.backbone.packing import Packed

LayerRun = Callable[[int, Tensor | None], tuple[Tensor, Tensor]]


class Heads(NamedTuple):
    """Heads of queries and of keys, and the epsilon of the norms."""

    queries: int
    keys: int
    eps: float


class Operations(Protocol):
    """The decoder's steps on its device. A result may be overwritten by the next result of the same method and name."""

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """The rows of the table that the tokens name."""

    def norm(self, x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
        """x += delta, in place, where there is a delta; returns RMSNorm(x) times the weight."""

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up."""

    def rope(
        self,
        x: Tensor,
        queries: int,
        keys: int,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        sources: Tensor,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """RoPE: rotates the queries in place; returns rotated keys, and values, in the order in which attention reads them."""

    def linear(self, x: Tensor, layer: Any, name: str) -> Tensor:
        """x times the layer's weight, plus its bias. layer: of the kind that the device's operations take."""

    def attend(self, q: Tensor, kv: Tensor, packed: Packed, last: bool = False) -> Tensor:
        """Causal attention within each prompt."""

    def whole_layers(self, x: Tensor, packed: Packed, heads: Heads, tables: tuple[Tensor, Tensor]) -> LayerRun | None:
        """A function that computes a layer in one call: its number, and the known keys and values or None -> its keys and
        values, and the delta that is still to be added to x. It is called for all layers but the last, in order. None: layers
        are computed by steps. x [T, D] is changed in place; tables: cos and sin."""
