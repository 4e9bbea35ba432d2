"""Stable Diffusion XL: two text encoders, a pooled embedding, and micro-conditioning on sizes."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from distrijax.errors import InvalidArgument, warn
from distrijax.models.families import SDXL
from distrijax.pipelines.build import Pipeline
from distrijax.pipelines.call import Call, Request, Size, call_method
from distrijax.pipelines.prompt import Prompt
from distrijax.validate import finite_number

MICRO_CONDITIONING = ("original_size", "crops_coords_top_left", "target_size")
"""Arguments that the UNet's time ids consist of (arXiv 2307.01952, section 2.2)."""

NEGATIVE = "negative_"
"""Prefix of arguments of the negative prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SDXLCall(Call):
    """The arguments of a call of Stable Diffusion XL: those that all pipelines share, and these.

    Attributes:
        prompt_2: The prompt of the second text encoder. Default: `prompt`.
        negative_prompt_2: The negative prompt of the second text encoder. Default: `negative_prompt`.
        pooled_prompt_embeds: Pooled embeddings [prompts, width]; needed with `prompt_embeds`.
        negative_pooled_prompt_embeds: The same for `negative_prompt_embeds`.
        original_size: (height, width) that the image is said to have had before resizing, in pixels; part of SDXL's
            micro-conditioning (arXiv 2307.01952, section 2.2). Default: (`height`, `width`).
        crops_coords_top_left: (top, left) corner of the crop that the image is said to be, in pixels.
        target_size: (height, width) that the image is said to have. Default: (`height`, `width`).
        negative_original_size: `original_size` of the unconditional branch. As in diffusers, the three negative sizes have
            no effect unless this one and `negative_target_size` are given; that branch then has the sizes of the other.
        negative_crops_coords_top_left: `crops_coords_top_left` of the unconditional branch.
        negative_target_size: `target_size` of the unconditional branch.
    """

    guidance_scale: float = 5.0
    prompt_2: Prompt | None = None
    negative_prompt_2: Prompt | None = None
    pooled_prompt_embeds: Any = None
    negative_pooled_prompt_embeds: Any = None
    original_size: Size | None = None
    crops_coords_top_left: Size = (0, 0)
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crops_coords_top_left: Size = (0, 0)
    negative_target_size: Size | None = None

    POSITIONAL: ClassVar[tuple[str, ...]] = ("prompt", "prompt_2")
    ARRAYS: ClassVar[tuple[str, ...]] = (*Call.ARRAYS, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


class DistriSDXLPipeline(Pipeline):
    """Stable Diffusion XL with displaced patch parallelism, called as diffusers' StableDiffusionXLPipeline.

    All arguments may change from call to call. New shapes and new kinds of steps compile new programs. `scheduler` may be
    replaced (`distrijax.schedulers.with_class`); the loop then compiles again.

    Attributes:
        scheduler: The scheduler of the next calls.
        programs: The compiled programs; counts them and the seconds that they took.
    """

    family = SDXL
    call_type = SDXLCall

    __call__ = call_method(SDXLCall)

    def encode_prompt(
        self,
        prompt: Prompt,
        prompt_2: Prompt | None = None,
        negative_prompt: Prompt | None = None,
        negative_prompt_2: Prompt | None = None,
        *,
        clip_skip: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Encodes prompts for calls.

        Args:
            prompt: As in a call.
            prompt_2: As in a call.
            negative_prompt: As in a call.
            negative_prompt_2: As in a call.
            clip_skip: As in a call.

        Returns:
            In diffusers' order: `prompt_embeds` and `negative_prompt_embeds`, [prompts, tokens, width] each, then
            `pooled_prompt_embeds` and `negative_pooled_prompt_embeds`, [prompts, width] each.
        """
        text, negative = self._encode((prompt, prompt_2), (negative_prompt, negative_prompt_2), clip_skip)
        return text.tokens, negative.tokens, text.pooled, negative.pooled

    def _read(self, call):
        size, guided, time_ids = self._size(call), self._guided(call), {}
        for sign in ("", NEGATIVE):
            pairs = (getattr(call, sign + name) for name in MICRO_CONDITIONING)
            time_ids[sign] = _time_ids(size, *pairs, sign)
        negative_sizes = [NEGATIVE + name for name in MICRO_CONDITIONING if any(getattr(call, NEGATIVE + name) or ())]
        self._warn_of_single_branch(call, "negative_prompt_2", *negative_sizes)
        embeddings = [
            self._prompts.given(
                getattr(call, f"{sign}prompt_embeds"), getattr(call, f"{sign}pooled_prompt_embeds"), sign, self.dtype
            )
            for sign in ("", NEGATIVE)
        ]
        branches = self._prompts.read(
            (call.prompt, call.prompt_2), (call.negative_prompt, call.negative_prompt_2), *embeddings, guided=guided
        )
        if not guided:
            return Request(call, size, branches, [time_ids[""]])
        if call.negative_original_size is None or call.negative_target_size is None:
            time_ids[NEGATIVE] = time_ids[""]
            if negative_sizes:
                warn(
                    f"{', '.join(negative_sizes)} has no effect without both negative_original_size and "
                    "negative_target_size; give both, or remove it"
                )
        return Request(call, size, branches, [time_ids[NEGATIVE], time_ids[""]])


def _time_ids(size: Size, original: Size | None, crop: Size, target: Size | None, prefix: str = "") -> list[float]:
    """SDXL's micro-conditioning of one branch: original size, top left corner of the crop, target size; six numbers.

    Args:
        size: Of the image; the default of `original` and `target`.
        original: As `original_size` of a call.
        crop: As `crops_coords_top_left` of a call.
        target: As `target_size` of a call.
        prefix: Of the arguments' names, for errors.
    """
    original, target = (size if given is None else given for given in (original, target))
    pairs = {prefix + name: pair for name, pair in zip(MICRO_CONDITIONING, (original, crop, target), strict=True)}
    for name, pair in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidArgument(f"{name} is {pair!r}; give two numbers, (height, width)")
    return [finite_number(value, name) for name, pair in pairs.items() for value in pair]
