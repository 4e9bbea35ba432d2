"""Sampling of latent consistency models. Agrees with diffusers' LCMScheduler.

Each step predicts the final image, and adds fresh noise to return to the next timestep. The last step returns the image.

References:
    arXiv 2310.04378, algorithm 3.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from distrijax.errors import InvalidArgument
from distrijax.schedulers import common
from distrijax.schedulers.base import Column, State, ZeroSNRScheduler, check_start, to_float32
from distrijax.validate import positive

SIGMA_DATA = 0.5
"""The standard deviation of images in the boundary conditions (arXiv 2303.01469, appendix C)."""


class LCMSteps(NamedTuple):
    """The constants of LCM's steps.

    The image is a weighted sum of latents and model output; the consistency model's result is
    from_latents * latents + from_image * image; and the next latents are next_alpha * result + next_sigma * noise.
    """

    timestep: Column
    image_scale: Column
    noise_scale: Column
    image_from_latents: Column
    image_from_output: Column
    from_latents: Column
    from_image: Column
    next_alpha: Column
    next_sigma: Column


@dataclasses.dataclass(frozen=True, kw_only=True)
class LCM(ZeroSNRScheduler):
    """diffusers' LCMScheduler. Timesteps are those of the distillation; `timestep_spacing` and `steps_offset` have no effect.

    Attributes:
        original_inference_steps: How many evenly spaced timesteps the model was distilled on. A call uses some of them.
        timestep_scaling: How fast, from timestep 0 on, the result changes from the latents to the predicted image.
        clip_sample: Whether the predicted image is clipped to plus or minus `clip_sample_range`.
        clip_sample_range: The largest absolute value after clipping.
    """

    diffusers_name: ClassVar[str] = "LCMScheduler"
    needs_noise: ClassVar[bool] = True
    ignored: ClassVar[frozenset[str]] = frozenset({"timestep_spacing", "steps_offset"})
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
            raise InvalidArgument(
                f"original_inference_steps is {self.original_inference_steps} and the model was trained on "
                f"{self.num_train_timesteps} timesteps; use at most as many"
            )

    def schedule(self, num_inference_steps: int, start: int = 0) -> tuple[LCMSteps, float]:
        timesteps = self._timesteps(num_inference_steps)
        timesteps = timesteps[check_start(start, len(timesteps)) :]
        table = self.cumulative_alphas().astype(np.float64)
        self.check_image_left(timesteps[0], table, "another scheduler")
        alpha, sigma = np.sqrt(table[timesteps]), np.sqrt(1 - table[timesteps])
        image_from_latents, image_from_output = common.image_weights(self.prediction_type, alpha, sigma)
        scaled = timesteps * self.timestep_scaling
        width = scaled**2 + SIGMA_DATA**2
        steps = LCMSteps(
            timestep=timesteps,
            image_scale=alpha,
            noise_scale=sigma,
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
        result = step.from_latents * latents + step.from_image * image
        return State(step.next_alpha * result + step.next_sigma * noise.astype(jnp.float32))

    def _timesteps(self, count: int) -> np.ndarray:
        """`count` of the distillation's timesteps, evenly spaced by index, descending."""
        positive(count, "num_inference_steps")
        distillation_steps = self.original_inference_steps
        if count > distillation_steps:
            raise InvalidArgument(
                f"num_inference_steps is {count} and the model was distilled on {distillation_steps} timesteps "
                f"(original_inference_steps); use at most {distillation_steps}, and 1 to 8 as a rule"
            )
        distilled = np.arange(distillation_steps, 0, -1) * (self.num_train_timesteps // distillation_steps) - 1
        return distilled[np.floor(np.linspace(0, distillation_steps, count, endpoint=False)).astype(int)]
