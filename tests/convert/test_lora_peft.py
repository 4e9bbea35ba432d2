"""A LoRA that PEFT saved: its settings lie in a file beside it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapters import largest_difference
from facts import refuses, warns
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from lora_files import CLOSE, Weights
from peft import LoraConfig, get_peft_model
from tiny_pipeline import load_torch_pipeline

from distrijax.convert.sources import assemble
from distrijax.weights import hub
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.recipe import Recipe


@pytest.fixture(scope="module")
def peft_adapter(tiny_sd_checkpoints, tmp_path_factory) -> tuple[Path, Weights]:
    """A folder that PEFT saved, and the weights that it merges; copy it before changing it."""
    unet = load_torch_pipeline(tiny_sd_checkpoints[1]).unet
    model = get_peft_model(
        unet, LoraConfig(r=4, lora_alpha=32, target_modules=["to_q", "to_k"], alpha_pattern={"to_k": 3})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("peft") / "style"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder, {"unet": {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}}


def assembled(model: Path, *loras: Path | str) -> Checkpoint:
    recipe = Recipe(str(model), loras=tuple((str(lora), 1.0) for lora in loras))
    return assemble(recipe)[0]


@pytest.mark.parametrize("file", ["", "adapter_model.safetensors"])
def test_pefts_folder_merges_as_by_peft(tiny_sd_checkpoints, peft_adapter, file):
    folder, expected = peft_adapter
    assert largest_difference(assembled(tiny_sd_checkpoints[1], folder / file), expected) < CLOSE


@pytest.mark.parametrize("file", ["", "/adapter_model.safetensors"])
def test_pefts_settings_are_fetched_with_its_file(tiny_sd_checkpoints, peft_adapter, tmp_path, monkeypatch, file):
    folder, expected = peft_adapter

    def download(repository: str, name: str, **_) -> str:
        if not (folder / name).exists():
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return shutil.copy(folder / name, tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert largest_difference(assembled(tiny_sd_checkpoints[1], f"owner/style{file}"), expected) < CLOSE


def test_the_hub_is_waited_for_once_where_it_can_not_be_asked(tiny_sd_checkpoints, monkeypatch):
    asked = []

    def download(repository: str, name: str, *, local_files_only: bool, **_) -> str:
        asked.append((name, local_files_only))
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "constants", SimpleNamespace(HF_HUB_OFFLINE=False))
    with refuses("owner/style", "hub"):
        assembled(tiny_sd_checkpoints[1], "owner/style")
    assert asked == [("pytorch_lora_weights.safetensors", False), ("adapter_model.safetensors", True)]


def test_pefts_adapter_without_alpha_is_merged_with_a_warning(tiny_sd_checkpoints, peft_adapter, tmp_path):
    file = shutil.copy(peft_adapter[0] / "adapter_model.safetensors", tmp_path)
    with warns("adapter_model.safetensors", "PEFT", "adapter_config.json", "alpha"):
        assembled(tiny_sd_checkpoints[1], file)


def test_a_folder_without_a_lora_is_refused(tiny_sd_checkpoints, tmp_path):
    with refuses(str(tmp_path), "pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        assembled(tiny_sd_checkpoints[1], tmp_path)
