"""Checkpoints of torch pipelines, and adapters of random numbers for them, as the tests of convert/ need them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open

from distrijax.convert.layouts.folder import read_model
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.names import current_name
from distrijax.weights.tensors import Tensors, of_array

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in"]
LINEAR = ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def checkpoint_of(folder: Path) -> Checkpoint:
    """A folder in the diffusers layout, in memory."""
    index = json.loads((folder / "model_index.json").read_text())
    parts = [path.name for path in folder.iterdir() if path.is_dir()]
    configs = {
        part: json.loads(config.read_text()) for part in parts for config in (folder / part).glob("*config.json")
        if not part.startswith("tokenizer")
    }  # fmt: skip
    models = [part for part in parts if part == "unet" or part == "vae" or part.startswith("text_encoder")]
    files = {
        f"{part}/{file.name}": file.read_bytes()
        for part in parts if part.startswith("tokenizer") for file in (folder / part).iterdir()
    }  # fmt: skip
    tensors = {
        part: {name: of_array(tensor.read()) for name, tensor in read_model(folder / part).items()} for part in models
    }
    return Checkpoint(index, configs, tensors, files)


def tensors_of(state: dict[str, torch.Tensor]) -> Tensors:
    return {name: of_array(tensor.detach().numpy().copy()) for name, tensor in state.items()}


def file_tensors(file: Path) -> tuple[Tensors, dict[str, str] | None]:
    """The tensors of a safetensors file and its metadata."""
    with safe_open(file, framework="np") as opened:
        return {name: of_array(opened.get_tensor(name)) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


def add_adapter(pipe, name: str, configs: dict[str, LoraConfig], *, scale: float = 0.2) -> None:
    """Gives parts of a pipeline an adapter of random numbers; DoRA's lengths are changed by up to a half."""
    for part, config in configs.items():
        model = getattr(pipe, part)
        inject_adapter_in_model(config, model, adapter_name=name)
        model.peft_config = {**getattr(model, "peft_config", {}), name: config}
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{name}." not in f"{key}.":
                    continue
                if "lora_magnitude" in key:
                    parameter *= 0.5 + torch.rand_like(parameter)
                else:
                    parameter.copy_(scale * torch.randn_like(parameter))


def save_adapter(pipe, name: str, parts: list[str], folder: Path, *, with_metadata: bool = True) -> Path:
    """Writes an adapter with the pipeline's own `save_lora_weights`."""
    layers = {
        ("unet_lora_layers" if part == "unet" else f"{part}_lora_layers"): get_peft_model_state_dict(
            getattr(pipe, part), adapter_name=name
        )
        for part in parts
    }
    settings = {
        f"{part}_lora_adapter_metadata": getattr(pipe, part).peft_config[name].to_dict() for part in parts
    }  # fmt: skip
    for each in settings.values():
        each["target_modules"] = sorted(each["target_modules"])
    pipe.save_lora_weights(folder, **layers, **(settings if with_metadata else {}))
    return folder / "pytorch_lora_weights.safetensors"


def fused(pipe, parts: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """The weights of a pipeline with its active adapters merged by PEFT, under the names of checkpoints."""
    return {part: merged_by_peft(getattr(pipe, part)) for part in parts}


def merged_by_peft(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Its weights with its active adapters merged; the model is changed."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    state = {
        current_name(name.replace(".base_layer.", ".")): value.detach().numpy().copy()
        for name, value in model.state_dict().items()
        if not any(mark in name for mark in ("lora_", "hada_", "lokr_"))
    }
    return {name: value for name, value in state.items() if not name.endswith("position_ids")}


def largest_difference(checkpoint: Checkpoint, expected: dict[str, dict[str, np.ndarray]]) -> float:
    """Of all weights of the parts, which must be the same ones."""
    worst = 0.0
    for part, values in expected.items():
        held = {current_name(name): tensor for name, tensor in checkpoint.tensors[part].items()}
        assert held.keys() == values.keys()
        worst = max(worst, *(float(np.abs(held[name].read() - values[name]).max()) for name in held))
    return worst


def changed(before: Checkpoint, after: Checkpoint) -> set[str]:
    """The tensors that are not what they were."""
    return {
        f"{part}.{name}"
        for part, tensors in before.tensors.items()
        for name, tensor in tensors.items()
        if not np.array_equal(tensor.read(), after.tensors[part][name].read())
    }
