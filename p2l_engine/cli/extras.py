"""Which extra of the package installs a module that is missing."""

from __future__ import annotations

import importlib.metadata
import re
from collections import defaultdict

DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}  # where the name on the package index is another
DEVELOPMENT = {"bench", "lint", "test"}


def extras_of(module: str) -> list[str]:
    """The extras that install the module's distribution, the smallest first; from the installed package's metadata."""
    try:
        requirements = importlib.metadata.requires("p2l-engine") or []
    except importlib.metadata.PackageNotFoundError:
        return []  # imported from a clone that is not installed
    brings: dict[str, set[str]] = defaultdict(set)
    for line in requirements:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"""extra\s*==\s*['"]([^'"]+)""", line)
        if name and extra:
            brings[extra[1]].add(name[0].lower())
    top = module.partition(".")[0]
    wanted = DISTRIBUTIONS.get(top, top).lower()
    found = [extra for extra, names in brings.items() if wanted in names and extra not in DEVELOPMENT]
    return sorted(found, key=lambda extra: len(brings[extra]))


def hint(module: str | None) -> str:
    """What to install where ``module`` is missing, the smallest extra, to put behind an error's message; empty where no extra
    brings it."""
    extras = extras_of(module or "")
    if not extras:
        return ""
    return f": this command needs the extra {extras[0]!r}: pip install 'p2l-engine[{extras[0]}]'"
