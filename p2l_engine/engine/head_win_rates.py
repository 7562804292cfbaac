"""The head's outputs and the prompts' win rates on a GPU, by Triton kernels in one launch or in two."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from p2l_engine.engine.output_layers import OutputLayers


class HeadWinRates:
    """fused_up_to: the largest number of prompts for which one launch is used, which ``measure`` finds; 0 until then."""

    def __init__(self, layers: OutputLayers) -> None:
        self._layers = layers
        self.fused_up_to = 0

    def __call__(self, states: Tensor, q: Tensor, fused: bool | None = None) -> tuple[Tensor, Tensor]:
        """For states [n, S] (see ``OutputLayers``) the head's outputs, without deviations, and the win rates v
        [n, M] float32 against q [M] float32. fused: in one launch (True) or two (False); None: whichever was
        measured to be faster."""
        from p2l_engine.kernels.pool_head import pool_head
        from p2l_engine.kernels.pool_head_win_rates import pool_head_win_rates
        from p2l_engine.kernels.win_rates import win_rates

        head, norm, eps = self._layers.head, self._layers.norm, self._layers.eps
        if self._layers.theta_map is not None or not self._layers.reads_hidden:
            out = self._layers(states)[:, : head.width]
            return out, win_rates(head.split(out)[0].contiguous(), q)
        if fused or (fused is None and len(states) <= self.fused_up_to):
            return pool_head_win_rates(states, head.weight, head.bias, q, norm, eps)
        out = pool_head(states, head.weight, head.bias, norm, eps)
        return out, win_rates(head.split(out)[0], q)

    def measure(self, device: torch.device, dtype: torch.dtype) -> None:
        """Finds ``fused_up_to`` on this GPU, for hidden states of this dtype."""
        head = self._layers.head
        q = torch.full((head.n_models,), 1 / head.n_models, device=device)
        self.fused_up_to = 0
        for n in (1, 16, 64, 256, 1024, 4096):
            states = torch.randn(n, self._layers.state_size, device=device).to(dtype)
            if self._seconds(states, q, fused=True) > self._seconds(states, q, fused=False):
                break
            self.fused_up_to = n

    def _seconds(self, states: Tensor, q: Tensor, fused: bool) -> float:
        for repeat in range(23):
            if repeat == 3:  # compiled, and the clocks are up
                torch.cuda.synchronize(states.device)
                start = time.perf_counter()
            self(states, q, fused)
        torch.cuda.synchronize(states.device)
        return time.perf_counter() - start
