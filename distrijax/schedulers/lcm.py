"""Consistency sampling of distilled models (arXiv 2310.04378, algorithm 3); agrees with diffusers' LCMScheduler.

Each step goes all the way to an image, and back to the next timestep with fresh noise; the last step stays at the image.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from distrijax.errors import DistriError
from distrijax.schedulers import common
from distrijax.schedulers.base import Column, State, ZeroSNRScheduler, to_float32
from distrijax.validate import positive

SIGMA_DATA = 0.5
"""The spread of images for which the boundary conditions were made (arXiv 2303.01469, appendix C)."""


class LCMSteps(NamedTuple):
    """How the image is predicted; then how much of latents and image the answer has; then, of it and of noise, the next latents."""

    timestep: Column
    image_from_latents: Column
    image_from_output: Column
    from_latents: Column
    from_image: Column
    next_alpha: Column
    next_sigma: Column


@dataclasses.dataclass(frozen=True, kw_only=True)
class LCM(ZeroSNRScheduler):
    """diffusers' LCMScheduler. Its timesteps are those of the distillation: `timestep_spacing` and `steps_offset` say nothing.

    original_inference_steps: how many evenly spaced timesteps the model was distilled on; a call takes some of them.
    timestep_scaling: how soon, from timestep 0 on, the answer is the predicted image instead of the latents.
    clip_sample: clip the predicted image to plus or minus clip_sample_range.
    """

    diffusers_name: ClassVar[str] = "LCMScheduler"
    needs_noise: ClassVar[bool] = True
    idle: ClassVar[frozenset[str]] = frozenset({"timestep_spacing", "steps_offset"})
    FIXED = {"thresholding": (False, None)}

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: common.BetaSchedule = common.BetaSchedule.SCALED_LINEAR
    timestep_spacing: common.Spacing = common.Spacing.LEADING
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    clip_sample: bool = False
    clip_sample_range: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self._flag("clip_sample")
        self._positive_number("clip_sample_range")
        self._positive_number("timestep_scaling")
        positive(self.original_inference_steps, "original_inference_steps")
        if self.original_inference_steps > self.num_train_timesteps:
            raise DistriError(
                f"original_inference_steps is {self.original_inference_steps} and the model knows "
                f"{self.num_train_timesteps} timesteps; use at most as many"
            )

    def schedule(self, num_inference_steps: int) -> tuple[LCMSteps, float]:
        timesteps = self._timesteps(num_inference_steps)
        table = self.cumulative_alphas().astype(np.float64)
        self.check_image_left(timesteps[0], table, "another scheduler")
        alpha, sigma = np.sqrt(table[timesteps]), np.sqrt(1 - table[timesteps])
        image_from_latents, image_from_output = common.image_weights(self.prediction_type, alpha, sigma)
        scaled = timesteps * self.timestep_scaling
        width = scaled**2 + SIGMA_DATA**2
        steps = LCMSteps(
            timestep=timesteps,
            image_from_latents=image_from_latents,
            image_from_output=image_from_output,
            from_latents=SIGMA_DATA**2 / width,
            from_image=scaled / np.sqrt(width),
            next_alpha=np.append(alpha[1:], 1),
            next_sigma=np.append(sigma[1:], 0),
        )
        return to_float32(steps), 1.0

    def update(self, state: State, model_output, step: LCMSteps, noise=None) -> State:
        latents = state.latents
        image = step.image_from_latents * latents + step.image_from_output * model_output.astype(jnp.float32)
        if self.clip_sample:
            image = jnp.clip(image, -self.clip_sample_range, self.clip_sample_range)
        answer = step.from_latents * latents + step.from_image * image
        return State(step.next_alpha * answer + step.next_sigma * noise.astype(jnp.float32))

    def _timesteps(self, count: int) -> np.ndarray:
        """So many of the distillation's timesteps, evenly spaced by their numbers; whole numbers, descending."""
        positive(count, "num_inference_steps")
        known = self.original_inference_steps
        if count > known:
            raise DistriError(
                f"num_inference_steps is {count} and the model was distilled on {known} timesteps "
                f"(original_inference_steps); use at most {known}, and 1 to 8 as a rule"
            )
        distilled = np.arange(known, 0, -1) * (self.num_train_timesteps // known) - 1
        return distilled[np.floor(np.linspace(0, known, count, endpoint=False)).astype(int)]
