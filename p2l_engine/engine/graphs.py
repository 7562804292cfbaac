"""CUDA graphs for single prompts: the whole forward pass as one launch.

For a single prompt, launching the kernels one by one takes longer than running them. One graph is captured for each bucket of
tokens; a prompt runs in the smallest bucket that holds it, and a filler prompt takes the remaining tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2l_engine.backbone.packing import Packed, Tokens, shared_with

BUCKETS = (16, 32, 64, 128, 256, 512)  # own tokens, without a shared prefix


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Packed  # on the device, read by the graph
    host_inputs: Tensor
    out: Tensor  # [2, K]: the prompt's, then the filler's
    host_out: Tensor


class Graphs:
    """Captured forward passes of ``forward``: packed tokens on the device -> outputs [n, K]. Safe from several threads.

    keep: tensors that the passes read besides their input; graphs hold only their addresses, so a reference is kept here.
    """

    def __init__(self, forward: Callable[[Packed], Tensor], prefix: Tokens | None, device: torch.device, keep: object) -> None:
        self.prefix, self.device, self._keep = prefix, device, keep
        self._lock = threading.Lock()
        # Not torch's default capture stream, which belongs to the first device that captured a graph.
        self._stream = torch.cuda.Stream(device)
        pool: Any = None
        self._captured: dict[int, _Captured] = {}
        for bucket in sorted(BUCKETS, reverse=True):  # the largest first: the others reuse its memory pool
            captured = self._capture(forward, bucket, pool)
            pool = pool or captured.graph.pool()
            self._captured[bucket] = captured

    def run(self, ids: Tokens) -> npt.NDArray[np.float32] | None:
        """The outputs [K] of one prompt; None if no graph fits: it is too long, or lacks the shared prefix."""
        shared = shared_with(ids, self.prefix)
        bucket = next((b for b in BUCKETS if b >= len(ids) - shared), None)
        if bucket is None or (self.prefix is not None and not shared):
            return None
        packed = Packed.of([ids], self.prefix, fill=bucket)
        captured = self._captured[bucket]
        with self._lock, torch.inference_mode(), torch.cuda.device(self.device):
            captured.host_inputs.copy_(packed.buffer)
            captured.inputs.buffer.copy_(captured.host_inputs, non_blocking=True)
            captured.graph.replay()
            captured.host_out.copy_(captured.out, non_blocking=True)
            torch.cuda.current_stream(self.device).synchronize()
            return np.array(captured.host_out[0].numpy())

    def _capture(self, forward: Callable[[Packed], Tensor], bucket: int, pool: Any) -> _Captured:
        prefix = np.zeros(0, np.int32) if self.prefix is None else self.prefix
        # The longest prompt of the bucket: attention is launched with the sizes of this one.
        longest = np.concatenate([prefix, np.zeros(bucket, np.int32)]).astype(np.int32)
        packed = Packed.of([longest], self.prefix, fill=bucket)
        inputs = packed.to(self.device)
        with torch.inference_mode(), torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                for _ in range(2):
                    forward(inputs)
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                out = forward(inputs)
            host_inputs = torch.empty(packed.buffer.shape, dtype=torch.int32, pin_memory=True)
            host_out = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
        return _Captured(graph, inputs, host_inputs, out, host_out)
