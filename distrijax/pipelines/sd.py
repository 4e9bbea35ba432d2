"""Stable Diffusion 1.x and 2.x: one text encoder, of which the UNet reads the token embeddings alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distrijax.models.families import SD
from distrijax.pipelines.build import Pipeline
from distrijax.pipelines.call import Callback, PipelineOutput, Request
from distrijax.pipelines.prompt import Prompt
from distrijax.schedulers import Scheduler


class DistriSDPipeline(Pipeline):
    """Stable Diffusion 1.x and 2.x with displaced patch parallelism, called as diffusers' StableDiffusionPipeline.

    Epsilon or v-prediction is the scheduler's `prediction_type`. As in diffusers, steps_offset is 1 and clip_sample is false
    whatever scheduler_config.json says.

    safety_checker, feature_extractor and image_encoder are not loaded. diffusers returns black images where its safety
    checker objects; here every image is returned, and whoever shows images to others is responsible for checking them.

    All arguments may change from call to call. New shapes compile new programs, and so does the first call with displaced
    steps after calls with synchronous ones alone, or the reverse. `scheduler` may be replaced
    (`distrijax.schedulers.with_class`); the loop then compiles again.

    Attributes:
        scheduler: The scheduler of the next calls.
        programs: The compiled programs; counts them and the seconds that they took.
    """

    family = SD

    def __call__(
        self,
        prompt: Prompt | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        negative_prompt: Prompt | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
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
            height: Height of the images in pixels. Default: the size that the model was trained for.
            width: Width of the images in pixels. Default: the size that the model was trained for.
            num_inference_steps: Number of denoising steps.
            guidance_scale: Scale of classifier-free guidance; above 1 an unconditional branch runs, too. A UNet that is
                conditioned on the guidance scale (`UNetConfig.branches`; LCM) runs one branch; negative prompts and
                `guidance_rescale` have no effect on it.
            guidance_rescale: How much of the guided prediction is rescaled to the contrast of the conditional one, from 0 to 1
                (arXiv 2305.08891, section 3.4).
            negative_prompt: What images should not show; one for all prompts or one for each. Default: "".
            num_images_per_prompt: Images of each prompt.
            seed: Of the noise: one for all images (image i draws from its i-th stream), or one for each image. The noise is
                the same on any mesh and, unlike that of diffusers' generator, in every call.
            latents: Starting noise [images, channels, height/f, width/f] in place of the seed's, normally distributed; f is
                the VAE's factor (8).
            prompt_embeds: Token embeddings [prompts, tokens, width] in place of `prompt`, as `encode_prompt` returns them.
            negative_prompt_embeds: The same for `negative_prompt`.
            clip_skip: How many of the text encoder's last layers are skipped for the prompt. Default: 0.
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
        self, prompt: Prompt, negative_prompt: Prompt | None = None, *, clip_skip: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes prompts for calls.

        Args:
            prompt: As in a call.
            negative_prompt: As in a call.
            clip_skip: As in a call.

        Returns:
            `prompt_embeds` and `negative_prompt_embeds`, [prompts, tokens, width] each.
        """
        text, negative = self._encode((prompt,), (negative_prompt,), clip_skip)
        return text.tokens, negative.tokens

    def _parse_call(self, given: Mapping[str, Any]) -> Request:
        call = self._common_args(given)
        self._warn_of_single_branch(given)
        branches = self._prompts.read(
            (given["prompt"],),
            (given["negative_prompt"],),
            self._prompts.given(given["prompt_embeds"], None, "", self.dtype),
            self._prompts.given(given["negative_prompt_embeds"], None, "negative_", self.dtype),
            guided=call.guided,
        )
        return Request(call, branches)
