"""Find, read, merge, write, export and describe P2L checkpoints."""

from p2l_engine.checkpoint.read import (
    Checkpoint,
    as_transformers,
    find,
    load,
    read_config,
    read_tokenizer,
    with_vocabulary,
)
from p2l_engine.checkpoint.stored import StoredWeights, decoder_weights, head_weights

__all__ = [
    "Checkpoint",
    "StoredWeights",
    "as_transformers",
    "decoder_weights",
    "find",
    "head_weights",
    "load",
    "read_config",
    "read_tokenizer",
    "with_vocabulary",
]
