"""How sure the head is of each model: the posterior of its rows, and the deviation of theta that follows for a prompt."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from p2l_engine.backbone import tensor_file
from p2l_engine.errors import CheckpointError

FILE = "uncertainty.safetensors"  # in a checkpoint's folder
PRODUCTS = 1 << 24  # numbers of one pass: 64 MB


@dataclass(frozen=True, slots=True, eq=False)
class Uncertainty:
    """The posterior of the weights w_m = [weight row; bias] of K models: N(the head's row, basis L_m L_m' basis').

    basis [D + 1, r] and factors [K, r, r] (L_m, lower triangular) float32; models: the K names. Different models are
    independent. order: the M models of the checkpoint in its order, None: the K models; models without a factor are certain.
    trained: those of the K whose rows training had fixed, and votes only updated. Raises ValueError for other shapes and names.
    """

    basis: Tensor
    factors: Tensor
    models: tuple[str, ...]
    order: tuple[str, ...] | None = None
    trained: tuple[str, ...] = ()
    _wide: Tensor = field(init=False, repr=False)  # [r, K r]: the factors beside each other
    _places: Tensor = field(init=False, repr=False)  # of the M models among the K, K for those that are certain

    def __post_init__(self) -> None:
        k, rank = len(self.models), self.basis.shape[-1] if self.basis.ndim == 2 else 0
        if rank == 0 or len(self.basis) < 2:
            raise ValueError(f"basis: expected [D + 1, r] with r >= 1, found {list(self.basis.shape)}")
        if not k or self.factors.shape != (k, rank, rank):
            raise ValueError(f"factors: expected {[k or 'K >= 1', rank, rank]}, found {list(self.factors.shape)}")
        if len(set(self.models)) < k:
            raise ValueError(f"models: expected different names, found {', '.join(_repeated(self.models))} twice")
        order = self.models if self.order is None else self.order
        if unknown := [name for name in self.models if name not in order]:
            raise ValueError(f"models: expected models of the checkpoint, found {', '.join(unknown)}")
        if unknown := [name for name in self.trained if name not in self.models]:
            raise ValueError(f"trained: expected models of the posterior, found {', '.join(unknown)}")
        index = {name: i for i, name in enumerate(self.models)}
        places = torch.tensor([index.get(name, k) for name in order], device=self.basis.device)
        object.__setattr__(self, "_places", places)
        object.__setattr__(self, "_wide", self.factors.transpose(0, 1).reshape(rank, k * rank).contiguous())

    def deviation(self, hidden: Tensor) -> Tensor:
        """The standard deviation of theta, [N, M] float32, for hidden states [N, D] after the final norm, on their device.

        sqrt(x' basis L_m L_m' basis' x) with x = [hidden; 1].
        """
        k, rank, _ = self.factors.shape
        projected = torch.addmm(self.basis[-1], hidden.float(), self.basis[:-1])
        parts = projected.split(max(1, PRODUCTS // (k * rank)))
        # One product: a product for each model takes many times as long where there are few prompts.
        found = [torch.linalg.vector_norm((part @ self._wide).view(-1, k, rank), dim=-1) for part in parts]  # each [n, K]
        certain = projected.new_zeros((len(hidden), 1))
        return torch.cat([torch.cat(found), certain], 1).index_select(1, self._places)

    def to(self, device: torch.device) -> Uncertainty:
        """The same posterior on another device."""
        return replace(self, basis=self.basis.to(device), factors=self.factors.to(device))

    def write(self, path: Path) -> None:
        """Writes a safetensors file: the basis, the lower triangles of the factors row by row [K, r (r + 1) / 2], where some
        are ``trained``, which [K], and the names in its metadata. The same posterior gives the same bytes. Raises OSError."""
        rows, columns = torch.tril_indices(*self.factors.shape[1:])
        tensors = {"basis": self.basis, "factors": self.factors.cpu()[:, rows, columns]}
        narrow = {name: tensor.to("cpu", torch.float32) for name, tensor in tensors.items()}
        if self.trained:
            narrow["trained"] = torch.tensor([name in self.trained for name in self.models])
        tensor_file.write(path, narrow, {"models": json.dumps(self.models)})

    @classmethod
    def read(cls, path: Path, hidden: int, models: tuple[str, ...]) -> Uncertainty:
        """Reads what ``write`` wrote, for a checkpoint of these models and hidden states [D = hidden].

        Raises CheckpointError for a file that cannot be read, and for tensors or names that do not fit.
        """
        tensors, names = _contents(path)
        trained = tensors.pop("trained", torch.zeros(len(names), dtype=torch.bool))
        if sorted(tensors) != ["basis", "factors"]:
            raise CheckpointError(
                f"{path}: expected the tensors basis and factors, found {', '.join(sorted(tensors)) or 'none'}"
            )
        for name, tensor in tensors.items():
            if tensor.ndim != 2 or not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
                raise CheckpointError(
                    f"{path}: {name}: expected two dimensions of finite numbers, found {list(tensor.shape)} {tensor.dtype}"
                )
        basis, packed = tensors["basis"].float(), tensors["factors"].float()
        rank = basis.shape[1]
        if len(basis) != hidden + 1:
            raise CheckpointError(
                f"{path}: basis: expected {hidden + 1} rows, the hidden states' {hidden} and one, found {len(basis)}"
            )
        if packed.shape != (len(names), rank * (rank + 1) // 2):
            raise CheckpointError(
                f"{path}: factors: expected {[len(names), rank * (rank + 1) // 2]}, a lower triangle of {rank} rows for each "
                f"model, found {list(packed.shape)}"
            )
        if trained.shape != (len(names),) or trained.dtype != torch.bool:
            raise CheckpointError(
                f"{path}: trained: expected {[len(names)]} of {torch.bool}, found {list(trained.shape)} {trained.dtype}"
            )
        factors = packed.new_zeros((len(names), rank, rank))
        rows, columns = torch.tril_indices(rank, rank)
        factors[:, rows, columns] = packed
        try:
            return cls(basis, factors, names, models, tuple(name for name, of in zip(names, trained, strict=True) if of))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None


def _contents(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    tensors, metadata = tensor_file.read(path)
    try:
        names = json.loads(metadata.get("models", "null"))
    except json.JSONDecodeError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: metadata: expected a JSON list of names under 'models', found {metadata!r:.80}")
    return tensors, tuple(names)


def _repeated(names: Collection[str]) -> list[str]:
    return sorted({name for name in names if list(names).count(name) > 1})
