"""p2l-engine info."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from p2l_engine.cli.inputs import Checkpoint, Date, Device, Dtype, load_engine
from p2l_engine.cli.terminal import out

if TYPE_CHECKING:
    from p2l_engine.engine import Engine


def info(checkpoint: Checkpoint = None, device: Device = None, dtype: Dtype = None, date: Date = None) -> None:
    """Show versions, the device, and what the checkpoint holds."""
    from importlib.metadata import version

    import torch
    from rich.table import Table
    from rich.text import Text

    from p2l_engine import __version__
    from p2l_engine.native import binding

    engine = load_engine(checkpoint, device, dtype, date)
    table = Table(show_header=False)
    rows = {
        "p2l-engine": __version__,
        "torch, transformers": f"{torch.__version__}, {version('transformers')}",
        "device": torch.cuda.get_device_name(engine.device)
        if engine.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(engine.dtype).removeprefix("torch."),
        "native core": f"{binding.isa()}, up to {binding.max_threads()} threads",
        "backbone": f"{engine.backbone.name}, {engine.n_parameters / 1e6:.0f} M parameters",
        "checkpoint": str(engine.folder),
        "consecutive user turns": "joined by blank lines" if engine.encoder.tokenizer.template.joins else "one message each",
        "feedback model": engine.feedback.name,
        "beside the head": ", ".join(_beside(engine)) or "nothing",
        f"{len(engine.models)} models": "\n".join(engine.models),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    out().print(table)


def _beside(engine: Engine) -> Iterator[str]:
    """What else the checkpoint computes of a hidden state."""
    if engine.topics is not None:
        yield f"{len(engine.topics.names)} topics of hidden states{'' if engine.topics.of_words is None else ' and words'}"
    if engine.shrinkage is not None:
        yield "shrinkage of far prompts"
    if engine.theta_map is not None:
        yield "calibrated coefficients"
    if engine.uncertainty is not None:
        yield "deviations of coefficients"
    if engine.lengths is not None:
        yield "expected lengths of answers"
