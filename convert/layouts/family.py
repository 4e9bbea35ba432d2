"""What a family of single files consists of: its parts, their names in such a file, and their configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from distrijax.convert.configs import UNKNOWN
from distrijax.convert.engine import Row, Table
from distrijax.convert.kinds import Kind
from distrijax.convert.layouts.original_text import TRANSFORMERS, layers_of, open_clip_table
from distrijax.convert.layouts.original_unet import UNetLayout, unet_table
from distrijax.convert.layouts.original_vae import levels_of, vae_table
from distrijax.weights.tensors import Tensors

Config = dict[str, Any]

UNET, VAE = "model.diffusion_model.", "first_stage_model."

DIFFUSION = """
    betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod log_one_minus_alphas_cumprod
    sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance posterior_log_variance_clipped
    posterior_mean_coef1 posterior_mean_coef2 lvlb_weights logvar scale_factor global_step denoiser.sigmas
    denoiser.discretization.sigmas sigmas
"""
"""Tables of the noise schedule and counters of training, which follow from the config."""

MARKERS = ("v_pred", "ztsnr")
"""Empty tensors: the model was trained with v-prediction, and with zero terminal SNR."""

DROPPED = Table(
    *(Row(name, None) for name in (*DIFFUSION.split(), *MARKERS)),
    Row("model_ema.", None),
    Row("cond_stage_model.logit_scale", None),
    Row("cond_stage_model.text_projection", None),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """A text encoder and its tokenizer.

    suffix: of the folders `text_encoder` and `tokenizer`. prefix: of its tensors' names in the file.
    config: of the model the family is known by. pad_token: what the tokenizer pads with.
    open_clip: whether it has open_clip's names; otherwise it has those of transformers.
    last_unused: whether the file has a last layer that is not used, which diffusers leaves out.
    """

    suffix: str
    prefix: str
    config: Config
    pad_token: str
    open_clip: bool
    last_unused: bool = False

    @property
    def part(self) -> str:
        return f"text_encoder{self.suffix}"

    @property
    def projected(self) -> bool:
        """Whether the UNet uses its pooled embedding."""
        return self.config["architectures"] == ["CLIPTextModelWithProjection"]

    def table(self, layers: int, kept: int) -> Table:
        """layers: how many the file has. kept: how many the config has."""
        if not self.open_clip:
            return TRANSFORMERS
        return open_clip_table(projected=self.projected, dropped=range(kept, layers) if self.last_unused else ())


@dataclasses.dataclass(frozen=True, eq=False)
class OriginalFamily:
    """One family of files.

    unet, vae, scheduler, index: configs of the model the family is known by, as on the hub.
    texts: in the order in which their embeddings are concatenated.
    head_width: channels of an attention head of the UNet; None where `unet` holds the number of heads.
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

    def unet_rules(self, inferred: Mapping[str, Any], pooled: int | None) -> Config:
        """Keys that follow from the UNet's sizes in this family. pooled: width of the pooled embedding."""
        rules = {}
        if self.head_width:
            widths = inferred["block_out_channels"]
            whole = not any(width % self.head_width for width in widths)
            rules["attention_head_dim"] = [width // self.head_width for width in widths] if whole else UNKNOWN
        if self.time_ids and pooled is not None:
            width = inferred["projection_class_embeddings_input_dim"]
            rules["addition_time_embed_dim"] = (width - pooled) // self.time_ids
        return rules

    def table(self, unet: UNetLayout, levels: int, texts: Mapping[str, tuple[int, int]]) -> Table:
        """All rows of a file. levels: of the VAE. texts: of each encoder how many layers the file has, and how many are kept."""
        return Table(
            Row(UNET, "unet.", unet_table(unet)),
            Row(VAE, "vae.", vae_table(levels)),
            *(Row(text.prefix, f"{text.part}.", text.table(*texts[text.part])) for text in self.texts),
            *DROPPED.rows,
        )

    def table_of_source(self, names: Tensors, config: Mapping[str, Config], what: str) -> Table:
        """The rows that fit a file with these names."""
        layers = {text: layers_of(without(names, text.prefix)) for text in self.texts}
        kept = {text: (text.config | config.get(text.part, {}))["num_hidden_layers"] for text in self.texts}
        return self.table(
            UNetLayout.of_source(without(names, UNET), what),
            levels_of(without(names, VAE)),
            {text.part: (layers[text], kept[text]) for text in self.texts},
        )

    def table_of_diffusers(self, parts: Mapping[str, Tensors], what: str) -> Table:
        """The rows that fit the parts of a checkpoint."""
        return self.table(
            UNetLayout.of_diffusers(parts["unet"], what),
            levels_of(parts["vae"]),
            {text.part: (0, 0) for text in self.texts},
        )


def without(tensors: Tensors, prefix: str) -> Tensors:
    """Those whose names begin with a prefix, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
