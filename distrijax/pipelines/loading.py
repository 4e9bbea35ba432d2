"""Loads the components of a checkpoint in the diffusers layout, local or on the Hugging Face hub, onto the mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from distrijax.config import Parallelism
from distrijax.errors import CheckpointError, checkpoint_errors
from distrijax.json_config import ModelConfig, read_json
from distrijax.models.clip import CLIPTextConfig, CLIPTextEncoder
from distrijax.models.families import FAMILIES, PARTS, Family
from distrijax.models.layers import abstract
from distrijax.models.tokenizer import CLIPTokenizer
from distrijax.models.unet import UNet
from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import AutoencoderKL, VAEConfig
from distrijax.schedulers import Scheduler, load_scheduler
from distrijax.validate import check_choice
from distrijax.weights import hub
from distrijax.weights.files import LOADABLE, check_variant
from distrijax.weights.load import load_module
from distrijax.weights.sharding import Model, ModelLayout


class Components(NamedTuple):
    """The components of a pipeline; tokenizers and text encoders in the order of `Family.suffixes`.

    Attributes:
        index: The content of model_index.json.
    """

    index: dict[str, Any]
    tokenizers: tuple[CLIPTokenizer, ...]
    text_encoders: tuple[Model, ...]
    unet: Model
    vae: Model
    scheduler: Scheduler


class Configs(NamedTuple):
    """The configurations in a pipeline's folder."""

    index: dict[str, Any]
    family: Family
    text_encoders: tuple[CLIPTextConfig, ...]
    unet: UNetConfig
    vae: VAEConfig
    scheduler: Scheduler


def find_folder(
    name: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """The local folder of a checkpoint; of one on the hub the needed files are fetched (see `hub.find`).

    Args:
        name: A path, hub id or URL of the hub.
        variant: Of the weights.
        revision: Of the hub.
        token: Of the hub.
        local_files_only: Whether to use only what was fetched before.
        weights: Whether weights are needed, or configurations alone.

    Raises:
        CheckpointError: If the checkpoint could not be found, or no component has weights of the variant.
    """
    formats = LOADABLE if weights else ()
    options = {"variant": variant, "revision": revision, "token": token, "offline": local_files_only}
    path = hub.find(name, parts=PARTS, formats=formats, **options)
    if not path.is_dir():
        raise CheckpointError(
            f"{name} is a file; give a folder in the diffusers layout, as python -m distrijax.convert {name} FOLDER makes one"
        )
    if weights:
        check_variant(path, PARTS, variant)
    return path


def find_family(folder: Path) -> Family:
    """The family of a pipeline's folder.

    Args:
        folder: The pipeline's folder.

    Raises:
        CheckpointError: For families that are not supported.
    """
    name = read_json(folder / "model_index.json").get("_class_name")
    with checkpoint_errors():
        check_choice(name, tuple(FAMILIES), f"{folder}/model_index.json: _class_name")
    return FAMILIES[name]


def read_configs(
    folder: Path,
    scheduler: str | None = None,
    scheduler_options: Mapping[str, Any] | None = None,
    *,
    needed: Family | None = None,
) -> Configs:
    """Reads the configurations of a pipeline's folder.

    Args:
        folder: The pipeline's.
        scheduler: A name in `distrijax.schedulers.SCHEDULERS` that replaces the folder's class.
        scheduler_options: Options that take precedence over the folder's.
        needed: The family that the pipeline must be of.

    Raises:
        CheckpointError: For a configuration that is missing, wrong or not supported.
        InvalidArgument: For a scheduler or an option of it that does not exist.
    """
    family = find_family(folder)
    if needed not in (None, family):
        raise CheckpointError(
            f"{folder} holds a {family.name} pipeline, not {needed.name}; load it with {family.pipeline}"
        )
    absent = [part for part in family.parts if not (folder / part).is_dir()]
    if absent:
        raise CheckpointError(f"{folder} lacks {', '.join(absent)}; give a complete {family.name} pipeline")
    options = read_json(folder / "scheduler" / "scheduler_config.json") | family.scheduler

    def read(name: str, kind: type[ModelConfig]) -> Any:
        return kind.from_dict(read_json(folder / name / "config.json"))

    return Configs(
        index=read_json(folder / "model_index.json"),
        family=family,
        text_encoders=tuple(read(name, CLIPTextConfig) for name in family.text_encoders),
        unet=read("unet", UNetConfig),
        vae=read("vae", VAEConfig),
        scheduler=load_scheduler(options, scheduler, scheduler_options),
    )


def abstract_components(
    folder: Path,
    configs: Configs,
    *,
    dtype: jnp.dtype,
    mesh: Mesh,
    parallelism: Parallelism,
    shard_weights: bool,
) -> Components:
    """The components of a pipeline's folder, with shapes in place of weights: errors in it are found before loading.

    Args:
        folder: The pipeline's.
        configs: The folder's.
        dtype: To compute in; the VAE's may differ (`VAEConfig.compute_dtype`).
        mesh: The devices.
        parallelism: How the UNet is parallelised.
        shard_weights: Whether large parameters are sharded flat.

    Raises:
        CheckpointError: For tokenizers that cannot be read, and components of different models.
    """
    family = configs.family
    tokenizers = tuple(CLIPTokenizer.from_folder(folder / name) for name in family.tokenizers)
    _check_together(folder, tokenizers, configs)

    def model(build: Callable, config: ModelConfig, dtype: jnp.dtype, parallelism=Parallelism.PATCH) -> Model:
        platform = mesh.devices.flat[0].platform
        form = ModelLayout.of(abstract(partial(build, config)), parallelism, shard=shard_weights, platform=platform)
        return Model.of(config, form, mesh, dtype)

    def text_encoder(name: str, config: CLIPTextConfig) -> Model:
        projected = family.pooled and name == family.text_encoders[-1]
        build = partial(CLIPTextEncoder, with_projection=projected, penultimate=family.penultimate)
        return model(build, config, dtype)

    return Components(
        index=configs.index,
        tokenizers=tokenizers,
        text_encoders=tuple(map(text_encoder, family.text_encoders, configs.text_encoders)),
        unet=model(UNet, configs.unet, dtype, parallelism),
        vae=model(AutoencoderKL, configs.vae, configs.vae.compute_dtype(dtype)),
        scheduler=configs.scheduler,
    )


def read_components(
    components: Components, folder: Path, family: Family, *, variant: str | None, mesh: Mesh
) -> Components:
    """The result of `abstract_components` with weights in place of shapes.

    Raises:
        CheckpointError: For weights that are not those of the configurations.
    """

    def read(name: str, model: Model) -> Model:
        place = model.form.make_placer(mesh)
        module = load_module(model.form.abstract(), folder / name, variant=variant, dtype=model.dtype, place=place)
        return model._replace(params=model.form.fuse_params(module))

    return components._replace(
        text_encoders=tuple(map(read, family.text_encoders, components.text_encoders)),
        unet=read("unet", components.unet),
        vae=read("vae", components.vae),
    )


def _check_together(folder: Path, tokenizers: tuple[CLIPTokenizer, ...], configs: Configs) -> None:
    """Raises DistriError for components of different models."""
    unet, vae, texts = configs.unet, configs.vae, configs.text_encoders
    if unet.addition_embed_type and not configs.family.pooled:
        raise CheckpointError(
            f"{folder}: the UNet's addition_embed_type is {unet.addition_embed_type!r} and the text encoder of "
            f"{configs.family.name} gives no pooled embedding; use components of one model"
        )
    dims = unet.cross_attention_dim
    widths = "text encoders' widths add up to" if len(texts) > 1 else "text encoder's width is"
    pairs = [
        ("UNet's cross_attention_dim", dim, widths, sum(text.hidden_size for text in texts))
        for dim in (dims if isinstance(dims, tuple) else (dims,))
    ]
    pairs.append(("UNet's in_channels", unet.in_channels, "VAE's latent_channels is", vae.latent_channels))
    for name, value, other, needed in pairs:
        if value != needed:
            raise CheckpointError(
                f"{folder}: the {name} is {value} and the {other} {needed}; use components of one model"
            )
    for number, (tokenizer, encoder) in enumerate(zip(tokenizers, texts, strict=True), 1):
        if tokenizer.vocab_size > encoder.vocab_size:
            raise CheckpointError(
                f"{folder}: tokenizer {number} has {tokenizer.vocab_size} tokens and its text encoder {encoder.vocab_size}; "
                "use components of one model"
            )
