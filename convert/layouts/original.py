"""Single files in the original layouts (CompVis, SGM), read and written, as tensors by name.

names and shapes -> recognise -> family: rows -> to_diffusers -> parts -> describe -> configs -> Checkpoint
Checkpoint -> family: rows -> to_source -> names as CompVis and SGM write them
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from distrijax.convert.configs import compatible, merge_configs
from distrijax.convert.engine import SAME, Mapped, raise_for, to_diffusers, to_source
from distrijax.convert.kinds import LATENT_CHANNELS, Kind, recognise
from distrijax.convert.layouts.families import EPSILON_STEP, FAMILIES, REFINER, SD1, SD2, SDXL
from distrijax.convert.layouts.family import MARKERS, UNET, Config, OriginalFamily, without
from distrijax.convert.layouts.original_text import describe_text, heads_of
from distrijax.convert.layouts.original_unet import TIME_COND, describe_unet
from distrijax.convert.layouts.original_vae import describe_vae
from distrijax.convert.layouts.vocabulary import SIZE, tokenizer_files
from distrijax.errors import CheckpointError, warn
from distrijax.schedulers import SCHEDULERS
from distrijax.schedulers.common import Prediction
from distrijax.validate import choose
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.names import IGNORED, current_name
from distrijax.weights.tensors import Tensors, of_array

ADVICE = {
    Kind.UNET: "give it as the UNet (--unet) of a whole model",
    Kind.VAE: "give it as the VAE (--vae) of a whole model",
    Kind.LORA: "give it as a LoRA (--lora) beside a whole model",
    Kind.EMBEDDING: "give it as an embedding (--embedding) beside a whole model",
}

DEFAULTS = {
    "unet": dict(attention_head_dim=8, num_attention_heads=None, norm_num_groups=32, addition_time_embed_dim=None),
    "vae": dict(scaling_factor=0.18215, shift_factor=None, norm_num_groups=32),
    "text": dict(num_attention_heads=8, hidden_act="quick_gelu", layer_norm_eps=1e-5),
    "scheduler": dict(
        prediction_type="epsilon", beta_start=0.0001, beta_end=0.02, beta_schedule="linear", num_train_timesteps=1000
    ),
}
"""Keys that change the image and that shapes do not imply, with their defaults."""

SAMPLING = ("rescale_betas_zero_snr", "set_alpha_to_one", "steps_offset", "timestep_spacing")
"""Further such keys of a scheduler; their defaults depend on its class."""


def from_original(tensors: Tensors, what: str, **options: Any) -> Checkpoint:
    """The checkpoint of `convert_original` alone."""
    return convert_original(tensors, what, **options)[0]


def convert_original(
    tensors: Tensors,
    what: str,
    *,
    ema: bool = False,
    config: Mapping[str, Config] | None = None,
    prediction_type: str | None = None,
    files: Mapping[str, bytes] | None = None,
) -> tuple[Checkpoint, list[Mapped]]:
    """The parts of a single file of Stable Diffusion 1.x, 2.x, XL or the XL refiner, and where each tensor went.

    No weight is read.

    Args:
        tensors: Of the file.
        what: The file, for errors.
        ema: Take the UNet's averaged weights.
        config: Of each part (`unet`, `vae`, `text_encoder`, `text_encoder_2`, `scheduler`) a whole config or some of its
            keys, for what shapes do not imply.
        prediction_type: "epsilon" or "v_prediction"; by default v_prediction where the file is marked so (`v_pred`) and in
            SD 2.x, whose two kinds have the same tensors.
        files: The tokenizers' files, by path, instead of CLIP's.

    Raises:
        CheckpointError: For a file that is something else, for unknown tensors, and for configs that do not fit.
    """
    kind = recognise(tensors, what)
    if kind not in FAMILIES:
        raise CheckpointError(f"{what} is {kind}, and a whole model is needed; {ADVICE[kind]}")
    family, config = FAMILIES[kind], config or {}
    source, averaged = _with_ema(tensors, what) if ema else (tensors, {})
    named, mapping = to_diffusers(family.table_of_source(source, config, what), source, what)
    parts = {part: without(named, f"{part}.") for part in _parts(family)}
    if absent := [part for part, held in parts.items() if not held]:
        raise CheckpointError(f"{what} has no {', '.join(absent)}; give a file that holds the whole model")
    prediction = _prediction(tensors, family, config.get("scheduler", {}), prediction_type)
    inferred = _inferred(parts, family, what)
    bases = _bases(inferred, family, prediction)
    configs = {part: merge_configs(part, inferred[part], bases[part], config.get(part, {}), what) for part in inferred}
    configs["scheduler"] = _scheduler(tensors, family, config.get("scheduler", {}), prediction, what)
    index = {**family.index, "scheduler": ["diffusers", configs["scheduler"]["_class_name"]]}
    files = dict(files) if files is not None else _tokenizers(family, configs, what)
    return Checkpoint(index, configs, parts, files), _as_read(mapping, averaged)


def to_original(checkpoint: Checkpoint) -> Tensors:
    """The tensors of a single file; the inverse of `from_original`.

    Raises CheckpointError for a checkpoint that the original layouts have no names for. Warns (DistriWarning) of values of
    its configs that such a file cannot hold: readers take the family's values, among them v-prediction in SD 2.x.
    """
    what = "the checkpoint"
    parts = {part: _current(tensors) for part, tensors in checkpoint.tensors.items()}
    family = _family_of(parts, what)
    parts = {part: parts[part] for part in _parts(family)}
    if TIME_COND in parts["unet"]:
        raise CheckpointError(
            f"{what} is a latent consistency model, whose {TIME_COND} has no name in the original layout; "
            "write a diffusers folder instead"
        )
    for text in family.texts:
        held, implied = checkpoint.configs.get(text.part, {}).get("hidden_act"), text.config["hidden_act"]
        if held not in (None, implied):
            raise CheckpointError(
                f"the {text.part} has the activation {held!r} and a file of {family.kind} implies {implied!r}; "
                "write a diffusers folder instead"
            )
    named = {f"{part}.{name}": tensor for part, held in parts.items() for name, tensor in held.items()}
    tensors = to_source(family.table_of_diffusers(parts, what), named, what)
    tensors |= _markers(family, checkpoint.configs.get("scheduler", {}))
    _warn_of_losses(checkpoint.configs, tensors, parts, family, what)
    return tensors


def _parts(family: OriginalFamily) -> list[str]:
    return ["unet", "vae", *(text.part for text in family.texts)]


def _with_ema(tensors: Tensors, what: str) -> tuple[Tensors, dict[str, str]]:
    """The tensors with the averaged ones in place of the UNet's, and the name that each of those has in the file."""
    if not any(name.startswith("model_ema.") for name in tensors):
        raise CheckpointError(f"{what} has no EMA weights; convert it without them")
    averaged = {
        name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in tensors if name.startswith(UNET)
    }
    missing = [flat for flat in averaged.values() if flat not in tensors]
    held = {name: flat for name, flat in averaged.items() if flat in tensors}
    wrong = [flat for name, flat in held.items() if tensors[flat].shape != tensors[name].shape]
    problems = {"missing": missing, "of the wrong shape": wrong}
    raise_for({kind: names for kind, names in problems.items() if names}, what)
    used = set(averaged.values())
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    return rest | {name: tensors[flat] for name, flat in averaged.items()}, averaged


def _as_read(mapping: list[Mapped], averaged: Mapping[str, str]) -> list[Mapped]:
    """The mapping with the averaged tensors' own names; those that they replace are dropped."""
    read = [dataclasses.replace(mapped, source=averaged.get(mapped.source, mapped.source)) for mapped in mapping]
    return read + [Mapped(name, (), SAME) for name in averaged]


def _prediction(tensors: Tensors, family: OriginalFamily, given: Config, requested: str | None) -> str:
    """What the model predicts: as requested, as the config says, as marked in the file, or as usual in its family."""
    if chosen := requested or given.get("prediction_type"):
        return choose(Prediction, chosen, "prediction_type").value
    if "v_pred" in tensors:
        return Prediction.V_PREDICTION.value
    step = tensors.get("global_step")
    if family is SD2 and step is not None and step.size == 1 and step.read().item() == EPSILON_STEP:
        return Prediction.EPSILON.value
    return family.scheduler["prediction_type"]


def _scheduler(tensors: Tensors, family: OriginalFamily, given: Config, prediction: str, what: str) -> Config:
    base = family.base("scheduler", prediction)
    config = {"_class_name": base["_class_name"], **merge_configs("scheduler", {}, base, given, what)}
    config["prediction_type"] = prediction
    if all(marker in tensors for marker in MARKERS):
        config.setdefault("rescale_betas_zero_snr", True)
    return config


def _inferred(parts: Mapping[str, Tensors], family: OriginalFamily, what: str) -> dict[str, Config]:
    """What the shapes imply for each model's config; raises CheckpointError for models that do not go together."""
    texts = {text.part: describe_text(parts[text.part], what) for text in family.texts}
    unet, vae = describe_unet(parts["unet"], what), describe_vae(parts["vae"], what)
    _check_together(unet, vae, texts, family, what)
    return {"unet": unet, "vae": vae, **texts}


def _bases(inferred: Mapping[str, Config], family: OriginalFamily, prediction: str) -> dict[str, Config]:
    """The rest of each config, by the rules of the family for a model of that size."""
    bases = {part: family.base(part, prediction) for part in inferred}
    texts = [text.part for text in family.texts]
    for part in texts:
        bases[part]["num_attention_heads"] = heads_of(inferred[part]["hidden_size"])
    bases["unet"] |= family.unet_rules(inferred["unet"], inferred[texts[-1]].get("projection_dim"))
    return bases


def _check_together(unet: Config, vae: Config, texts: Mapping[str, Config], family: OriginalFamily, what: str) -> None:
    width = sum(text["hidden_size"] for text in texts.values())
    if unet["cross_attention_dim"] != width:
        raise CheckpointError(
            f"{what}: the UNet reads embeddings of {unet['cross_attention_dim']} channels and the text encoders give {width}; "
            "give a file whose parts are of one model"
        )
    if ("addition_embed_type" in unet) != bool(family.time_ids):
        reads = "reads" if "addition_embed_type" in unet else "does not read"
        raise CheckpointError(
            f"{what}: the UNet {reads} a pooled embedding beside the text, unlike {family.kind}; use a model of that family"
        )
    if vae["latent_channels"] != LATENT_CHANNELS:
        raise CheckpointError(
            f"{what}: the VAE has {vae['latent_channels']} latent channels, as those of Stable Diffusion 3 and Flux; "
            f"use one of {LATENT_CHANNELS}"
        )


def _tokenizers(family: OriginalFamily, configs: Mapping[str, Config], what: str) -> dict[str, bytes]:
    files = {}
    for text in family.texts:
        size = configs[text.part]["vocab_size"]
        if size < SIZE:
            raise CheckpointError(
                f"{what}: the {text.part} knows {size} tokens and CLIP's vocabulary has {SIZE}; "
                "give the tokenizer it was made with (--config FOLDER)"
            )
        files |= tokenizer_files(f"tokenizer{text.suffix}", pad_token=text.pad_token)
    return files


def _current(tensors: Tensors) -> Tensors:
    named = {current_name(name): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if name not in IGNORED}


def _family_of(parts: Mapping[str, Tensors], what: str) -> OriginalFamily:
    """The family of a checkpoint in the diffusers layout, by its parts and by the layers around the UNet's transformers."""
    texts = [part for part in parts if part.startswith("text_encoder")]
    for family in (SDXL, REFINER, SD1):
        if sorted(texts) == [text.part for text in family.texts] and parts.get("unet") and parts.get("vae"):
            linear = describe_unet(parts["unet"], what)["use_linear_projection"]
            return SD2 if family is SD1 and linear else family
    raise CheckpointError(
        f"{what} has the parts {', '.join(parts)}; a UNet, a VAE and the text encoders of one of "
        f"{', '.join(FAMILIES)} can be written to a single file; write a diffusers folder instead"
    )


def _markers(family: OriginalFamily, scheduler: Config) -> Tensors:
    """The empty tensors by which files of SDXL tell what they predict."""
    marked = family.time_ids and scheduler.get("prediction_type") == Prediction.V_PREDICTION.value
    held = {"v_pred": marked, "ztsnr": marked and scheduler.get("rescale_betas_zero_snr")}
    return {name: of_array(np.zeros(0, np.float32)) for name, holds in held.items() if holds}


def _warn_of_losses(
    configs: Mapping[str, Config], tensors: Tensors, parts: Mapping[str, Tensors], family: OriginalFamily, what: str
) -> None:
    """Warns of the values in which the configs differ from those that the file will be read with."""
    prediction = _prediction(tensors, family, {}, None)
    scheduler = _scheduler(tensors, family, {}, prediction, what)
    read = _bases(_inferred(parts, family, what), family, prediction) | {"scheduler": _sampling(scheduler) | scheduler}
    defaults = DEFAULTS | {"scheduler": DEFAULTS["scheduler"] | _sampling(configs.get("scheduler", {}))}
    lost = []
    for part in configs.keys() & read.keys():
        for key, default in defaults["text" if part.startswith("text_encoder") else part].items():
            value, other = configs[part].get(key, default), read[part].get(key, default)
            lost += [] if compatible(value or None, other or None) else [f"{part}: {key} {value!r}"]  # null is false
    if lost:
        warn(
            f"a file in the original layout holds no configs, and is read as {family.kind}; "
            f"to be given with it (--config FOLDER): {', '.join(sorted(lost))}"
        )


def _sampling(scheduler: Config) -> Config:
    """The defaults of a scheduler's class for the keys of `SAMPLING` that it uses; for an unknown class, None for those it sets."""
    for kind, _ in SCHEDULERS.values():
        if kind.diffusers_name == scheduler.get("_class_name"):
            used = {key: getattr(kind, key) for key in SAMPLING if key in kind.options() - kind.ignored}
            return {key: getattr(default, "value", default) for key, default in used.items()}
    return {key: None for key in SAMPLING if key in scheduler}
