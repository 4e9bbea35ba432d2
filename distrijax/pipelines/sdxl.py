"""Stable Diffusion XL: two text encoders, a pooled embedding, and micro-conditioning on sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distrijax.errors import InvalidArgument, warn
from distrijax.models.families import SDXL
from distrijax.pipelines.build import Pipeline
from distrijax.pipelines.call import Callback, PipelineOutput, Request, Size
from distrijax.pipelines.prompt import Prompt
from distrijax.schedulers import Scheduler
from distrijax.validate import finite_number

MICRO_CONDITIONING = ("original_size", "crops_coords_top_left", "target_size")
"""Arguments that the UNet's time ids consist of (arXiv 2307.01952, section 2.2)."""

NEGATIVE = "negative_"
"""Prefix of arguments of the negative prompt."""


class DistriSDXLPipeline(Pipeline):
    """Stable Diffusion XL with displaced patch parallelism, called as diffusers' StableDiffusionXLPipeline.

    All arguments may change from call to call. New shapes compile new programs, and so does the first call with displaced
    steps after calls with synchronous ones alone, or the reverse. `scheduler` may be replaced
    (`distrijax.schedulers.with_class`); the loop then compiles again.

    Attributes:
        scheduler: The scheduler of the next calls.
        programs: The compiled programs; counts them and the seconds that they took.
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
        scheduler: str | Scheduler | None = None,
    ) -> PipelineOutput:
        """Generates images of prompts.

        Names, meanings and defaults are diffusers'; `distrijax.pipelines.call.Call` lists the differences.

        Args:
            prompt: The prompt, or a list of them; None if `prompt_embeds` is given.
            prompt_2: The prompt of the second text encoder. Default: `prompt`.
            height: Height of the images in pixels. Default: the size that the model was trained for.
            width: Width of the images in pixels. Default: the size that the model was trained for.
            num_inference_steps: Number of denoising steps.
            guidance_scale: Scale of classifier-free guidance; above 1 an unconditional branch runs, too. A UNet that is
                conditioned on the guidance scale (`UNetConfig.branches`; LCM) runs one branch; negative prompts and
                `guidance_rescale` have no effect on it.
            guidance_rescale: How much of the guided prediction is rescaled to the contrast of the conditional one, from 0 to 1
                (arXiv 2305.08891, section 3.4).
            negative_prompt: What images should not show; one for all prompts or one for each. Default: embeddings of zeros, or
                those of "" if model_index.json sets `force_zeros_for_empty_prompt` to false.
            negative_prompt_2: The negative prompt of the second text encoder. Default: `negative_prompt`.
            num_images_per_prompt: Images of each prompt.
            seed: Of the noise: one for all images (image i draws from its i-th stream), or one for each image. The noise is
                the same on any mesh and, unlike that of diffusers' generator, in every call.
            latents: Starting noise [images, channels, height/f, width/f] in place of the seed's, normally distributed; f is
                the VAE's factor (8).
            prompt_embeds: Token embeddings [prompts, tokens, width] in place of `prompt`, as `encode_prompt` returns them.
            negative_prompt_embeds: The same for `negative_prompt`.
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
            clip_skip: How many of the text encoders' last layers are skipped for the prompt. Default: 0.
            output_type: "pil", "np" or "latent"; see `PipelineOutput`.
            callback_on_step_end: Called after each step as `callback(pipeline, step, timestep, {"latents": latents})`, with
                latents [images, channels, height/f, width/f]. It may return {"latents": ...} to continue from, and stop the
                call by an exception. A step is a call of the UNet; PNDM makes one more than `num_inference_steps`.
            chunk_size: Steps between two updates of the progress bar and two calls of the callback. None runs the loop as one
                program, or step by step with `DistriConfig.sync_steps` or a callback.
            scheduler: A scheduler for this call, or a name from `distrijax.schedulers.SCHEDULERS`, which gets the options of
                the pipeline's. Default: the pipeline's.

        Returns:
            The images.

        Raises:
            InvalidArgument: For arguments that cannot be used.
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

    def _parse_call(self, given: Mapping[str, Any]) -> Request:
        call, time_ids = self._common_args(given), {}
        for sign in ("", NEGATIVE):
            time_ids[sign] = _time_ids(
                (call.height, call.width), *(given[sign + name] for name in MICRO_CONDITIONING), sign
            )
        negative_sizes = [NEGATIVE + name for name in MICRO_CONDITIONING if any(given[NEGATIVE + name] or ())]
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
                    f"{', '.join(negative_sizes)} has no effect without both negative_original_size and "
                    "negative_target_size; give both, or remove it"
                )
        return Request(call, branches, [time_ids[NEGATIVE], time_ids[""]])


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
