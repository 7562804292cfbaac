"""Checked arrays: numpy or torch in, float64 inside, the caller's kind out. Does not load torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Float64 = npt.NDArray[np.float64]
Array: TypeAlias = "npt.NDArray[Any] | Tensor"

Q_TOLERANCE = 1e-6  # how far sum(q) may be from 1: float32 rounding of 500 weights stays within it


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether it is a torch tensor. There is none before the caller has imported torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_float64(name: str, value: object) -> Float64:
    """A contiguous float64 copy or view of ``value``; TypeError unless it is an array of numbers."""
    if type(value) is np.ndarray and value.dtype == np.float64 and value.flags.c_contiguous:
        return value  # as the last line would, but in a tenth of the time
    array = to_numpy(value.double() if is_tensor(value) else value, name)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected an array of real numbers, got {array.dtype} in {type(value).__name__}")
    return np.asarray(array, dtype=np.float64, order="C")


def like(result: npt.NDArray[Any], given: object) -> Any:
    """``result``, as a tensor on ``given``'s device if ``given`` is a tensor."""
    return sys.modules["torch"].from_numpy(result).to(given.device) if is_tensor(given) else result


def to_numpy(value: object, name: str = "value") -> npt.NDArray[Any]:
    """``value`` as a numpy array of its own dtype; memmaps stay on disk. TypeError for nested lists of different lengths."""
    if is_tensor(value):
        return value.detach().cpu().numpy()
    try:
        return np.asanyarray(value)
    except ValueError as error:
        raise TypeError(f"{name}: expected an array of numbers, got {type(value).__name__} ({error})") from None


def finite(name: str, array: Float64, start: int = 0) -> Float64:
    """``array``; ValueError with the first entry that is NaN or infinite. ``start``: the number of its first row."""
    if not np.isfinite(array).all():
        if not array.ndim:
            raise ValueError(f"{name}: expected a finite number, got {array}")
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        shown = [place[0] + start, *place[1:]]
        raise ValueError(f"{name}{shown}: expected a finite number, got {array[place]}")
    return array


def check_matrix(name: str, array: npt.NDArray[Any]) -> None:
    """Raises unless [N, M] numbers with M >= 1; reads no entry."""
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected an array of real numbers, got {array.dtype}")
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [N, M] with M >= 1, got {list(array.shape)}")


def amounts(name: str, value: object, shape: tuple[int | None, int]) -> npt.NDArray[Any]:
    """What each model uses of a resource, finite and >= 0: [M] as float64, or [N, M] in its own dtype (memmaps stay on
    disk)."""
    array = to_numpy(value, name)
    if array.ndim < 2:
        array = to_float64(name, array)
    elif array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected an array of real numbers, got {array.dtype}")
    if array.shape != (shape[1],) and array.shape != shape:
        either = "" if shape[0] is None else f" or {list(shape)}"
        raise ValueError(f"{name}: expected shape [{shape[1]}]{either}, got {list(array.shape)}")
    step = max(1, 2**22 // shape[1])
    for start in range(0, len(array), step):
        part = finite(name, array[start : start + step], start)
        if part.min() < 0:
            place = [int(i) for i in np.argwhere(part < 0)[0]]
            raise ValueError(
                f"{name}[{', '.join(map(str, (place[0] + start, *place[1:])))}]: expected an amount >= 0, got {part.min()}"
            )
    return array


def matrix(name: str, value: object) -> Float64:
    """A finite [N, M] matrix with M >= 1."""
    array = to_float64(name, value)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [N, M] with M >= 1, got {list(array.shape)}")
    return finite(name, array)


def per_model(name: str, value: object, shape: tuple[int, int]) -> Float64:
    """A finite [M] or [N, M] array for ``shape`` = (N, M)."""
    array = finite(name, to_float64(name, value))
    if array.shape not in ((shape[1],), shape):
        raise ValueError(f"{name}: expected shape [{shape[1]}] or {list(shape)}, got {list(array.shape)}")
    return array


def opponents(value: object, shape: tuple[int, int], name: str = "q") -> Float64:
    """q as [M] or [N, M]: non-negative rows that sum to 1 within 1e-6, rescaled to sum to 1 within rounding."""
    q = per_model(name, value, shape)
    if q.min(initial=0.0) < 0:
        place = tuple(int(i) for i in np.argwhere(q < 0)[0])
        raise ValueError(f"{name}{list(place)}: expected a weight >= 0, got {q[place]}")
    total = q.sum(axis=-1)
    if q.size and np.abs(total - 1.0).max() > Q_TOLERANCE:
        worst = float(np.ravel(total)[np.abs(np.ravel(total) - 1.0).argmax()])
        raise ValueError(f"{name}: expected weights that sum to 1, got a sum of {worst!r}; divide them by their sum")
    return cast(Float64, q / total[..., None])


def costs(value: object, shape: tuple[int, int]) -> Float64:
    """Costs as [M] or [N, M]: finite and >= 0."""
    array = per_model("costs", value, shape)
    if array.min(initial=0.0) < 0:
        place = tuple(int(i) for i in np.argwhere(array < 0)[0])
        raise ValueError(f"costs{list(place)}: expected a cost >= 0, got {array[place]}")
    return array


def budgets(value: object, n_prompts: int, name: str = "budget") -> Float64:
    """One bound per prompt [N]; None or +inf is no bound."""
    if value is None:
        return np.full(n_prompts, np.inf)
    if isinstance(value, bool | str):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    array = to_float64(name, value)
    array = np.full(n_prompts, float(array)) if array.ndim == 0 else array.copy()
    if array.shape != (n_prompts,):
        raise ValueError(f"{name}: expected a number or shape [{n_prompts}], got {list(array.shape)}")
    wrong = np.isnan(array) | (array == -np.inf)
    if wrong.any():
        raise ValueError(f"{name}: expected a number, or None for none, got {array[wrong][0]}")
    return array
