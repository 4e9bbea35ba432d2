"""Loads the components of a checkpoint onto the mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp
from jax.sharding import Mesh

from distrijax.config import DistriConfig, Parallelism
from distrijax.convert.sources import open_checkpoint
from distrijax.errors import CheckpointError, InvalidArgument, checkpoint_errors
from distrijax.json_config import ModelConfig
from distrijax.models.clip import CLIPTextConfig, CLIPTextEncoder
from distrijax.models.families import FAMILIES, Family
from distrijax.models.layers import abstract
from distrijax.models.tokenizer import CLIPTokenizer
from distrijax.models.unet import UNet
from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import AutoencoderKL, VAEConfig
from distrijax.schedulers import Scheduler, load_scheduler
from distrijax.validate import check_choice
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.load import check_tensors, load_module
from distrijax.weights.names import current_name
from distrijax.weights.recipe import Additions, check_names
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
    """The configurations of a pipeline."""

    index: dict[str, Any]
    family: Family
    text_encoders: tuple[CLIPTextConfig, ...]
    unet: UNetConfig
    vae: VAEConfig
    scheduler: Scheduler


def check_arguments(given: Mapping[str, Any], load: Callable) -> None:
    """Checks the names of arguments of `from_pretrained`.

    Args:
        given: Arguments by name.
        load: `from_pretrained`.

    Raises:
        InvalidArgument: For the first one that there is not, and for a DistriConfig by the name of another argument.
    """
    check_names(given, load)
    if isinstance(given.get("config"), DistriConfig):
        raise InvalidArgument(
            "config is a DistriConfig, and names a single file's configurations; give it as distri_config"
        )


def opened(
    name: str | Path | Checkpoint,
    *,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **additions: Unpack[Additions],
) -> Checkpoint:
    """The checkpoint that `from_pretrained` was given, opened and not read.

    Args:
        name: As of `from_pretrained`; an opened checkpoint is returned as it is.
        variant: Of the weights.
        revision: Of the hub.
        token: Of the hub.
        local_files_only: Whether to use only what was fetched before.
        **additions: What goes on top of it.

    Raises:
        CheckpointError: For what cannot be found or read, or does not fit together.
        InvalidArgument: For additions of other types, and for any to an opened checkpoint.
    """
    additions = {"variant": variant, "revision": revision, **additions}
    if not isinstance(name, Checkpoint):
        return open_checkpoint(name, token=token, offline=local_files_only, **additions)
    if given := [key for key, value in additions.items() if value]:
        raise InvalidArgument(f"{', '.join(given)} of an opened checkpoint is fixed; give it to open_checkpoint")
    if not name.tensors:
        raise InvalidArgument(f"{name.what} was opened without weights; open it with weights=True")
    return name


def find_family(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint.

    Args:
        checkpoint: The checkpoint.

    Raises:
        CheckpointError: For families that are not supported.
    """
    name = checkpoint.index.get("_class_name")
    with checkpoint_errors():
        check_choice(name, tuple(FAMILIES), f"{checkpoint.what}/model_index.json: _class_name")
    return FAMILIES[name]


def read_configs(
    checkpoint: Checkpoint,
    scheduler: str | None = None,
    scheduler_options: Mapping[str, Any] | None = None,
    *,
    needed: Family | None = None,
) -> Configs:
    """Reads the configurations of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        scheduler: A name in `distrijax.schedulers.SCHEDULERS` that replaces the checkpoint's class.
        scheduler_options: Options that take precedence over the checkpoint's.
        needed: The family that the pipeline must be of.

    Raises:
        CheckpointError: For a configuration that is missing, wrong or not supported.
        InvalidArgument: For a scheduler or an option of it that does not exist, or has another value than those allowed.
    """
    family = find_family(checkpoint)
    if needed not in (None, family):
        raise CheckpointError(
            f"{checkpoint.what} holds a {family.name} pipeline, not {needed.name}; load it with {family.pipeline}"
        )
    there = {*checkpoint.configs, *(name.partition("/")[0] for name in checkpoint.files)}
    if absent := [part for part in family.parts if part not in there]:
        raise CheckpointError(f"{checkpoint.what} lacks {', '.join(absent)}; give a complete {family.name} pipeline")

    def read(name: str, kind: type[ModelConfig]) -> Any:
        return kind.from_dict(checkpoint.configs[name])

    return Configs(
        index=checkpoint.index,
        family=family,
        text_encoders=tuple(read(name, CLIPTextConfig) for name in family.text_encoders),
        unet=read("unet", UNetConfig),
        vae=read("vae", VAEConfig),
        scheduler=load_scheduler(checkpoint.configs["scheduler"] | family.scheduler, scheduler, scheduler_options),
    )


def abstract_components(
    checkpoint: Checkpoint,
    configs: Configs,
    *,
    dtype: jnp.dtype,
    mesh: Mesh,
    parallelism: Parallelism,
    shard_weights: bool,
) -> Components:
    """The components of a pipeline, with shapes in place of weights: errors in it are found before loading.

    Args:
        checkpoint: The pipeline's.
        configs: The checkpoint's.
        dtype: To compute in; the VAE's may differ (`VAEConfig.compute_dtype`).
        mesh: The devices.
        parallelism: How the UNet is parallelised.
        shard_weights: Whether large parameters are sharded flat.

    Raises:
        CheckpointError: For tokenizers that cannot be read, components of different models, and tensors that are not those of
            the configurations.
    """
    family = configs.family
    tokenizers = tuple(
        CLIPTokenizer.from_files(checkpoint.files_of(name), f"{checkpoint.what}/{name}") for name in family.tokenizers
    )
    _check_together(checkpoint.what, tokenizers, configs)

    def model(name: str, build: Callable, dtype: jnp.dtype, parallelism=Parallelism.PATCH) -> Model:
        config = build.args[0]
        platform = mesh.devices.flat[0].platform
        form = ModelLayout.of(abstract(build), parallelism, shard=shard_weights, platform=platform)
        if checkpoint.tensors:
            held = {current_name(name): tensor for name, tensor in checkpoint.tensors[name].items()}
            check_tensors(held, zip(form.paths, form.shapes, strict=True), checkpoint.origin(name))
        return Model.of(config, form, mesh, dtype)

    def text_encoder(name: str, config: CLIPTextConfig) -> Model:
        projected = family.pooled and name == family.text_encoders[-1]
        build = partial(CLIPTextEncoder, config, with_projection=projected, penultimate=family.penultimate)
        return model(name, build, dtype)

    return Components(
        index=configs.index,
        tokenizers=tokenizers,
        text_encoders=tuple(map(text_encoder, family.text_encoders, configs.text_encoders)),
        unet=model("unet", partial(UNet, configs.unet), dtype, parallelism),
        vae=model("vae", partial(AutoencoderKL, configs.vae), configs.vae.compute_dtype(dtype)),
        scheduler=configs.scheduler,
    )


def read_components(components: Components, checkpoint: Checkpoint, family: Family, mesh: Mesh) -> Components:
    """The result of `abstract_components` with weights in place of shapes.

    Raises:
        CheckpointError: For weights that are not finite or cannot be read.
    """

    def read(name: str, model: Model) -> Model:
        place, what = model.form.make_placer(mesh), checkpoint.origin(name)
        tensors = checkpoint.tensors[name]
        module = load_module(model.form.abstract(), tensors, what, dtype=model.dtype, place=place)
        return model._replace(params=model.form.fuse_params(module))

    return components._replace(
        text_encoders=tuple(map(read, family.text_encoders, components.text_encoders)),
        unet=read("unet", components.unet),
        vae=read("vae", components.vae),
    )


def _check_together(what: str, tokenizers: tuple[CLIPTokenizer, ...], configs: Configs) -> None:
    """Raises DistriError for components of different models."""
    unet, vae, texts = configs.unet, configs.vae, configs.text_encoders
    if unet.addition_embed_type and not configs.family.pooled:
        raise CheckpointError(
            f"{what}: the UNet's addition_embed_type is {unet.addition_embed_type!r} and the text encoder of "
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
                f"{what}: the {name} is {value} and the {other} {needed}; use components of one model"
            )
    for number, (tokenizer, encoder) in enumerate(zip(tokenizers, texts, strict=True), 1):
        if tokenizer.vocab_size > encoder.vocab_size:
            raise CheckpointError(
                f"{what}: tokenizer {number} has {tokenizer.vocab_size} tokens and its text encoder {encoder.vocab_size}; "
                "use components of one model"
            )
