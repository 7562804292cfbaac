"""The engine's peers: P2L on transformers, as it is served today, and batched as well as transformers can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import AutoModel

from p2l_engine.checkpoint import Checkpoint

MAX_TOKENS = 8192


class Transformers:
    """transformers' AutoModel with SDPA, and the head: prompts to theta and eta."""

    def __init__(self, loaded: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        config, self.tokenizer = loaded.transformers()
        self.device = device
        with torch.device(device):
            self.model: Any = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        self.model.load_state_dict({name: weight for name, weight in loaded.weights.items() if "inv_freq" not in name})
        self.weight, self.bias = loaded.head.weight.to(device), loaded.head.bias.to(device)

    def text(self, prompt: str) -> str:
        """The text of a P2L prompt."""
        turns = [{"role": "user", "content": prompt}]
        rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        return str(rendered).replace(str(self.tokenizer.cls_token), "<cls>") + str(self.tokenizer.cls_token)

    @torch.inference_mode()
    def one_by_one(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """As P2L is served today: one prompt at a time, from tokenising to the result."""
        rows = []
        for prompt in prompts:
            ids = self.tokenizer(self.text(prompt), return_tensors="pt", add_special_tokens=False).input_ids[:, -MAX_TOKENS:]
            hidden = self.model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state[:, -1]
            rows.append(F.linear(hidden.float(), self.weight, self.bias).cpu().numpy())
        return np.concatenate(rows)

    @torch.inference_mode()
    def batched(self, prompts: Sequence[str], token_budget: int) -> npt.NDArray[np.float32]:
        """Sorted by length, in right-padded batches of at most ``token_budget`` tokens, padding included."""
        encoded = self.tokenizer([self.text(p) for p in prompts], add_special_tokens=False, return_attention_mask=False)
        tokens = [ids[-MAX_TOKENS:] for ids in encoded["input_ids"]]
        out = np.empty((len(prompts), len(self.bias)), np.float32)
        order = np.argsort([len(ids) for ids in tokens], kind="stable")[::-1]
        place = 0
        while place < len(order):
            longest = len(tokens[order[place]])
            rows = order[place : place + max(1, token_budget // longest)]
            place += len(rows)
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens[i]) for i in rows], batch_first=True)
            size = torch.tensor([len(tokens[i]) for i in rows])
            mask = (torch.arange(longest) < size[:, None]).long().to(self.device)
            hidden = self.model(input_ids=padded.to(self.device), attention_mask=mask, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(rows), device=self.device), (size - 1).to(self.device)]
            out[rows] = F.linear(last.float(), self.weight, self.bias).cpu().numpy()
        return out
