"""Recognises what a file holds by the names and shapes of its tensors, never by the file's name."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable

from distrijax.errors import CheckpointError
from distrijax.weights.names import shown
from distrijax.weights.tensors import Tensors


class Kind(enum.StrEnum):
    """What can be converted, as messages name it."""

    SD1 = "Stable Diffusion 1.x"
    SD2 = "Stable Diffusion 2.x"
    SDXL = "Stable Diffusion XL"
    REFINER = "the Stable Diffusion XL refiner"
    UNET = "a UNet without text encoders"
    VAE = "a VAE alone"
    LORA = "a LoRA"
    EMBEDDING = "a textual inversion embedding"


SUPPORTED = "models of Stable Diffusion 1.x, 2.x and XL, and UNets, VAEs, LoRAs and embeddings for them"

ADD_ON, OTHER = "give the model it is used with", "use one of those"

LORA = (
    r"(^|[._])lora[._](up|down|mid|A|B|unet|te\d?|transformer|linear_layer)|\.(hada_[wt]|lokr_w|lokr_t|oft_|dora_scale)"
)

FOREIGN = {
    "a ControlNet": (
        r"^control_model\.|controlnet_|input_hint_block\.|^lora_controlnet$|^control_add_embedding\.",
        ADD_ON,
    ),
    "an AnimateDiff motion module": (r"motion_modules?\.", ADD_ON),
    "GLIGEN's additions to a UNet": (r"(^|\.)position_net\.", ADD_ON),
    "a video model (Stable Video Diffusion, ModelScope)": (
        r"\.(time_stack|time_mixer|temp_convs|temp_attentions|temopral_conv|temporal_res_block)\.|temporal_transformer_",
        OTHER,
    ),
    "Kolors, Kandinsky or DeepFloyd IF": (r"(^|\.)encoder_hid_proj\.|add_embedding\.(image|pool)", OTHER),
    "unCLIP": (r"^noise_augmentor\.|^embedder\.model\.visual\.|(^|\.)class_embedding\.", OTHER),
    "Zero123": (r"^cc_projection\.", OTHER),
    "Playground 2.5 or CosXL, whose noise levels are not Stable Diffusion's": (r"^edm_(mean|std$|vpred\.)", OTHER),
    "a diffusion transformer, such as Stable Diffusion 3 or Flux": (
        r"^(model\.|diffusion_model\.)*(joint_|double_|single_)?(transformer_)?(blocks|layers)\.\d+\.",
        OTHER,
    ),
}
"""Models that are not supported and share names with Stable Diffusion: a pattern that one of their tensors has, and advice."""

CHANNELS = {
    5: "a depth-to-image UNet, which reads a depth map beside the latents",
    7: "an upscaling UNet, which reads a small image beside the latents",
    8: "an InstructPix2Pix UNet, which reads another image beside the latents",
    9: "an inpainting UNet, which reads a mask and an image beside the latents",
}
"""UNets by the number of input channels; those of text-to-image have 4."""

LATENT_CHANNELS = 4

EMBEDDING_WIDTHS = (768, 1024, 1280)
"""Widths of the text encoders of Stable Diffusion 1.x, 2.x and XL."""

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
"""Prefixes of text encoders' names; the first that occurs determines the family."""

TEXT_ALONE = (
    r"^(text_model|text_encoders?|encoder\.layers|transformer\.resblocks|conditioner|cond_stage_model|vision_model)\."
)


def recognise(tensors: Tensors, what: str) -> Kind:
    """What a file is, by its tensors. what: the file, for the error.

    Raises CheckpointError, which says what the file is, for everything that is not supported.
    """
    if not tensors:
        raise CheckpointError(f"{what} holds no tensors; supported: {SUPPORTED}; {OTHER}")
    for name, (pattern, advice) in FOREIGN.items():
        if _any(pattern, tensors):
            raise CheckpointError(f"{what} is {name}; supported: {SUPPORTED}; {advice}")
    if _any(LORA, tensors):
        return Kind.LORA
    if _is_embedding(tensors):
        return Kind.EMBEDDING
    if (prefix := unet_prefix(tensors)) is not None:
        _check_channels(tensors, prefix, what)
        return next((kind for prefix, kind in TEXTS.items() if any(n.startswith(prefix) for n in tensors)), Kind.UNET)
    if vae_prefix(tensors) is not None:
        return Kind.VAE
    if _any(TEXT_ALONE, tensors):
        raise CheckpointError(f"{what} is a CLIP encoder alone; supported: {SUPPORTED}; {ADD_ON}")
    names = ", ".join(map(shown, list(tensors)[:3]))
    raise CheckpointError(
        f"{what} holds {len(tensors)} tensors ({names} ...) of no known model; supported: {SUPPORTED}; {OTHER}"
    )


def unet_prefix(names: Iterable[str]) -> str | None:
    """The prefix of the names of a UNet's tensors in this file, original or of diffusers; None where there is no UNet."""
    names = names if isinstance(names, dict | set) else set(names)
    for prefix in UNET_PREFIXES:
        original, diffusers = (prefix + name in names for name in INPUTS)
        if original or (diffusers and f"{prefix}down_blocks.0.resnets.0.conv1.weight" in names):
            return prefix
    return None


def vae_prefix(names: Iterable[str]) -> str | None:
    """The prefix of the names of a VAE's tensors; None where there is no VAE."""
    names = names if isinstance(names, dict | set) else set(names)
    return next((prefix for prefix in VAE_PREFIXES if f"{prefix}decoder.conv_in.weight" in names), None)


def _any(pattern: str, names: Iterable[str]) -> bool:
    compiled = re.compile(pattern, re.ASCII)
    return any(compiled.search(name) for name in names)


def _is_embedding(tensors: Tensors) -> bool:
    """Whether it holds vectors for one word, as any of the trainers writes them; for SDXL those of two encoders."""
    if set(tensors) <= {"clip_l", "clip_g"} or any(re.match("emb_params$|string_to_param", name) for name in tensors):
        return True
    (name, tensor), *others = tensors.items()
    vectors = 1 <= len(tensor.shape) <= 2 and not others
    return vectors and (name.startswith("<") or tensor.shape[-1] in EMBEDDING_WIDTHS)


def _check_channels(tensors: Tensors, prefix: str, what: str) -> None:
    """Raises CheckpointError for a UNet that reads more than latents."""
    name = next(prefix + name for name in INPUTS if prefix + name in tensors)
    shape = tensors[name].shape
    if len(shape) == 5:
        raise CheckpointError(f"{what} is a video model; supported: {SUPPORTED}; {OTHER}")
    channels = shape[1] if len(shape) == 4 else None
    if channels != LATENT_CHANNELS:
        name = CHANNELS.get(channels, f"a UNet whose input is {list(shape)}")
        raise CheckpointError(
            f"{what} is {name}; a text-to-image UNet of {LATENT_CHANNELS} channels is needed; {OTHER}"
        )
