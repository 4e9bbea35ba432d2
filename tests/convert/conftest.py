"""Checkpoints in memory and adapters for them, which the tests of convert/ share; leave them as they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from distrijax.weights.checkpoint import Checkpoint

if TYPE_CHECKING:  # these import torch, which may be missing: the fixtures that use them are skipped then
    from lora_files import Weights


@pytest.fixture(scope="session")
def checkpoints(tiny_checkpoint, tiny_sd_checkpoints) -> dict[str | int, Checkpoint]:
    """By family: "xl", and the versions 1 and 2 of Stable Diffusion."""
    from adapters import checkpoint_of

    folders = {"xl": tiny_checkpoint, **tiny_sd_checkpoints}
    return {family: checkpoint_of(folder) for family, folder in folders.items()}


@pytest.fixture(scope="session")
def xl(checkpoints) -> Checkpoint:
    return checkpoints["xl"]


@pytest.fixture(scope="session")
def sd(checkpoints) -> Checkpoint:
    return checkpoints[1]


@pytest.fixture(scope="session")
def xl_saved(tiny_checkpoint, tmp_path_factory) -> tuple[Path, Weights]:
    """A LoCon of all three models of SDXL."""
    from lora_files import saved, text_lora, unet_lora

    configs = {
        "unet": unet_lora(convolutions=True, alpha_pattern={"to_q": 3, "attn2.to_k": 11}),
        "text_encoder": text_lora(),
        "text_encoder_2": text_lora(lora_alpha=5),
    }
    return saved(tiny_checkpoint, tmp_path_factory.mktemp("xl_lora"), configs, 1)


@pytest.fixture(scope="session")
def xl_file(xl_saved) -> Path:
    return xl_saved[0]


@pytest.fixture(scope="session")
def xl_expected(xl_saved) -> Weights:
    return xl_saved[1]


@pytest.fixture(scope="session")
def dora(tiny_checkpoint, tmp_path_factory) -> tuple[Path, Weights]:
    """DoRA of linear layers and convolutions."""
    from lora_files import saved, text_lora, unet_lora

    configs = {"unet": unet_lora(convolutions=True, use_dora=True), "text_encoder": text_lora(use_dora=True)}
    return saved(tiny_checkpoint, tmp_path_factory.mktemp("xl_dora"), configs, 2)
