"""P2L on transformers: as it is served today, and batched as well as transformers can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import AutoModel

from bench.peers.batches import Batch, in_batches, padded
from bench.peers.peer import head_of
from p2l_engine.checkpoint import Checkpoint

MAX_TOKENS = 8192


class Transformers:
    """transformers' AutoModel with SDPA, and the head: prompts or token ids to theta and eta, on torch's threads."""

    name = "transformers"

    def __init__(self, loaded: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        head = head_of(loaded)
        config, self.tokenizer = loaded.transformers()
        self.device, self.precision = device, str(dtype).removeprefix("torch.")
        with torch.device(device):
            self.model: Any = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        self.model.load_state_dict({name: weight for name, weight in loaded.weights.read().items() if "inv_freq" not in name})
        self.weight, self.bias = head.weight.to(device), head.bias.to(device)

    def text(self, prompt: str) -> str:
        """The text of a P2L prompt."""
        turns = [{"role": "user", "content": prompt}]
        rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        return str(rendered).replace(str(self.tokenizer.cls_token), "<cls>") + str(self.tokenizer.cls_token)

    def tokens(self, prompts: Sequence[str]) -> Batch:
        """The token ids of P2L prompts, cut from the left."""
        encoded = self.tokenizer([self.text(p) for p in prompts], add_special_tokens=False, return_attention_mask=False)
        return [np.array(ids[-MAX_TOKENS:], np.int32) for ids in encoded["input_ids"]]

    @torch.inference_mode()
    def run(self, batches: Sequence[Batch]) -> list[npt.NDArray[np.float32]]:
        """See Peer. A single prompt has no attention mask."""
        out = []
        for batch in batches:
            tokens, last = (torch.from_numpy(part).to(self.device) for part in padded(batch))
            mask = None if len(batch) == 1 else (torch.arange(tokens.shape[1], device=self.device) <= last[:, None]).long()
            hidden = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
            ends = hidden[torch.arange(len(last), device=self.device), last]
            out.append(F.linear(ends.float(), self.weight, self.bias).cpu().numpy())
        return out

    def one_by_one(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """As P2L is served today: one prompt at a time, from tokenising to the result."""
        return np.concatenate([self.run([self.tokens([prompt])])[0] for prompt in prompts])

    def batched(self, prompts: Sequence[str], token_budget: int) -> npt.NDArray[np.float32]:
        """Sorted by length, in right-padded batches of at most ``token_budget`` tokens, padding included."""
        return in_batches(self.run, self.tokens(prompts), token_budget)
