"""Stable Diffusion XL: two text encoders, a pooled embedding, and the sizes that the UNet is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distrijax.errors import DistriError, warn
from distrijax.models.families import SDXL
from distrijax.pipelines.call import Callback, PipelineOutput, Request, Size
from distrijax.pipelines.pipeline import Pipeline
from distrijax.pipelines.prompt import Prompt
from distrijax.validate import finite_number

SIZES, NEGATIVE = ("original_size", "crops_coords_top_left", "target_size"), "negative_"
"""SDXL's micro-conditioning, and what the arguments of the negative prompt begin with."""


class DistriSDXLPipeline(Pipeline):
    """Stable Diffusion XL by displaced patch parallelism; a call mirrors diffusers' StableDiffusionXLPipeline.

    Heights, widths, steps, guidance and numbers of images may change from call to call; only new shapes compile, and the loop
    for a call whose steps are all exact or the first whose are not. `scheduler` may be replaced
    (`distrijax.schedulers.with_class`), with which the loop compiles again. `programs` counts what was compiled.
    """

    family = SDXL

    def __call__(
        self,
        prompt: Prompt | None = None,
        prompt_2: Prompt | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        guidance_rescale: float = 0.0,
        negative_prompt: Prompt | None = None,
        negative_prompt_2: Prompt | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        clip_skip: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        chunk_size: int | None = 1,
    ) -> PipelineOutput:
        """Paints prompts; arguments as in diffusers, except those that `distrijax.pipelines.call.Call` describes.

        height, width: pixels; None takes the size the model was trained for. sizes: (height, width). prompt_2 and
        negative_prompt_2 go to the second text encoder, which reads the first's otherwise. Raises DistriError for
        arguments that cannot be used.
        """
        return self._generate(self._parse_call(locals()))

    def encode_prompt(
        self,
        prompt: Prompt,
        prompt_2: Prompt | None = None,
        negative_prompt: Prompt | None = None,
        negative_prompt_2: Prompt | None = None,
        *,
        clip_skip: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What a call with these prompts makes of them, in diffusers' order.

        `prompt_embeds` and `negative_prompt_embeds`, [prompts, tokens, width], then `pooled_prompt_embeds` and
        `negative_pooled_prompt_embeds`, [prompts, width].
        """
        text, negative = self._encode((prompt, prompt_2), (negative_prompt, negative_prompt_2), clip_skip)
        return text.tokens, negative.tokens, text.pooled, negative.pooled

    def _parse_call(self, given: Mapping[str, Any]) -> Request:
        call, time_ids = self._common_args(given), {}
        for sign in ("", NEGATIVE):
            time_ids[sign] = _time_ids((call.height, call.width), *(given[sign + name] for name in SIZES), sign)
        negative_sizes = [NEGATIVE + name for name in SIZES if any(given[NEGATIVE + name] or ())]
        self._warn_of_single_branch(given, "negative_prompt_2", *negative_sizes)
        embeddings = [
            self._prompts.given(given[f"{sign}prompt_embeds"], given[f"{sign}pooled_prompt_embeds"], sign, self.dtype)
            for sign in ("", NEGATIVE)
        ]
        branches = self._prompts.read(
            (given["prompt"], given["prompt_2"]),
            (given["negative_prompt"], given["negative_prompt_2"]),
            *embeddings,
            guided=call.guided,
        )
        if not call.guided:
            return Request(call, branches, [time_ids[""]])
        if given["negative_original_size"] is None or given["negative_target_size"] is None:
            time_ids[NEGATIVE] = time_ids[""]
            if negative_sizes:
                warn(
                    f"{', '.join(negative_sizes)} changes nothing without both negative_original_size and "
                    "negative_target_size; give both or leave it out"
                )
        return Request(call, branches, [time_ids[NEGATIVE], time_ids[""]])


def _time_ids(size: Size, original: Size | None, crop: Size, target: Size | None, prefix: str = "") -> list[float]:
    """SDXL's micro-conditioning: original size, top left corner of the crop, target size.

    prefix: before the arguments' names in errors.
    """
    original, target = (size if given is None else given for given in (original, target))
    pairs = {prefix + name: pair for name, pair in zip(SIZES, (original, crop, target), strict=True)}
    for name, pair in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise DistriError(f"{name} is {pair!r}; give two numbers, (height, width)")
    return [finite_number(value, name) for name, pair in pairs.items() for value in pair]
