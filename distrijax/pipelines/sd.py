"""Stable Diffusion 1.x and 2.x: one text encoder, whose token embeddings are all that the UNet is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distrijax.models.families import SD
from distrijax.pipelines.call import Callback, PipelineOutput, Request
from distrijax.pipelines.pipeline import Pipeline
from distrijax.pipelines.prompt import Prompt


class DistriSDPipeline(Pipeline):
    """Stable Diffusion 1.x and 2.x by displaced patch parallelism; a call mirrors diffusers' StableDiffusionPipeline.

    Epsilon or v-prediction is the scheduler's `prediction_type`. Of a checkpoint's parts, safety_checker,
    feature_extractor and image_encoder are neither read nor run: diffusers blackens the pictures that its safety checker
    dislikes, here every picture is returned, and whoever shows them to others has to look at them. As in diffusers, and
    whatever scheduler_config.json says, steps_offset is 1 and clip_sample false.
    Heights, widths, steps, guidance and numbers of images may change from call to call; only new shapes compile, and the loop
    for a call whose steps are all exact or the first whose are not. `scheduler` may be replaced
    (`distrijax.schedulers.with_class`), with which the loop compiles again. `programs` counts what was compiled.
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
    ) -> PipelineOutput:
        """Paints prompts; arguments as in diffusers, except those that `distrijax.pipelines.call.Call` describes.

        height, width: pixels; None takes the size the model was trained for. negative_prompt: None is "". clip_skip: how
        many of the text encoder's last layers the prompt leaves out. Raises DistriError for arguments that cannot be used.
        """
        return self._generate(self._parse_call(locals()))

    def encode_prompt(
        self, prompt: Prompt, negative_prompt: Prompt | None = None, *, clip_skip: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`prompt_embeds` and `negative_prompt_embeds` of a call with these prompts, [prompts, tokens, width] each."""
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
