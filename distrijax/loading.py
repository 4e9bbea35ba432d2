"""A pipeline's folder in the diffusers layout, local or on the Hugging Face hub, read onto the mesh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from distrijax.clip import CLIPTextConfig, CLIPTextEncoder
from distrijax.config import DistriError, Parallelism, check_choice
from distrijax.schedulers import Scheduler, load_scheduler
from distrijax.tensor import place_on
from distrijax.tokenizer import CLIPTokenizer
from distrijax.unet import UNet, UNetConfig, abstract_unet
from distrijax.vae import AutoencoderKL, VAEConfig
from distrijax.weights import Place, load_module, read_json

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae", "scheduler")


class Components(NamedTuple):
    """The parts of a Stable Diffusion XL pipeline."""

    index: dict[str, Any]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    text_encoders: tuple[CLIPTextEncoder, CLIPTextEncoder]
    unet: UNet
    vae: AutoencoderKL
    scheduler: Scheduler


class Configs(NamedTuple):
    """What a pipeline's folder says of its models, without a weight."""

    index: dict[str, Any]
    text_encoder: CLIPTextConfig
    text_encoder_2: CLIPTextConfig
    unet: UNetConfig
    vae: VAEConfig
    scheduler: Scheduler


def resolve_dtype(dtype: Any, platform: str) -> jnp.dtype:
    """The dtype to compute in: the one asked for, else bfloat16 on accelerators and float32 on CPUs."""
    if dtype is None:
        return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    try:
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        name = type(dtype).__name__
    if name not in DTYPES:
        raise DistriError(f"dtype is {name!r}; use one of: {', '.join(DTYPES)}")
    return jnp.dtype(DTYPES[name])


def find_folder(name: str | Path, *, variant: str | None, revision: str | None, token: str | bool | None) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded (only the files needed) into the hub's cache."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1:
        raise DistriError(f"{name} is not a folder; give a folder in the diffusers layout or a hub id like owner/model")
    weights = f"*.{variant}*.safetensors" if variant else "*.safetensors"
    needed = [f"{part}/{pattern}" for part in PARTS for pattern in ("*.json", "*.txt", weights)]
    others = [] if variant else ["*/*.fp16.safetensors", "*/*.fp16-*.safetensors"]
    try:
        return Path(
            snapshot_download(
                str(name),
                revision=revision,
                token=token,
                allow_patterns=["model_index.json", *needed],
                ignore_patterns=others,
            )
        )
    except GatedRepoError:
        raise DistriError(f"{name} is gated; accept its terms on the hub and give a token that may read it") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise DistriError(f"{name} is neither a folder here nor a model on the hub; check the spelling") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DistriError(
            f"{name} could not be fetched from the hub ({_first_line(error)}); try again or give a folder"
        ) from None


def read_configs(folder: Path, scheduler: str | None = None) -> Configs:
    """The configurations of a pipeline's folder; raises DistriError where one is absent, wrong or not supported."""
    index = read_json(folder / "model_index.json")
    check_choice(index.get("_class_name"), ("StableDiffusionXLPipeline",), f"{folder}/model_index.json: _class_name")
    absent = [part for part in PARTS if not (folder / part).is_dir()]
    if absent:
        raise DistriError(f"{folder} lacks {', '.join(absent)}; a whole Stable Diffusion XL pipeline is needed")
    chosen = load_scheduler(read_json(folder / "scheduler" / "scheduler_config.json"), scheduler)
    kinds = {"text_encoder": CLIPTextConfig, "text_encoder_2": CLIPTextConfig, "unet": UNetConfig, "vae": VAEConfig}
    models = {name: kind.from_dict(read_json(folder / name / "config.json")) for name, kind in kinds.items()}
    return Configs(index=index, scheduler=chosen, **models)


def default_size(unet: UNetConfig, vae: VAEConfig) -> tuple[int, int]:
    """Height and width in pixels that a model was trained for."""
    size = unet.sample_size or 128
    height, width = size if isinstance(size, tuple) else (size, size)
    return height * vae.scale, width * vae.scale


def load_components(
    folder: Path,
    *,
    dtype: jnp.dtype,
    variant: str | None,
    scheduler: str | None,
    mesh: Mesh,
    parallelism: Parallelism,
) -> Components:
    """All parts of a pipeline's folder. Configurations are read first, so that a wrong one costs no loading.

    scheduler: a name out of `distrijax.schedulers.SCHEDULERS` that takes the place of the folder's own class. mesh,
    parallelism: where the parameters go.
    The VAE is float32 where half precision would overflow (`force_upcast` and float16, as in diffusers).
    """
    configs = read_configs(folder, scheduler)
    tokenizers = CLIPTokenizer.from_folder(folder / "tokenizer"), CLIPTokenizer.from_folder(folder / "tokenizer_2")
    _check_together(folder, tokenizers, configs)

    whole = place_on(mesh)

    def load(name: str, build: Callable, dtype: jnp.dtype = dtype, place: Place = whole):
        return load_module(
            lambda rngs: build(getattr(configs, name), rngs=rngs),
            folder / name,
            variant=variant,
            dtype=dtype,
            place=place,
        )

    def text_encoder(with_projection: bool) -> Callable:
        return lambda config, rngs: CLIPTextEncoder(config, with_projection=with_projection, rngs=rngs)

    upcast = configs.vae.force_upcast and dtype == jnp.float16
    return Components(
        index=configs.index,
        tokenizers=tokenizers,
        text_encoders=(load("text_encoder", text_encoder(False)), load("text_encoder_2", text_encoder(True))),
        unet=load("unet", UNet, place=place_on(mesh, parallelism, abstract_unet(configs.unet))),
        vae=load("vae", AutoencoderKL, jnp.dtype(jnp.float32) if upcast else dtype),
        scheduler=configs.scheduler,
    )


def _check_together(folder: Path, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], configs: Configs) -> None:
    """Raises DistriError for parts of different models."""
    _, text, text_2, unet, vae, _ = configs
    dims = unet.cross_attention_dim
    pairs = [
        ("UNet's cross_attention_dim", dim, "text encoders' widths add up to", text.hidden_size + text_2.hidden_size)
        for dim in (dims if isinstance(dims, tuple) else (dims,))
    ]
    pairs.append(("UNet's in_channels", unet.in_channels, "VAE's latent_channels is", vae.latent_channels))
    for name, value, other, needed in pairs:
        if value != needed:
            raise DistriError(f"{folder}: the {name} is {value} and the {other} {needed}; use parts of one model")
    for number, (tokenizer, encoder) in enumerate(zip(tokenizers, (text, text_2), strict=True), 1):
        if tokenizer.vocab_size > encoder.vocab_size:
            raise DistriError(
                f"{folder}: tokenizer {number} has {tokenizer.vocab_size} words and its text encoder {encoder.vocab_size}; "
                "use parts of one model"
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
