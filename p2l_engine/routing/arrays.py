"""Arrays at the door of routing: numpy or torch in, checked float64 inside, the caller's kind out."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

Float64 = npt.NDArray[np.float64]
Array = npt.NDArray[Any] | torch.Tensor

Q_TOLERANCE = 1e-6  # how far sum(q) may be from 1: float32 rounding of 500 weights stays within it


def to_float64(name: str, value: object) -> Float64:
    """A contiguous float64 copy or view of ``value``; TypeError when it is no array of numbers."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    if np.asarray(value).dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected an array of real numbers, got {np.asarray(value).dtype} in {type(value).__name__}")
    try:
        return np.asarray(value, dtype=np.float64, order="C")
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array of numbers, got {type(value).__name__} ({error})") from None


def like(result: npt.NDArray[Any], given: object) -> Any:
    """``result`` as a tensor on ``given``'s device when ``given`` is a tensor, else as it is."""
    return torch.from_numpy(result).to(given.device) if isinstance(given, torch.Tensor) else result


def to_numpy(value: object) -> npt.NDArray[Any]:
    """``value`` as it is, in numpy: memmaps stay on disk."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asanyarray(value)


def finite(name: str, array: Float64, start: int = 0) -> Float64:
    """``array``, or a ValueError that names the first entry that is NaN or infinite; its rows count from ``start``."""
    if not np.isfinite(array).all():
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
    """What each model uses of something, [M] float64 or [N, M] as it came (memmaps stay on disk): finite and >= 0."""
    array = to_numpy(value)
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
    """q as [M] or [N, M]: non-negative rows that sum to 1 within 1e-6, scaled to sum to 1 to the last bit or two."""
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
    """One bound per prompt [N]; None, or +inf, stands for no bound."""
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
