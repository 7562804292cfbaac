"""The engine: prompts in, coefficients out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2l_engine import backbone, checkpoint
from p2l_engine.backbone import PackedDecoder
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.packing import Packed, Tokens, batches
from p2l_engine.prompts import Prompt, PromptEncoder, user_turns
from p2l_engine.regression import FeedbackModel

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768}
PROMPTS_PER_CHUNK = 4096  # tokenised together, one chunk ahead of the forward pass
BATCHES_IN_FLIGHT = 3  # on a GPU: enough that it never waits for the host
LEAST_PREFIX = 8  # tokens: below this, sharing saves less than it costs

Stage = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Coefficients:
    """theta [N, M] float32; eta [N] float32, or None for feedback models without ties; the M models' names."""

    theta: npt.NDArray[np.float32]
    eta: npt.NDArray[np.float32] | None
    models: tuple[str, ...]
    feedback: FeedbackModel

    def __len__(self) -> int:
        return len(self.theta)

    def row(self, i: int) -> Coefficients:
        """Those of one prompt."""
        eta = None if self.eta is None else self.eta[i : i + 1]
        return Coefficients(self.theta[i : i + 1], eta, self.models, self.feedback)


class Engine:
    """Computes the coefficients of prompts with one P2L checkpoint on one device. Safe to call from several threads."""

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
        if isinstance(self.backbone, PackedDecoder):
            prefix = self.encoder.prefix()
            self.backbone.share(prefix if len(prefix) >= LEAST_PREFIX else None)

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
        out = np.empty((len(prompts), len(self.head.bias)), np.float32)
        for rows, (part,) in self.stream(prompts, lambda hidden: (self.outputs(hidden),)):
            out[rows] = part
            if progress is not None:
                progress(len(rows))
        self._check(out)
        theta = np.ascontiguousarray(out[:, : len(self.models)])
        return Coefficients(theta, out[:, -1].copy() if self.head.has_eta else None, self.models, self.feedback)

    def outputs(self, hidden: Tensor) -> Tensor:
        """The head over hidden states [n, D] of this engine's backbone: theta and, in a last column, eta; [n, K] float32."""
        return self.head(hidden, self.backbone.norm, self.backbone.eps)

    def stream(
        self, prompts: Sequence[Prompt], stage: Stage
    ) -> Iterator[tuple[npt.NDArray[np.intp], tuple[npt.NDArray[Any], ...]]]:
        """What ``stage`` makes of the prompts' hidden states, batch by batch, as it is finished.

        stage: hidden [n, D] -> tensors [n, ...], on the engine's device; it must not wait for the device. Yields the places of
        the n prompts and the tensors as arrays. Every prompt comes once; batches hold prompts of like length. Tokenisation runs
        ahead in a thread of its own, and on a GPU several batches are under way before the first is waited for.
        """
        if isinstance(prompts, str | Mapping):
            raise TypeError(f"prompts: expected a list of prompts, got a single {type(prompts).__name__}; wrap it in a list")
        turns = [user_turns(prompt, i) for i, prompt in enumerate(prompts)]
        flying: deque[_Flight] = deque()
        for start, tokens in self._encoded(turns):
            for batch in batches([len(ids) for ids in tokens], TOKENS_PER_BATCH[self.device.type]):
                flight = self._launch(np.array(batch) + start, [tokens[i] for i in batch], stage)
                if self.device.type == "cpu":
                    yield flight.landed()
                    continue
                flying.append(flight)
                if len(flying) > BATCHES_IN_FLIGHT:
                    yield flying.popleft().landed()
        while flying:
            yield flying.popleft().landed()

    def _encoded(self, turns: Sequence[list[str]]) -> Iterator[tuple[int, list[Tokens]]]:
        """Token ids, chunk by chunk, with each chunk's first place."""
        starts = range(0, len(turns), PROMPTS_PER_CHUNK)
        if len(starts) == 1:
            yield 0, self.encoder.encode(turns)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="p2l-tokenizer") as pool:
            ahead: deque[Any] = deque()
            for start in starts:
                ahead.append((start, pool.submit(self.encoder.encode, turns[start : start + PROMPTS_PER_CHUNK])))
                if len(ahead) > 1:
                    first, tokens = ahead.popleft()
                    yield first, tokens.result()
            for first, tokens in ahead:
                yield first, tokens.result()

    def _launch(self, rows: npt.NDArray[np.intp], tokens: list[Tokens], stage: Stage) -> _Flight:
        on_gpu = self.device.type == "cuda"
        packed = Packed.of(tokens, self.backbone.prefix, pin=on_gpu)
        with torch.inference_mode():
            results = stage(self.backbone(packed.to(self.device)))
            if not on_gpu:
                return _Flight(rows, packed, results, None)
            landing = tuple(torch.empty(r.shape, dtype=r.dtype, pin_memory=True).copy_(r, non_blocking=True) for r in results)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return _Flight(rows, packed, landing, event)

    def _check(self, out: npt.NDArray[np.float32]) -> None:
        bad = ~np.isfinite(out).all(axis=1)
        if bad.any():
            raise FloatingPointError(
                f"prompts[{int(np.argmax(bad))}]: the backbone gave coefficients that are not finite ({int(bad.sum())} such "
                f"prompts) in {self.dtype}; are the checkpoint's weights sound?"
            )


@dataclass(frozen=True, slots=True)
class _Flight:
    """A batch under way: its tokens' page-locked memory must outlive the copy to the device."""

    rows: npt.NDArray[np.intp]
    packed: Packed
    results: tuple[Tensor, ...]
    event: torch.cuda.Event | None

    def landed(self) -> tuple[npt.NDArray[np.intp], tuple[npt.NDArray[Any], ...]]:
        if self.event is not None:
            self.event.synchronize()
        return self.rows, tuple(result.numpy() for result in self.results)


def _natural_dtype(device: torch.device) -> torch.dtype:
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if cpu_multiplies_bf16() else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware: AMX or AVX512-BF16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and any(
        probe() for probe in (torch.cpu._is_amx_tile_supported, torch.cpu._is_avx512_bf16_supported)
    )
