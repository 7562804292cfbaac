"""Shared by all plots: colours that colour-blind readers can tell apart (Okabe and Ito's), and files. Needs matplotlib."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from p2l_engine.tables.atomic import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP = 20  # models that tables and plots show, best first
BLUE, ORANGE, YELLOW, GREY = "#0072B2", "#D55E00", "#E69F00", "#888888"
DIVERGING, SEQUENTIAL = "PuOr", "cividis"  # colour maps: around a half, and from 0 up

logger = logging.getLogger(__name__)


def save(figure: Figure, path: str | Path) -> None:
    """Writes the figure, in the format that the path's suffix names. Logs one warning where the font lacks characters."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=150, format=Path(path).suffix[1:].lower() or "png")
    write_file(path, drawn.getbuffer())
    lacking = [w for w in seen if "missing from font" in str(w.message)]
    if lacking:
        logger.warning("%s: the plot's font lacks %d of its characters, which are drawn as boxes", path, len(lacking))
    for w in seen:
        if w not in lacking:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
