"""What the families of original files have in common: their parts, how those are named there, and their configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from distrijax.convert.engine import Row, Table
from distrijax.convert.kinds import Kind
from distrijax.convert.layouts.original_text import TRANSFORMERS, layers_of, open_clip_table
from distrijax.convert.layouts.original_unet import UNetLayout, unet_table
from distrijax.convert.layouts.original_vae import levels_of, vae_table
from distrijax.convert.settle import UNKNOWN
from distrijax.convert.tensors import Tensors
from distrijax.errors import DistriError

Config = dict[str, Any]

UNET, VAE = "model.diffusion_model.", "first_stage_model."

NUMBERED = 100
"""Blocks or layers of a model that are numbered; the largest text encoder has 32. Every name is tried with each."""

DIFFUSION = """
    betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod log_one_minus_alphas_cumprod
    sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance posterior_log_variance_clipped
    posterior_mean_coef1 posterior_mean_coef2 lvlb_weights logvar scale_factor global_step denoiser.sigmas
    denoiser.discretization.sigmas sigmas
"""
"""Tables of the training's noise schedule and its counters, all of which follow from the config."""

MARKERS = ("v_pred", "ztsnr")
"""Tensors of no content: the model was trained with v-prediction, and with a noise schedule that ends in pure noise."""

DROPPED = Table(
    *(Row(name, None) for name in (*DIFFUSION.split(), *MARKERS)),
    Row("model_ema.", None),
    Row("cond_stage_model.logit_scale", None),
    Row("cond_stage_model.text_projection", None),
)

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}

UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "out_channels": 4,
}

VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

TEXT_CONFIG = {
    "model_type": "clip_text_model",
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "pad_token_id": 1,
    "vocab_size": 49408,
}

CLIP_L = {
    **TEXT_CONFIG,
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}

OPEN_CLIP_BIG_G = {
    **TEXT_CONFIG,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """A text encoder and its tokenizer.

    suffix: of the folders `text_encoder` and `tokenizer`. theirs: what its tensors' names begin with in the file.
    config: of the model the family is known by. pad_token: what the tokenizer fills up with.
    open_clip: in whose names it is written; otherwise in those of transformers.
    last_unused: whether the file has a last layer that is not used, which diffusers leaves out.
    """

    suffix: str
    theirs: str
    config: Config
    pad_token: str
    open_clip: bool
    last_unused: bool = False

    @property
    def part(self) -> str:
        return f"text_encoder{self.suffix}"

    @property
    def projected(self) -> bool:
        """Whether the UNet reads its pooled embedding."""
        return self.config["architectures"] == ["CLIPTextModelWithProjection"]

    def table(self, layers: int, kept: int) -> Table:
        """layers: how many the file has. kept: how many the config has."""
        if not self.open_clip:
            return TRANSFORMERS
        return open_clip_table(projected=self.projected, dropped=range(kept, layers) if self.last_unused else ())


@dataclasses.dataclass(frozen=True, eq=False)
class OriginalFamily:
    """One family of files.

    unet, vae, scheduler, index: configs of the model the family is known by, as the hub has them.
    texts: in the order in which their embeddings are joined.
    head_width: channels of an attention head of the UNet; None where the number of heads is in `unet`.
    time_ids: how many numbers beside the pooled embedding the UNet reads; 0 without one.
    by_prediction: what another prediction type changes in the configs of the parts, by its name.
    """

    kind: Kind
    unet: Config
    vae: Config
    texts: tuple[Text, ...]
    scheduler: Config
    index: Config
    head_width: int | None
    time_ids: int = 0
    by_prediction: Mapping[str, Mapping[str, Config]] = dataclasses.field(default_factory=dict)

    def base(self, part: str, prediction_type: str) -> Config:
        """The config of a part in the model the family is known by."""
        texts = {text.part: text.config for text in self.texts}
        config = {"unet": self.unet, "vae": self.vae, "scheduler": self.scheduler, **texts}[part]
        return config | self.by_prediction.get(prediction_type, {}).get(part, {})

    def unet_rules(self, told: Mapping[str, Any], pooled: int | None) -> Config:
        """What follows from the UNet's sizes by a rule of the family. pooled: width of the pooled embedding."""
        rules = {}
        if self.head_width:
            widths = told["block_out_channels"]
            whole = not any(width % self.head_width for width in widths)
            rules["attention_head_dim"] = [width // self.head_width for width in widths] if whole else UNKNOWN
        if self.time_ids and pooled is not None:
            rules["addition_time_embed_dim"] = (told["projection_class_embeddings_input_dim"] - pooled) // self.time_ids
        return rules

    def table(self, unet: UNetLayout, levels: int, texts: Mapping[str, tuple[int, int]]) -> Table:
        """All rows of a file. levels: of the VAE. texts: of each encoder how many layers the file has, and how many are kept."""
        return Table(
            Row(UNET, "unet.", unet_table(unet)),
            Row(VAE, "vae.", vae_table(levels)),
            *(Row(text.theirs, f"{text.part}.", text.table(*texts[text.part])) for text in self.texts),
            *DROPPED.rows,
        )

    def table_of_theirs(self, names: Tensors, config: Mapping[str, Config], what: str) -> Table:
        """The rows that fit a file with these names."""
        layers = {text: layers_of(without(names, text.theirs)) for text in self.texts}
        levels = levels_of(without(names, VAE))
        if max(levels, *layers.values()) > NUMBERED:
            raise DistriError(
                f"{what} has {levels} blocks in its VAE and {', '.join(map(str, layers.values()))} layers in its text encoders, "
                f"and none may have more than {NUMBERED}; give a file of a known model"
            )
        kept = {
            text: config.get(text.part, {}).get("num_hidden_layers", text.config["num_hidden_layers"])
            for text in self.texts
        }
        return self.table(
            UNetLayout.of_theirs(without(names, UNET), what),
            levels,
            {text.part: (layers[text], kept[text]) for text in self.texts},
        )

    def table_of_ours(self, parts: Mapping[str, Tensors], what: str) -> Table:
        """The rows that fit the parts of a checkpoint."""
        return self.table(
            UNetLayout.of_ours(parts["unet"], what),
            levels_of(parts["vae"]),
            {text.part: (0, 0) for text in self.texts},
        )


def without(tensors: Tensors, prefix: str) -> Tensors:
    """Those whose names begin with a prefix, by the rest of their names."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def index_of(pipeline: str, *suffixes: str, **others: Any) -> Config:
    """A model_index.json. suffixes: of the text encoders, the last of which has a projection in the XL family."""
    xl = pipeline.startswith("StableDiffusionXL")
    texts = {f"tokenizer{suffix}": ["transformers", "CLIPTokenizer"] for suffix in suffixes} | {
        f"text_encoder{suffix}": ["transformers", "CLIPTextModelWithProjection" if xl and suffix else "CLIPTextModel"]
        for suffix in suffixes
    }
    return {
        "_class_name": pipeline,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **texts,
        **others,
    }
