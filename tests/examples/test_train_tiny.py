"""The training script, a step of each stage on few images: what it writes is a pipeline, and it goes on where it was."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import tiny_data
import train_tiny
from facts import says
from marks import slow
from safetensors.numpy import load_file

from distrijax import DistriConfig, DistriSDXLPipeline
from distrijax.models.layers import abstract
from distrijax.models.unet import abstract_unet
from distrijax.models.vae import AutoencoderKL

STAGES = ("vae", "text", "small", "large", "decoder")


def train(folder, *flags: str, **steps: int) -> None:
    given = (f"--{stage}-steps={steps.get(stage, 1)}" for stage in STAGES)
    # optax relies on both
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        train_tiny.main(["--output", str(folder), *given, *flags])


SMALL = {
    "TRAINING_IMAGES": {"unet-128": [(128, 128, 32)], "unet-256": [(128, 192, 32)]},
    "BATCH_SIZES": {"unet-128": 4, "unet-256": 4},
    "VAE": dataclasses.replace(train_tiny.VAE, block_out_channels=(8, 8, 16, 16)),
    "UNET": dataclasses.replace(
        train_tiny.UNET,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(1, 2),
    ),
}
"""In place of the script's own models, whose gradients take minutes to compile, and gigabytes."""


def small_crops(seeds: list[int], first: int, **_: int) -> np.ndarray:
    return tiny_data.scene_crops(seeds, first, count=4, side=32, size=64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(train_tiny, name, value)
        patch.setattr(train_tiny, "crops", lambda seed, step: small_crops([seed, step], step * 4))
        patch.setattr(train_tiny, "scene_crops", small_crops)
        train(folder)
        yield folder


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--output file", ["--output", "file", "Not a directory"]),
        ("--output new --vae-steps -1", ["--vae-steps", -1, 1]),
        ("--output new --large-steps 0", ["--large-steps", 0, 1]),
        ("--output new --seed -1", ["--seed", -1, 0]),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_written(flags, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_tiny, "train_tokenizer", lambda *_, **__: pytest.fail("training began"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        train_tiny.main(flags.split())
    says(last_error(capsys), *told)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def last_error(capsys) -> str:
    """The last line of the script, which is an error."""
    *_, line = capsys.readouterr().err.splitlines()
    assert re.match(r"(\S+: )?error: ", line)
    return line


def weights(folder) -> dict[str, np.ndarray]:
    return {
        f"{path.parent.name}.{name}": tensor
        for path in sorted(folder.glob("*/*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_the_scripts_own_models_fit_together():
    unet, widths = abstract_unet(train_tiny.UNET), train_tiny.TEXT_WIDTHS
    assert unet.config.in_channels == train_tiny.VAE.latent_channels
    assert unet.config.cross_attention_dim == sum(widths)
    assert unet.config.projection_class_embeddings_input_dim == widths[1] + 6 * unet.config.addition_time_embed_dim
    abstract(functools.partial(AutoencoderKL, train_tiny.VAE))


@slow
def test_the_result_is_a_pipeline(trained):
    pipe = DistriSDXLPipeline.from_pretrained(trained, DistriConfig(devices=1))
    pipe.set_progress_bar_config(disable=True)
    (image,) = pipe("a red circle on the left", height=64, width=64, num_inference_steps=1).images
    assert image.size == (64, 64)


@slow
def test_every_stage_has_learned_something_and_is_not_done_again(trained):
    before = weights(trained)
    assert {name.split(".")[0] for name in before} == {"vae", "unet", "text_encoder", "text_encoder_2"}
    for name in ("unet.conv_out.weight", "vae.decoder.conv_out.weight", "vae.encoder.conv_in.weight"):
        assert np.abs(before[name]).max() > 0
    train(trained)
    after = weights(trained)
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)


@slow
@pytest.mark.parametrize("flag", ["--seed", "--vae-steps", "--text-steps", "--small-steps"])
def test_what_a_later_stage_was_made_with_is_not_changed(flag, trained, monkeypatch, capsys):
    monkeypatch.setattr(train_tiny, "train_tokenizer", lambda *_, **__: pytest.fail("training began"))
    old = 0 if flag == "--seed" else 1
    with pytest.raises(SystemExit):
        train(trained, flag, "7")
    says(last_error(capsys), "--output", str(trained), f"{flag} {old}", 7)


def test_what_nothing_was_made_with_yet_may_change(tmp_path, monkeypatch):
    class BeganError(Exception):
        pass

    def begin(*_, **__):
        raise BeganError

    monkeypatch.setattr(train_tiny, "train_tokenizer", begin)
    for seed in ("0", "1"):
        with pytest.raises(BeganError):
            train(tmp_path, "--seed", seed)


@slow
def test_more_steps_go_on_from_the_checkpoint_and_fewer_are_refused(trained, capsys):
    before = weights(trained)
    train(trained, decoder=3)
    after = weights(trained)
    changed = {name for name in before if not np.array_equal(after[name], before[name])}
    assert "vae.decoder.conv_out.weight" in changed
    assert all(name.startswith("vae.decoder.") for name in changed)
    assert (trained / "checkpoints" / "decoder" / "3").is_dir()
    with pytest.raises(SystemExit):
        train(trained)
    folder = trained / "checkpoints" / "decoder"
    says(last_error(capsys), "--decoder-steps", 1, str(folder), 3)
