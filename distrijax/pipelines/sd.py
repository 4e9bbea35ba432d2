"""Stable Diffusion 1.x and 2.x: one text encoder, of which the UNet reads the token embeddings alone."""

from __future__ import annotations

import numpy as np

from distrijax.models.families import SD
from distrijax.pipelines.build import Pipeline
from distrijax.pipelines.call import Call, Request, call_method
from distrijax.pipelines.prompt import Prompt


class DistriSDPipeline(Pipeline):
    """Stable Diffusion 1.x and 2.x with displaced patch parallelism, called as diffusers' StableDiffusionPipeline.

    Epsilon or v-prediction is the scheduler's `prediction_type`. As in diffusers, steps_offset is 1 and clip_sample is false
    whatever scheduler_config.json says.

    safety_checker, feature_extractor and image_encoder are not loaded. diffusers returns black images where its safety
    checker objects; here every image is returned, and whoever shows images to others is responsible for checking them.

    All arguments may change from call to call. New shapes and new kinds of steps compile new programs. `scheduler` may be
    replaced (`distrijax.schedulers.with_class`); the loop then compiles again.

    Attributes:
        scheduler: The scheduler of the next calls.
        programs: The compiled programs; counts them and the seconds that they took.
    """

    family = SD
    call_type = Call

    __call__ = call_method(Call)

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

    def _read(self, call):
        size, guided = self._size(call), self._guided(call)
        self._warn_of_single_branch(call)
        branches = self._prompts.read(
            (call.prompt,),
            (call.negative_prompt,),
            self._prompts.given(call.prompt_embeds, None, "", self.dtype),
            self._prompts.given(call.negative_prompt_embeds, None, "negative_", self.dtype),
            guided=guided,
        )
        return Request(call, size, branches)
