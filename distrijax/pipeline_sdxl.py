"""Stable Diffusion XL: two text encoders, a pooled embedding, and the sizes that the UNet is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distrijax.config import DistriError, finite_number
from distrijax.loading import SDXL
from distrijax.pipeline import Call, Callback, Pipeline, PipelineOutput, Size
from distrijax.processes import warn
from distrijax.prompt import Prompt


class DistriSDXLPipeline(Pipeline):
    """Stable Diffusion XL by displaced patch parallelism; a call mirrors diffusers' StableDiffusionXLPipeline.

    Heights, widths, steps, guidance, schedulers and numbers of images may change from call to call; only new shapes
    compile. `scheduler` may be replaced (`distrijax.schedulers.with_class`). `programs` counts what was compiled.
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
        """Paints prompts; arguments as in diffusers, except those that `distrijax.pipeline.Call` describes.

        height, width: pixels; None takes the size the model was trained for. sizes: (height, width). prompt_2 and
        negative_prompt_2 go to the second text encoder, which reads the first's otherwise. Raises DistriError for
        arguments that cannot be used.
        """
        height, width = self._size(height, width)
        call = Call(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            latents=latents,
            clip_skip=clip_skip,
            branches=self.unet_config.branches,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            chunk_size=chunk_size,
        )
        size, negative_crop = (height, width), negative_crops_coords_top_left
        time_ids = _time_ids(size, original_size, crops_coords_top_left, target_size)
        negative_ids = _time_ids(size, negative_original_size, negative_crop, negative_target_size, "negative_")
        negative_sizes = {
            "negative_original_size": negative_original_size,
            "negative_crops_coords_top_left": negative_crop if any(negative_crop) else None,
            "negative_target_size": negative_target_size,
        }
        self._warn_of_single_branch(
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            negative_prompt_embeds=negative_prompt_embeds,
            guidance_rescale=guidance_rescale or None,
            **negative_sizes,
        )
        branches = self._prompts.read(
            (prompt, prompt_2),
            (negative_prompt, negative_prompt_2),
            self._prompts.given(prompt_embeds, pooled_prompt_embeds, "", self.dtype),
            self._prompts.given(negative_prompt_embeds, negative_pooled_prompt_embeds, "negative_", self.dtype),
            guided=call.guided,
        )
        if negative_original_size is None or negative_target_size is None:
            negative_ids = time_ids
            if call.guided:
                _warn_of_idle_sizes(negative_sizes)
        return self._paint(call, branches, (negative_ids, time_ids) if call.guided else (time_ids,))


def _time_ids(size: Size, original: Size | None, crop: Size, target: Size | None, prefix: str = "") -> list[float]:
    """SDXL's micro-conditioning: original size, top left corner of the crop, target size.

    prefix: before the arguments' names in errors.
    """
    original, target = (size if given is None else given for given in (original, target))
    names = (f"{prefix}{name}" for name in ("original_size", "crops_coords_top_left", "target_size"))
    pairs = dict(zip(names, (original, crop, target), strict=True))
    for name, pair in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise DistriError(f"{name} is {pair!r}; give two numbers, (height, width)")
    return [finite_number(value, name) for name, pair in pairs.items() for value in pair]


def _warn_of_idle_sizes(given: dict[str, Size | None]) -> None:
    """Tells which of the negative prompt's sizes say nothing, as in diffusers, for want of both sizes."""
    names = [name for name, size in given.items() if size is not None]
    if names:
        warn(
            f"{', '.join(names)} changes nothing without both negative_original_size and negative_target_size; "
            "give both or leave it out"
        )
