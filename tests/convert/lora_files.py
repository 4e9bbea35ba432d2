"""LoRA files of random numbers as diffusers saves them, what PEFT makes of them, and their tensors in kohya's naming."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from adapters import (
    ATTENTION,
    CONVOLUTIONS,
    LINEAR,
    TEXT,
    add_adapter,
    file_tensors,
    fused,
    merged_by_peft,
    save_adapter,
    tensors_of,
)
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_pipeline import load_torch_pipeline

from distrijax.weights.tensors import Tensors

Weights = dict[str, dict[str, np.ndarray]]
CLOSE = 5e-6
"""Largest difference of weights near 1, both merged in float32."""


def unet_lora(**options) -> LoraConfig:
    modules = ATTENTION + LINEAR + (CONVOLUTIONS if options.pop("convolutions", False) else [])
    return LoraConfig(r=4, target_modules=modules, **{"lora_alpha": 6, **options})


def text_lora(**options) -> LoraConfig:
    return LoraConfig(r=3, target_modules=TEXT, **{"lora_alpha": 2, **options})


def saved(checkpoint: Path, folder: Path, configs: dict[str, LoraConfig], seed: int) -> tuple[Path, Weights]:
    """An adapter as diffusers saves it, and the weights that it leads to: the UNet as diffusers loads it from the file, the
    text encoders as PEFT merges them where they were made."""
    pipe = load_torch_pipeline(checkpoint)
    torch.manual_seed(seed)
    add_adapter(pipe, "one", configs)
    file = save_adapter(pipe, "one", list(configs), folder)
    expected = fused(pipe, [part for part in configs if part != "unet"])
    return file, {"unet": merged_by_peft(loaded_unet(checkpoint, {file: 1.0}))} | expected


def loaded_unet(checkpoint: Path, files: dict[Path, float]) -> torch.nn.Module:
    """The UNet of a pipeline with adapters that diffusers has loaded, with their weights."""
    pipe = load_torch_pipeline(checkpoint)
    for number, file in enumerate(files):
        metadata = json.loads(file_tensors(file)[1]["lora_adapter_metadata"])
        state = {name: tensor for name, tensor in load_file(file).items() if name.startswith("unet.")}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the second adapter is meant
            pipe.load_lora_into_unet(
                state, network_alphas=None, unet=pipe.unet, adapter_name=f"n{number}", metadata=metadata
            )
    pipe.unet.set_adapters([f"n{number}" for number in range(len(files))], list(files.values()))
    return pipe.unet


def to_kohya(file: Path, prefixes: dict[str, str]) -> Tensors:
    """A file of diffusers in kohya's naming, by diffusers' converter; alpha as its metadata says, DoRA's lengths dropped."""
    state = {name: tensor for name, tensor in load_file(file).items() if "magnitude" not in name}
    state = convert_state_dict_to_kohya(state)
    settings = json.loads(file_tensors(file)[1]["lora_adapter_metadata"])
    named = {}
    for name, tensor in state.items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        if name.endswith(".alpha"):
            tensor = torch.tensor(float(alpha_of(name, prefixes[prefix], settings)))
        named[name] = tensor
    return tensors_of(named)


def alpha_of(name: str, part: str, settings: dict) -> float:
    module = name.removesuffix(".alpha")
    ends = {key.replace(".", "_"): value for key, value in (settings.get(f"{part}.alpha_pattern") or {}).items()}
    return next((value for end, value in ends.items() if module.endswith(f"_{end}")), settings[f"{part}.lora_alpha"])


KOHYA = {"lora_te2_": "text_encoder_2", "lora_te1_": "text_encoder", "lora_unet_": "unet"}


def random_lora(module: str, outer: int, inner: int, *, kernel: tuple[int, ...] = (), rank: int = 2) -> Tensors:
    ones = (1,) * len(kernel)
    shapes = {"lora_down": (rank, inner, *kernel), "lora_up": (outer, rank, *ones)}
    return tensors_of({f"{module}.{role}.weight": torch.randn(shape) for role, shape in shapes.items()})
