"""Which words a prompt has, whatever their order: the mean input embedding of its different tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from p2l_engine.backbone.packing import Tokens
from p2l_engine.native.embedding import embed


def words(tokens: Sequence[Tokens], embedding: Tensor) -> Tensor:
    """[N, E] float32, on the embedding's device, for N tokenised prompts of one token at least; embedding [V, E].

    A prompt's words do not depend on the others'. On a GPU the host does not wait.
    """
    if not len(tokens):
        return embedding.new_empty((0, embedding.shape[1]), dtype=torch.float32)
    different = [np.unique(ids) for ids in tokens]
    ids = torch.from_numpy(np.concatenate(different).astype(np.int32))
    starts = torch.from_numpy(np.cumsum([0, *map(len, different[:-1])]))
    if embedding.is_cuda:
        ids, starts = (x.pin_memory().to(embedding.device, non_blocking=True) for x in (ids, starts))
        rows = F.embedding(ids, embedding).float()  # before the mean, which would be rounded to the embedding's dtype
    else:
        rows = embed(ids, embedding, torch.empty(len(ids), embedding.shape[1]))
    each = torch.arange(len(rows), device=rows.device)
    return F.embedding_bag(each, rows, starts, mode="mean")
