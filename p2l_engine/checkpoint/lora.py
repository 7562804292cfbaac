"""The settings of a LoRA adapter (peft's adapter_config.json): the modules that it is on, their ranks and scales.

A setting is accepted where the merged weights are known to be W + scale B A: it does not change them, it is off, or it is
computed here. Every other one is refused by name, unknown ones among them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2l_engine.errors import CheckpointError

# Where the adapter comes from, how it was trained, and what belongs to settings that are off.
WITHOUT_EFFECT = {
    "base_model_name_or_path", "auto_mapping", "peft_version", "task_type", "inference_mode", "lora_dropout", "megatron_core",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying",
}  # fmt: skip
READ_HERE = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern",
}  # fmt: skip
ACCEPTED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "revision": (None, "main"),
    # The others (pissa, olora, corda, loftq, lora_ga) change the backbone's weights before the training.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "modules_to_save": (None, [], ["head"]),  # the head is in every adapter folder
}
OFF: tuple[object, ...] = (None, False, [], {})
REMEDIES = {
    "init_lora_weights": "it changed the backbone's weights; save the adapter as plain LoRA (in peft: "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)), or merge it with peft",
    "revision": "download that revision, and name its folder in base_model_name_or_path",
}
PLAIN_NAME = re.compile(r"[\w.]+")


@dataclass(frozen=True, slots=True)
class Lora:
    """The settings in the file ``path``. ranks, alphas: of single modules; the others have ``rank`` and ``alpha``."""

    path: Path
    values: Mapping[str, Any]
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    stabilised: bool  # rsLoRA (Kalajdzievski 2023)

    @classmethod
    def read(cls, path: Path, values: Mapping[str, Any]) -> Lora:
        """From the content of the file ``path``. Raises CheckpointError for what is missing, wrong or not known to be exact."""
        for key, value in values.items():
            accepted = ACCEPTED.get(key, OFF)
            if key in WITHOUT_EFFECT | READ_HERE or any(type(value) is type(one) and value == one for one in accepted):
                continue
            expected = "it to be off" if accepted is OFF else f"one of {list(accepted)}"
            remedy = REMEDIES.get(key, "merge the adapter into the backbone with what made it")
            raise CheckpointError(f"{path}: {key}: expected {expected}, found {value!r:.80}: not supported; {remedy}")
        stabilised = values.get("use_rslora") or False
        if not isinstance(stabilised, bool):
            raise CheckpointError(f"{path}: use_rslora: expected true or false, found {stabilised!r}")
        return cls(
            path,
            values,
            field(path, values, "r", int),
            float(field(path, values, "lora_alpha", int | float)),
            _pattern(path, values, "rank_pattern", int),
            _pattern(path, values, "alpha_pattern", int | float),
            stabilised,
        )

    def rank_of(self, module: str) -> int:
        """The rank of a module, such as layers.0.self_attn.q_proj."""
        return int(self._own(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What the product of its factors is multiplied by."""
        alpha, rank = float(self._own(self.alphas, module, self.alpha)), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.stabilised else rank)

    def _own(self, pattern: Mapping[str, float], module: str, default: float) -> float:
        # Regular expressions for ends of names, in every version of peft: a dot stands for any character.
        found = {value for name, value in pattern.items() if re.fullmatch(rf".*\.{name}", f".model.{module}")}
        if len(found) > 1:
            raise CheckpointError(f"{self.path}: rank_pattern, alpha_pattern: expected one value for {module}, found several")
        return found.pop() if found else default

    def targets(self, modules: Iterable[str]) -> set[str] | None:
        """Those of the backbone's modules that the adapter is on: none where the list is empty, so that the head is all that
        it has; None where the settings do not say which.

        peft's rules (tuners_utils.check_target_module_exists): a text is a regular expression for the whole name, and a list
        has ends of names. The backbone's names start with "model." or not, as the adapter was made. Raises CheckpointError.
        """
        given = self.values.get("target_modules")
        if given is None:
            return None
        if given == []:
            return set()
        found = {name for name in modules if self._selected("target_modules", name) and self._in_layers(name)}
        found -= {name for name in found if self._selected("exclude_modules", name)}
        if not found:
            raise CheckpointError(f"{self.path}: target_modules: expected some of the backbone's, found {given!r:.80}")
        return found

    def _selected(self, key: str, module: str) -> bool:
        given = self.values.get(key)
        if not given:
            return False
        if given == "all-linear":
            return True
        if isinstance(given, str):
            expression = self._compiled(key, given)
            return any(expression.fullmatch(name) for name in (module, f"model.{module}"))
        if not isinstance(given, list) or not all(isinstance(end, str) for end in given):
            raise CheckpointError(f"{self.path}: {key}: expected a list of names, found {given!r:.80}")
        return any(_ends_with(module, end) for end in given)

    def _in_layers(self, module: str) -> bool:
        layers, patterns = self.values.get("layers_to_transform"), self.values.get("layers_pattern") or r"[^.]*"
        given = self.values["target_modules"]
        if layers in (None, []) or isinstance(given, str) or {module, f"model.{module}"} & set(given):
            return True
        wanted = layers if isinstance(layers, list) else [layers]
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            match = self._compiled("layers_pattern", rf"(?:.*?\.)?{pattern}\.(?P<layer>\d+)\.").match(f"model.{module}")
            if match:
                return int(match["layer"]) in wanted
        return False

    def _compiled(self, key: str, expression: str) -> re.Pattern[str]:
        try:
            return re.compile(expression)
        except re.error as error:
            raise CheckpointError(f"{self.path}: {key}: expected a regular expression, found {expression!r}: {error}") from None


def field(path: Path, values: Mapping[str, Any], key: str, kind: Any) -> Any:
    """A value of this type that is neither zero, empty nor infinite. Raises CheckpointError."""
    value = values.get(key)
    infinite = isinstance(value, float) and not math.isfinite(value)
    if not isinstance(value, kind) or isinstance(value, bool) or not value or infinite:
        raise CheckpointError(f"{path}: {key}: expected a {getattr(kind, '__name__', 'number')}, found {value!r}")
    return value


def _ends_with(module: str, end: str) -> bool:
    return f".model.{module}".endswith(f".{end}")


def _pattern(path: Path, values: Mapping[str, Any], key: str, kind: Any) -> dict[str, Any]:
    """A mapping from ends of modules' names to numbers; regular expressions differ between versions of peft."""
    given = values.get(key) or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{path}: {key}: expected a mapping, found {given!r:.80}")
    for name in given:
        if not PLAIN_NAME.fullmatch(name):
            raise CheckpointError(f"{path}: {key}: expected names of modules, found the pattern {name!r}: not supported")
        field(path, given, name, kind)
    return given
