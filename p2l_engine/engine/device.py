"""Devices and dtypes in the spellings of PyTorch users, and the default dtype of each device."""

from __future__ import annotations

import torch

from p2l_engine.engine import cpu
from p2l_engine.native.binding import isa

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
}  # fmt: skip
WHOLE_NUMBERS = {"int8": torch.int8}  # of weights alone, on CPUs
AUTO = "auto"  # see ``auto_dtype``
DEVICES = ("cpu", "cuda")


def as_device(device: str | torch.device | None) -> torch.device:
    """ "cpu", "cuda", "cuda:1", in any case, or a torch.device; None: CUDA where there is one, else the CPU.

    Raises ValueError for any other device, and for a CUDA device that this machine does not have.
    """
    found = parse_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {str(found)!r} is not available: this machine has {torch.cuda.device_count()} CUDA devices")
    return found


def parse_device(device: str | torch.device) -> torch.device:
    """``as_device``, for a device that may be another machine's. Raises ValueError for any but cpu, cuda and cuda:N."""
    try:
        found = torch.device(device.lower() if isinstance(device, str) else device)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from None
    if found.type not in DEVICES:
        raise ValueError(f"device: expected cpu or cuda, got {str(found)!r}")
    return found


def as_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """A torch dtype, or its name: "float32", "fp32", "torch.float32", "bf16", ...; None: the device's ``natural_dtype``.

    int8 is the dtype of weights alone, on a CPU. Raises ValueError for other names and dtypes, and for int8 on CUDA.
    """
    if dtype is None:
        return natural_dtype(device)
    names = DTYPES | WHOLE_NUMBERS
    found = names.get(dtype.lower().removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not (found.is_floating_point or found == torch.int8):
        raise ValueError(f"dtype: expected one of {', '.join(names)}, or a floating-point torch.dtype, got {dtype!r}")
    if found == torch.int8 and device.type != "cpu":
        raise ValueError(f"dtype: int8 is computed on CPUs alone, got the device {str(device)!r}: use bfloat16, or device cpu")
    return found


def is_auto(dtype: str | torch.dtype | None) -> bool:
    """Whether this is the name "auto", in any case."""
    return isinstance(dtype, str) and dtype.lower() == AUTO


def described(dtype: torch.dtype) -> str:
    """The dtype's name and, of int8, the CPU's instruction set: what is between products differs by it, to last bits or to
    bfloat16, and moves values to the next whole number, which changes theta by as much as int8 itself does."""
    name = str(dtype).removeprefix("torch.")
    return f"{name} on {isa()}" if dtype == torch.int8 else name


def natural_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs that multiply it in hardware, else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if cpu.multiplies_bf16() else torch.float32
