"""The configuration of a UNet."""

from __future__ import annotations

import dataclasses

from distrijax.errors import CheckpointError
from distrijax.json_config import ModelConfig
from distrijax.validate import check_choice, per_block, positive


@dataclasses.dataclass(frozen=True)
class UNetConfig(ModelConfig):
    """The keys of a UNet's config.json that shape it, with the meaning that diffusers' UNet2DConditionModel gives them.

    As there, and for historical reasons, `attention_head_dim` is the *number* of heads unless `num_attention_heads` is set.
    """

    block_out_channels: tuple[int, ...]
    cross_attention_dim: int | tuple[int, ...]
    down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    in_channels: int = 4
    out_channels: int = 4
    sample_size: int | tuple[int, int] | None = None
    layers_per_block: int | tuple[int, ...] = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None
    flip_sin_to_cos: bool = True
    freq_shift: float = 0

    INERT = frozenset(  # attention scores are always float32; the rest is of diffusers' EMAModel
        "dropout upcast_attention decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup".split()
    )
    FIXED = {
        "act_fn": ("silu", "swish"),
        "addition_embed_type_num_heads": (64,),
        "attention_type": ("default",),
        "center_input_sample": (False,),
        "class_embed_type": (None,),
        "class_embeddings_concat": (False, None),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "cross_attention_norm": (None,),
        "downsample_padding": (1,),
        "dual_cross_attention": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_scale_factor": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "num_class_embeds": (None,),
        "only_cross_attention": (False,),
        "resnet_out_scale_factor": (1,),
        "resnet_skip_time_act": (False,),
        "resnet_time_scale_shift": ("default",),
        "reverse_transformer_layers_per_block": (None,),
        "time_embedding_act_fn": (None,),
        "time_embedding_dim": (None,),
        "time_embedding_type": ("positional",),
        "timestep_post_act": (None,),
    }

    def __post_init__(self):
        blocks = len(self.block_out_channels)
        for types, cross, plain in (
            (self.down_block_types, "CrossAttnDownBlock2D", "DownBlock2D"),
            (self.up_block_types, "CrossAttnUpBlock2D", "UpBlock2D"),
        ):
            per_block(types, blocks, "block types")
            for kind in types:
                check_choice(kind, (cross, plain), "UNetConfig: block type")
        check_choice(self.addition_embed_type, (None, "text_time"), "UNetConfig: addition_embed_type")
        if self.addition_embed_type and not (
            self.addition_time_embed_dim and self.projection_class_embeddings_input_dim
        ):
            raise CheckpointError(
                "UNetConfig: addition_embed_type 'text_time' needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim; add them to the config"
            )
        if self.time_cond_proj_dim is not None:
            positive(self.time_cond_proj_dim, "UNetConfig: time_cond_proj_dim", least=4)
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % self.norm_num_groups or channels % heads:
                raise CheckpointError(
                    f"UNetConfig: {channels} channels do not divide into {self.norm_num_groups} groups and {heads} heads; "
                    "correct block_out_channels, norm_num_groups or attention_head_dim"
                )

    @property
    def branches(self) -> int:
        """Branches of guidance: two, or one for a model that is conditioned on the guidance scale (`time_cond_proj_dim`; LCM)."""
        return 2 if self.time_cond_proj_dim is None else 1

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level."""
        return per_block(self.num_attention_heads or self.attention_head_dim, len(self.block_out_channels), "heads")

    def depth(self, block: int) -> int:
        """Resnets of a level on the way down; on the way up there is one more.

        Args:
            block: Number of the level, from the finest one.
        """
        return per_block(self.layers_per_block, len(self.block_out_channels), "layers_per_block")[block]

    def transformer_depth(self, block: int) -> int:
        """Transformer blocks after each resnet of a level.

        Args:
            block: Number of the level, from the finest one.
        """
        layers = per_block(self.transformer_layers_per_block, len(self.block_out_channels), "transformer layers")
        return layers[block]

    def context(self, block: int) -> int:
        """Features of the prompt's embeddings that a level reads.

        Args:
            block: Number of the level, from the finest one.
        """
        return per_block(self.cross_attention_dim, len(self.block_out_channels), "cross_attention_dim")[block]


SDXL_BASE = UNetConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
"""The UNet of Stable Diffusion XL base 1.0."""
