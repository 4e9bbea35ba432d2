"""PEFT's settings of an adapter that its tensors do not hold: alpha of each module, and what it is divided by."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from distrijax.convert.adapters.lora_names import PARTS
from distrijax.convert.adapters.merging import FULL, Change
from distrijax.errors import CheckpointError

KEY = "lora_adapter_metadata"
"""The key in a safetensors file's metadata where diffusers writes the settings of all parts, as JSON."""

PEFT_SETTINGS = "adapter_config.json"
"""The file beside an adapter where PEFT writes them."""

CHANGING = ("pissa", "olora", "corda", "loftq")
"""Initialisations (prefixes) with which PEFT changes the model's own weights: merged into others, such an adapter is wrong."""


@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
    """Of one part. alpha: None without one. patterns: of modules' names, with an alpha of their own."""

    alpha: float | None = None
    patterns: tuple[tuple[re.Pattern, float], ...] = ()
    rank_stabilised: bool = False

    @classmethod
    def read(cls, settings: Mapping[str, Any], what: str) -> Settings:
        start = settings.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(CHANGING):
            raise CheckpointError(
                f"{what} was initialised with {start}, which changes the model's own weights; have PEFT save it as a plain LoRA, "
                "with path_initial_model_for_weight_conversion"
            )
        patterns = settings.get("alpha_pattern") or {}
        alpha = settings.get("lora_alpha", settings.get("alpha"))
        try:
            return cls(
                None if alpha is None else float(alpha),
                tuple((re.compile(rf"(.*\.)?({end})"), float(value)) for end, value in patterns.items()),
                bool(settings.get("use_rslora")),
            )
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise CheckpointError(
                f"{what} has settings that PEFT does not write ({error}); fetch the file again"
            ) from None

    def applied(self, change: Change, module: str) -> Change:
        """A change of a module with the alpha of the settings, unless a tensor of the adapter holds one."""
        if "alpha" in change.factors or change.method is FULL:
            return change
        alpha = next((alpha for pattern, alpha in self.patterns if pattern.fullmatch(module)), self.alpha)
        return dataclasses.replace(change, alpha=alpha, rank_stabilised=self.rank_stabilised)


def read_settings(metadata: Mapping[str, Any] | None, what: str) -> dict[str, Settings]:
    """The settings of each part in a safetensors file's metadata or PEFT's adapter_config.json.

    what: the file, for the error. Raises CheckpointError for settings that cannot be read.
    """
    metadata = metadata or {}
    if "peft_type" in metadata:
        return dict.fromkeys(PARTS, Settings.read(metadata, what))
    try:
        content = dict(json.loads(metadata.get(KEY) or "{}"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{what} has metadata that diffusers does not write ({error}); fetch the file again"
        ) from None
    parts: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    return {part: Settings.read(settings, what) for part, settings in parts.items() if part in PARTS}
