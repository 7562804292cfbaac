"""The engine: prompts in, coefficients out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine import backbone, checkpoint
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.prompts import Prompt, PromptEncoder
from p2l_engine.regression import FeedbackModel

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32768}


@dataclass(frozen=True, slots=True)
class Coefficients:
    """theta [N, M] float32; eta [N] float32, or None for feedback models without ties; the M models' names."""

    theta: npt.NDArray[np.float32]
    eta: npt.NDArray[np.float32] | None
    models: tuple[str, ...]
    feedback: FeedbackModel

    def __len__(self) -> int:
        return len(self.theta)


class Engine:
    """Computes the coefficients of prompts with one P2L checkpoint on one device."""

    def __init__(self, loaded: Checkpoint, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type not in TOKENS_PER_BATCH:
            raise ValueError(f"device: expected cpu or cuda, got {str(self.device)!r}")
        if self.device.type == "cuda" and (self.device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device: {str(self.device)!r} is not here: {torch.cuda.device_count()} CUDA devices are")
        self.dtype = dtype or _natural_dtype(self.device)
        self.models, self.feedback, self.folder = loaded.models, loaded.feedback, loaded.folder
        self.encoder = PromptEncoder(loaded.tokenizer)
        self.backbone = backbone.build(loaded.config, loaded.weights, self.device, self.dtype)
        self.head = loaded.head.to(self.device)
        self.n_parameters = sum(weight.numel() for weight in loaded.weights.values())

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Engine:
        """Reads a checkpoint: a folder, a hub name, or None for the built-in default.

        device None: CUDA where there is one, else the CPU. dtype None: bfloat16 on CUDA and on CPUs that multiply it in
        hardware (AMX, AVX512-BF16), else float32. Raises CheckpointError.
        """
        return cls(checkpoint.load(path_or_repo), device, dtype)

    def coefficients(self, prompts: Sequence[Prompt], progress: Callable[[int], object] | None = None) -> Coefficients:
        """The coefficients of each prompt, in order. An empty batch gives empty arrays.

        ``progress`` is called with the number of prompts that each forward pass has finished. Raises PromptError, which
        names the index of a prompt that cannot be read; TypeError when ``prompts`` is a single string.
        """
        if isinstance(prompts, str | Mapping):
            raise TypeError(f"prompts: expected a list of prompts, got a single {type(prompts).__name__}; wrap it in a list")
        tokens = self.encoder.encode(prompts)
        n = len(tokens)
        theta = np.empty((n, len(self.models)), np.float32)
        eta = np.empty(n, np.float32) if self.head.eta else None
        for batch in _batches([len(ids) for ids in tokens], TOKENS_PER_BATCH[self.device.type]):
            packed = torch.from_numpy(np.concatenate([tokens[i] for i in batch]))
            with torch.inference_mode():
                t, e = self.head(self.backbone(packed, [len(tokens[i]) for i in batch]))
            theta[batch] = t.cpu().numpy()
            if eta is not None and e is not None:
                eta[batch] = e.cpu().numpy()
            if progress is not None:
                progress(len(batch))
        self._check(theta, eta)
        return Coefficients(theta, eta, self.models, self.feedback)

    def _check(self, theta: npt.NDArray[np.float32], eta: npt.NDArray[np.float32] | None) -> None:
        bad = ~np.isfinite(theta).all(axis=1)
        if eta is not None:
            bad |= ~np.isfinite(eta)
        if bad.any():
            raise FloatingPointError(
                f"prompts[{int(np.argmax(bad))}]: the backbone gave coefficients that are not finite ({int(bad.sum())} such "
                f"prompts) in {self.dtype}; are the checkpoint's weights sound?"
            )


def _batches(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Prompts in order of length, cut into batches of at most ``token_budget`` tokens (one prompt at least)."""
    batches: list[list[int]] = []
    room = 0
    for i in np.argsort(lengths, kind="stable").tolist():
        if not batches or lengths[i] > room:
            batches.append([])
            room = token_budget
        batches[-1].append(i)
        room -= lengths[i]
    return batches


def _natural_dtype(device: torch.device) -> torch.dtype:
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if cpu_multiplies_bf16() else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware: AMX or AVX512-BF16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and any(
        probe() for probe in (torch.cpu._is_amx_tile_supported, torch.cpu._is_avx512_bf16_supported)
    )
