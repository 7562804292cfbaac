"""p2l-engine info."""

from __future__ import annotations

from p2l_engine.cli.inputs import Checkpoint, Date, Device, Dtype, load_engine
from p2l_engine.cli.terminal import out


def info(checkpoint: Checkpoint = None, device: Device = None, dtype: Dtype = None, date: Date = None) -> None:
    """Show versions, the device, and what the checkpoint holds."""
    from importlib.metadata import version

    import torch
    from rich.table import Table
    from rich.text import Text

    from p2l_engine import __version__
    from p2l_engine.engine import described
    from p2l_engine.native import binding

    engine = load_engine(checkpoint, device, dtype, date)
    table = Table(show_header=False)
    rows = {
        "p2l-engine": __version__,
        "torch, transformers": f"{torch.__version__}, {version('transformers')}",
        "device": torch.cuda.get_device_name(engine.device)
        if engine.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "dtype": described(engine.dtype),
        "native core": f"{binding.isa()}, up to {binding.max_threads()} threads",
        "backbone": f"{engine.backbone.name}, {engine.n_parameters / 1e6:.0f} M parameters",
        "checkpoint": str(engine.folder),
        "consecutive user turns": "joined by blank lines" if engine.encoder.tokenizer.template.joins else "one message each",
        "feedback model": engine.feedback.name,
        f"{len(engine.models)} models": "\n".join(engine.models),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    out().print(table)
