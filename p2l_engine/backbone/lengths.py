"""Expected output tokens, and seconds, of each model's answer: log-linear in the hidden state, as theta is linear."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from p2l_engine.backbone import tensor_file
from p2l_engine.errors import CheckpointError

FILE = "lengths.safetensors"  # in a checkpoint's folder
QUANTITIES = ("tokens", "seconds")
PARTS = {"weight": 2, "bias": 1, "least": 1, "most": 1}  # tensors of a quantity, and their dimensions


@dataclass(frozen=True, slots=True, eq=False)
class LengthRows:
    """Of one quantity: a model's expected amount is exp(weight row . hidden + bias), kept between its least and most.

    models: the K models that were observed, in the order of the rows. weight [K + 1, D], bias, least and most [K + 1] float32;
    the last row is for every other model. Raises ValueError for other shapes, for numbers that are not finite, and unless
    0 < least <= most.
    """

    models: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    least: Tensor
    most: Tensor

    def __post_init__(self) -> None:
        k = len(self.models)
        if len(set(self.models)) < k:
            twice = sorted({name for name in self.models if self.models.count(name) > 1})
            raise ValueError(f"models: expected different names, found {', '.join(twice)} twice")
        for name, dimensions in PARTS.items():
            part: Tensor = getattr(self, name)
            if part.ndim != dimensions or len(part) != k + 1 or not part.numel():
                expected = [k + 1, "D"][:dimensions]
                raise ValueError(f"{name}: expected {expected}, a row for each model and one, found {list(part.shape)}")
            if not part.is_floating_point() or not part.isfinite().all():
                raise ValueError(f"{name}: expected finite numbers, found {part.dtype} with others")
        if not bool(((self.least > 0) & (self.least <= self.most)).all()):
            raise ValueError("least, most: expected 0 < least <= most for each model")

    def without(self, names: Collection[str]) -> LengthRows:
        """The rows without those of these models."""
        kept = [i for i, name in enumerate(self.models) if name not in names]
        rows = torch.tensor([*kept, len(self.models)])
        models = tuple(self.models[i] for i in kept)
        return LengthRows(models, self.weight[rows], self.bias[rows], self.least[rows], self.most[rows])


@dataclass(frozen=True, slots=True, eq=False)
class LengthHead:
    """The rows of output tokens, and of seconds where these were observed, for a checkpoint's M models in its order.

    Raises ValueError for rows of models that are not in ``order``, or for hidden states of different widths.
    """

    order: tuple[str, ...]
    tokens: LengthRows
    seconds: LengthRows | None = None
    _rows: tuple[Tensor, ...] = field(init=False, repr=False)  # weight [D, Q M], bias, and the bounds' logarithms [Q M]

    def __post_init__(self) -> None:
        found: list[tuple[Tensor, ...]] = []
        for name, rows in self.of_quantities().items():
            if unknown := [model for model in rows.models if model not in self.order]:
                raise ValueError(f"{name}: expected models of the checkpoint, found {', '.join(unknown)}")
            if rows.weight.shape[1] != self.width:
                raise ValueError(f"{name}.weight: expected rows of {self.width}, as tokens, found {rows.weight.shape[1]}")
            index = {model: i for i, model in enumerate(rows.models)}
            places = torch.tensor([index.get(model, len(index)) for model in self.order], device=rows.bias.device)
            parts = (rows.weight, rows.bias, rows.least.log(), rows.most.log())
            found.append(tuple(part.float().index_select(0, places) for part in parts))
        weight, bias, low, high = (torch.cat(parts) for parts in zip(*found, strict=True))
        object.__setattr__(self, "_rows", (weight.T.contiguous(), bias, low, high))

    def __call__(self, hidden: Tensor) -> Tensor:
        """[N, M] expected output tokens, then [N, M] seconds where they are known, float32, for hidden states [N, D] after the
        final norm, on their device."""
        weight, bias, low, high = self._rows
        return torch.addmm(bias, hidden.float(), weight).clamp(low, high).exp()

    @property
    def width(self) -> int:
        """D."""
        return int(self.tokens.weight.shape[1])

    @property
    def outputs(self) -> int:
        """Numbers for each prompt."""
        return len(self.order) * len(self.of_quantities())

    def of_quantities(self) -> dict[str, LengthRows]:
        """The rows by quantity."""
        return {name: rows for name, rows in zip(QUANTITIES, (self.tokens, self.seconds), strict=True) if rows is not None}

    def to(self, device: torch.device) -> LengthHead:
        """The same rows on another device."""
        moved = {
            name: replace(rows, **{part: getattr(rows, part).to(device) for part in PARTS})
            for name, rows in self.of_quantities().items()
        }
        return LengthHead(self.order, **moved)

    def only(self, order: tuple[str, ...]) -> LengthHead:
        """For a checkpoint of these models: rows of others are left out."""
        others = {name for rows in self.of_quantities().values() for name in rows.models} - set(order)
        return LengthHead(order, **{name: rows.without(others) for name, rows in self.of_quantities().items()})

    def write(self, path: Path) -> None:
        """Writes a safetensors file: QUANTITY.weight, .bias, .least and .most, float32, and in its metadata ``models``, JSON
        with the names of each quantity's models. The same rows give the same bytes. Raises OSError."""
        of = self.of_quantities()
        tensors = {
            f"{name}.{part}": getattr(rows, part).to("cpu", torch.float32) for name, rows in of.items() for part in PARTS
        }
        tensor_file.write(path, tensors, {"models": json.dumps({name: rows.models for name, rows in of.items()})})

    @classmethod
    def read(cls, path: Path, hidden: int, models: tuple[str, ...]) -> LengthHead:
        """Reads what ``write`` wrote, for a checkpoint of these models and hidden states [D = hidden].

        Raises CheckpointError for a file that cannot be read, and for tensors or names that do not fit.
        """
        tensors, metadata = tensor_file.read(path)
        named = [name for name in QUANTITIES if any(key.startswith(f"{name}.") for key in tensors)]
        expected = sorted(f"{name}.{part}" for name in named or QUANTITIES[:1] for part in PARTS)
        if sorted(tensors) != expected or "tokens" not in named:
            raise CheckpointError(
                f"{path}: expected the tensors {', '.join(expected)}, tokens among them, found "
                f"{', '.join(sorted(tensors)) or 'none'}"
            )
        rows = {}
        for name in named:
            try:
                parts = {part: tensors[f"{name}.{part}"].float() for part in PARTS}
                rows[name] = LengthRows(_names(metadata.get("models"), name), **parts)
            except ValueError as error:
                raise CheckpointError(f"{path}: {name}.{error}") from None
        if (found := rows["tokens"].weight.shape[1]) != hidden:
            raise CheckpointError(f"{path}: tokens.weight: expected rows of {hidden}, the hidden states', found {found}")
        try:
            return cls(models, **rows)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None


def _names(text: str | None, quantity: str) -> tuple[str, ...]:
    try:
        names = json.loads(text or "")[quantity]
    except (TypeError, ValueError, KeyError, IndexError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"models: expected the list of their names in the metadata, found {text!r:.80}")
    return tuple(names)
