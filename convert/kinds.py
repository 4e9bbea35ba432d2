"""What a file holds, by the names and shapes of its tensors; never by the file's name."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable

from distrijax.convert.tensors import Tensors
from distrijax.errors import DistriError
from distrijax.weights.names import shown


class Kind(enum.StrEnum):
    """What can be converted, in words for people."""

    SD1 = "Stable Diffusion 1.x"
    SD2 = "Stable Diffusion 2.x"
    SDXL = "Stable Diffusion XL"
    REFINER = "the Stable Diffusion XL refiner"
    UNET = "a UNet without text encoders"
    VAE = "a VAE alone"
    LORA = "a LoRA"
    EMBEDDING = "a textual inversion embedding"


SUPPORTED = "models of Stable Diffusion 1.x, 2.x and XL, and UNets, VAEs, LoRAs and embeddings of theirs"

ADD_ON, OTHER = "give the model it is used with", "use one of those"

LORA = (
    r"(^|[._])lora[._](up|down|mid|A|B|unet|te\d?|transformer|linear_layer)|\.(hada_[wt]|lokr_w|lokr_t|oft_|dora_scale)"
)

FOREIGN = (
    (
        "a ControlNet",
        r"^control_model\.|controlnet_|input_hint_block\.|^lora_controlnet$|^control_add_embedding\.",
        ADD_ON,
    ),
    ("a T2I adapter", r"^(adapter\.)?body\.\d+\.(block1|block2|in_conv|resnets)\b", ADD_ON),
    ("an IP-Adapter", r"^(image_proj|image_proj_model|ip_adapter)\.|\.to_k_ip\.", ADD_ON),
    ("an AnimateDiff motion module", r"motion_modules?\.", ADD_ON),
    ("GLIGEN's additions to a UNet", r"(^|\.)position_net\.", ADD_ON),
    (
        "Stable Video Diffusion",
        r"\.(time_stack|time_mixer)\.|temporal_transformer_blocks\.|temporal_res_block\.",
        OTHER,
    ),
    ("a video model of ModelScope's kind", r"\.(temp_convs|temp_attentions|temopral_conv)\.", OTHER),
    ("Hunyuan Video", r"txt_in\.individual_token_refiner\.", OTHER),
    ("Wan", r"(^|\.)head\.modulation$|(^|\.)decoder\.middle\.0\.residual\.|condition_embedder\.time_proj\.", OTHER),
    ("LTX Video", r"(^|\.)patchify_proj\.|last_scale_shift_table$", OTHER),
    ("Mochi", r"\.attn\.qkv_x\.", OTHER),
    ("Cosmos", r"^net\.x_embedder\.", OTHER),
    ("Stable Diffusion 3", r"joint_blocks\.\d+\.", OTHER),
    ("Chroma", r"distilled_guidance_layer\.", OTHER),
    ("Flux", r"(^|\.)double_blocks\.\d+\.|single_transformer_blocks\.", OTHER),
    ("Stable Diffusion 3", r"(^|\.)transformer_blocks\.\d+\.attn\.add_k_proj\.", OTHER),
    ("AuraFlow", r"(^|\.)double_layers\.\d+\.attn\.|joint_transformer_blocks\.", OTHER),
    ("HiDream", r"double_stream_blocks\.", OTHER),
    ("Qwen-Image", r"(^|\.)transformer_blocks\.\d+\.img_mod\.", OTHER),
    ("Lumina or Z-Image", r"(^|\.)cap_embedder\.|(^|\.)layers\.\d+\.adaLN_modulation\.", OTHER),
    ("Stable Cascade", r"clip_txt_mapper\.|clip_txt_pooled_mapper\.|\.channelwise\.\d|effnet_mapper\.", OTHER),
    ("Hunyuan DiT", r"text_embedding_padding$|\.default_modulation\.", OTHER),
    (
        "PixArt, Sana or another diffusion transformer",
        r"adaln_single\.|(^|\.)blocks\.\d+\.(scale_shift_table$|adaLN_mod)",
        OTHER,
    ),
    ("a diffusion transformer", r"(^|\.)(transformer_)?blocks\.\d+\.(attn|cross_attn|norm1\.linear)\.", OTHER),
    ("Kolors, Kandinsky or DeepFloyd IF", r"(^|\.)encoder_hid_proj\.|add_embedding\.(image|pool)", OTHER),
    ("unCLIP", r"^noise_augmentor\.|^embedder\.model\.visual\.|(^|\.)class_embedding\.", OTHER),
    ("Zero123", r"^cc_projection\.", OTHER),
    ("Playground 2.5, whose noise levels are not Stable Diffusion's", r"^edm_(mean|std)$", OTHER),
    ("CosXL, whose noise levels are not Stable Diffusion's", r"^edm_vpred\.", OTHER),
    ("a VQ autoencoder", r"(^|\.)quantize\.embedding", OTHER),
    ("a tiny autoencoder (TAESD)", r"^(taesd_)?(encoder|decoder)\.(layers\.)?\d+\.(conv\.\d\.)?(weight|bias)$", OTHER),
    ("a T5 text encoder", r"encoder\.block\.\d+\.layer\.", OTHER),
    ("an upscaler (ESRGAN)", r"\.rdb\d\.|\.RDB\d\.", OTHER),
)
"""What is not supported: name, a pattern that one of its tensors has, what to do; the first that fits."""

CHANNELS = {
    5: "a depth-to-image UNet, which reads a depth map beside the latents",
    7: "an upscaling UNet, which reads a small picture beside the latents",
    8: "an InstructPix2Pix UNet, which reads another picture beside the latents",
    9: "an inpainting UNet, which reads a mask and a picture beside the latents",
}
"""UNets by the channels of their input; those of text-to-image have 4."""

LATENT_CHANNELS = 4

EMBEDDING_WIDTHS = (768, 1024, 1280)
"""Of the text encoders of Stable Diffusion 1.x, 2.x and XL."""

UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
INPUTS = ("input_blocks.0.0.weight", "conv_in.weight")
"""The first convolution of a UNet, in the original and in diffusers' naming."""

TEXTS = {
    "conditioner.embedders.1.": Kind.SDXL,
    "conditioner.embedders.0.model.": Kind.REFINER,
    "conditioner.": Kind.SDXL,
    "cond_stage_model.model.": Kind.SD2,
    "cond_stage_model.": Kind.SD1,
}
"""Beginnings of text encoders' names; the first that occurs tells the family."""

TEXT_ALONE = (
    r"^(text_model|text_encoders?|encoder\.layers|transformer\.resblocks|conditioner|cond_stage_model|vision_model)\."
)


def recognise(tensors: Tensors, what: str) -> Kind:
    """What a file is. what: the file, for the error.

    Raises DistriError, which says what it is, for everything that is not supported.
    """
    if not tensors:
        raise DistriError(f"{what} holds no tensors; supported: {SUPPORTED}; {OTHER}")
    for name, pattern, advice in FOREIGN[:1]:  # a ControlNet may come as a LoRA
        _refuse_foreign(tensors, what, name, pattern, advice)
    if _any(LORA, tensors):
        return Kind.LORA
    if _is_embedding(tensors):
        return Kind.EMBEDDING
    for name, pattern, advice in FOREIGN[1:]:
        _refuse_foreign(tensors, what, name, pattern, advice)
    if (prefix := unet_prefix(tensors)) is not None:
        _check_channels(tensors, prefix, what)
        return _with_texts(tensors)
    if vae_prefix(tensors) is not None:
        return Kind.VAE
    if _any(TEXT_ALONE, tensors):
        raise DistriError(f"{what} is a CLIP encoder alone; supported: {SUPPORTED}; {ADD_ON}")
    names = ", ".join(map(shown, list(tensors)[:3]))
    raise DistriError(
        f"{what} holds {len(tensors)} tensors ({names} ...) of no known model; supported: {SUPPORTED}; {OTHER}"
    )


def unet_prefix(names: Iterable[str]) -> str | None:
    """What the names of a UNet's tensors begin with in this file, in either naming; None where there is no UNet."""
    names = names if isinstance(names, dict | set) else set(names)
    for prefix in UNET_PREFIXES:
        original, diffusers = (prefix + name in names for name in INPUTS)
        if original or (diffusers and f"{prefix}down_blocks.0.resnets.0.conv1.weight" in names):
            return prefix
    return None


def vae_prefix(names: Iterable[str]) -> str | None:
    """The same of a VAE."""
    names = names if isinstance(names, dict | set) else set(names)
    return next((prefix for prefix in VAE_PREFIXES if f"{prefix}decoder.conv_in.weight" in names), None)


def _refuse_foreign(tensors: Tensors, what: str, name: str, pattern: str, advice: str) -> None:
    if _any(pattern, tensors):
        raise DistriError(f"{what} is {name}; supported: {SUPPORTED}; {advice}")


def _any(pattern: str, names: Iterable[str]) -> bool:
    compiled = re.compile(pattern, re.ASCII)
    return any(compiled.search(name) for name in names)


def _is_embedding(tensors: Tensors) -> bool:
    """One vector or several, in the form of any of the trainers; of SDXL for each of two encoders."""
    if any(name == "emb_params" or name.startswith("string_to_param") for name in tensors):
        return True
    if set(tensors) <= {"clip_l", "clip_g"}:
        return True
    (name, tensor), *others = tensors.items()
    vectors = 1 <= len(tensor.shape) <= 2 and not others
    return vectors and (name.startswith("<") or tensor.shape[-1] in EMBEDDING_WIDTHS)


def _check_channels(tensors: Tensors, prefix: str, what: str) -> None:
    """Raises DistriError for a UNet that reads other things than latents."""
    name = next(prefix + name for name in INPUTS if prefix + name in tensors)
    shape = tensors[name].shape
    if len(shape) == 5:
        raise DistriError(f"{what} is a video model; supported: {SUPPORTED}; {OTHER}")
    channels = shape[1] if len(shape) == 4 else None
    if channels != LATENT_CHANNELS:
        name = CHANNELS.get(channels, f"a UNet whose input is {list(shape)}")
        raise DistriError(
            f"{what} is {name}; a UNet of {LATENT_CHANNELS} channels that paints from text is needed; {OTHER}"
        )


def _with_texts(tensors: Tensors) -> Kind:
    for prefix, kind in TEXTS.items():
        if any(name.startswith(prefix) for name in tensors):
            return kind
    return Kind.UNET
