"""Hidden states of prompts, and routers built on them: ridge regression, nearest neighbours and a perceptron."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import NearestNeighbors
from sklearn.neural_network import MLPRegressor
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from p2l_engine import checkpoint
from p2l_engine.backbone.head import Head
from p2l_engine.checkpoint import Checkpoint, StoredWeights
from p2l_engine.coefficients import Coefficients
from p2l_engine.engine import Engine
from p2l_engine.feedback import feedback_model
from p2l_engine.prompts.parse import Prompt

Float64 = npt.NDArray[np.float64]

NEIGHBOURS = 80
Advance = Callable[[int], object]


def hidden_states(
    engine: Engine, prompts: Sequence[Prompt], advance: Advance | None = None
) -> tuple[npt.NDArray[np.float32], Coefficients]:
    """The hidden states [N, D] that the engine's head reads (``Engine.read``), and the coefficients that it computes from
    them, without expected usage, in one pass. ``advance`` is called with the number of prompts of each forward pass."""
    width = engine.width - engine.usage_width

    def stage(inputs: Tensor, _: object) -> tuple[Tensor, Tensor]:
        return engine.read(inputs)[0], engine.outputs(inputs)[:, :width]

    states = np.empty((len(prompts), engine.head.weight.shape[1]), np.float32)
    out = np.empty((len(prompts), width), np.float32)
    for rows, (hidden, outputs) in engine.stream(prompts, stage):
        states[rows], out[rows] = hidden, outputs
        if advance is not None:
            advance(len(rows))
    return states, engine.coefficients_of(out)


def frozen(base: str, training: Mapping[str, Any]) -> Checkpoint:
    """The backbone ``base`` before training, as a checkpoint with an empty head. training: the keys of a training config."""
    folder = checkpoint.find(base)
    decoder, weights = checkpoint.read_config(folder), checkpoint.decoder_weights(folder)
    tokenizer = checkpoint.read_tokenizer(folder, dict(training), decoder.model_type)
    # New tokens start as the end-of-sequence token, as in training.
    end = tokenizer.id_of(tokenizer.special_tokens["eos_token"])
    table = weights["embed_tokens.weight"]
    grown = max(len(tokenizer) - len(table), 0)
    weights["embed_tokens.weight"] = torch.cat([table, table[end].expand(grown, -1)])
    decoder = checkpoint.with_vocabulary(decoder, len(table) + grown)
    transformers = partial(checkpoint.as_transformers, folder, folder, training, len(table) + grown)
    whole = StoredWeights.of(weights, None, None)
    head = Head(torch.zeros(1, int(decoder.hidden_size)), torch.zeros(1), 1)
    return Checkpoint(folder, folder, decoder, tokenizer, ("none",), feedback_model("bt"), whole, head, transformers)


def probes(training: Float64, scores: Float64, test: Float64, seed: int = 0) -> dict[str, Float64]:
    """The scores [N, M] that ridge regression, k nearest neighbours (cosine) and a multilayer perceptron predict for the
    features ``test`` [N, D], fitted to the training prompts' features [T, D] and scores [T, M]."""
    scaler = StandardScaler().fit(training)
    known, new = scaler.transform(training), scaler.transform(test)
    ridge = RidgeCV(np.logspace(1, 5, 9)).fit(known, scores)
    # A tenth of the training prompts is held back: it decides when each perceptron stops, and which weight decay is best.
    perceptrons = [
        MLPRegressor(hidden_layer_sizes=(128,), alpha=decay, early_stopping=True, max_iter=300, random_state=seed)
        for decay in (1.0, 10.0, 30.0, 100.0, 300.0)
    ]
    perceptron = max((each.fit(known, scores) for each in perceptrons), key=lambda each: float(each.best_validation_score_))
    unit, new_unit = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (known, new))
    count = min(NEIGHBOURS, len(unit))
    near = NearestNeighbors(n_neighbors=count).fit(unit).kneighbors(new_unit, return_distance=False)
    return {"ridge": ridge.predict(new), "knn": scores[near].mean(1), "mlp": perceptron.predict(new)}
