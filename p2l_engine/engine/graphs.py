"""CUDA graphs for few prompts: the whole forward pass as one launch.

For a short batch, launching the kernels one by one takes longer than running them: about 10 ms for 30 layers. One graph is
captured for each bucket of tokens; a batch runs in the smallest bucket that holds it, and filler prompts take the remaining
tokens and places.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from p2l_engine.backbone.packing import Packed, Tokens, shared_with
from p2l_engine.engine.pipeline import Outputs


class Bucket(NamedTuple):
    """Batches of at most this many tokens and fewer prompts than this; each prompt at most ``longest`` tokens.

    Tokens are those without a shared prefix. Attention launches blocks for every prompt's ``longest`` tokens, most of which
    end at once: that bounds prompts and ``longest``.
    """

    tokens: int
    prompts: int
    longest: int


BUCKETS = tuple(Bucket(t, min(max(2, t // 16), 64), min(t, 1024)) for t in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096))


MOST_PROMPTS = max(bucket.prompts for bucket in BUCKETS) - 1


def bucket_of(prompts: Sequence[Tokens], prefix: Tokens | None) -> Bucket | None:
    """The smallest bucket that holds the prompts; None if they are too many or too long, or one lacks the shared prefix."""
    if len(prompts) > MOST_PROMPTS:
        return None
    shared = [shared_with(ids, prefix) for ids in prompts]
    if prefix is not None and not all(shared):
        return None
    own = [len(ids) - s for ids, s in zip(prompts, shared, strict=True)]
    total, longest = sum(own), max(own)
    return next((b for b in BUCKETS if total <= b.tokens and len(own) < b.prompts and longest <= b.longest), None)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Packed  # on the device, read by the graph
    host_inputs: Tensor
    out: Tensor  # [prompts of the bucket, K]
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
        self._captured: dict[Bucket, _Captured] = {}
        for bucket in reversed(BUCKETS):  # the largest first: the others reuse its memory pool
            captured = self._capture(forward, bucket, pool)
            pool = pool or captured.graph.pool()
            self._captured[bucket] = captured

    def run(self, prompts: Sequence[Tokens]) -> Outputs | None:
        """None if no graph fits the prompts (``bucket_of``)."""
        bucket = bucket_of(prompts, self.prefix)
        if bucket is None:
            return None
        packed = Packed.of(prompts, self.prefix, bucket[:2])
        captured = self._captured[bucket]
        with self._lock, torch.inference_mode(), torch.cuda.device(self.device):
            captured.host_inputs.copy_(packed.buffer)
            captured.inputs.buffer.copy_(captured.host_inputs, non_blocking=True)
            captured.graph.replay()
            captured.host_out.copy_(captured.out, non_blocking=True)
            torch.cuda.current_stream(self.device).synchronize()
            return Outputs(np.array(captured.host_out[: len(prompts)].numpy()), sum(packed.lengths[: len(prompts)]))

    def _capture(self, forward: Callable[[Packed], Tensor], bucket: Bucket, pool: Any) -> _Captured:
        prefix = np.zeros(0, np.int32) if self.prefix is None else self.prefix
        # A prompt of the greatest length: attention is launched with the sizes of this one. The filler is no longer than that.
        longest = np.concatenate([prefix, np.zeros(bucket.longest, np.int32)]).astype(np.int32)
        packed = Packed.of([longest] * (bucket.tokens // bucket.longest), self.prefix, bucket[:2])
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
