"""DDIM without added noise. Agrees with diffusers' DDIMScheduler.

References:
    arXiv 2010.02502, equation 12 with sigma = 0.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from distrijax.schedulers import common
from distrijax.schedulers.base import Column, State, ZeroSNRScheduler, check_start, to_float32


class DDIMSteps(NamedTuple):
    """The constants of DDIM's steps.

    Image and noise are predicted as weighted sums of latents and model output. The next latents are
    next_alpha * image + next_sigma * noise.
    """

    timestep: Column
    image_scale: Column
    noise_scale: Column
    image_from_latents: Column
    image_from_output: Column
    noise_from_latents: Column
    noise_from_output: Column
    next_alpha: Column
    next_sigma: Column


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(ZeroSNRScheduler):
    """diffusers' DDIMScheduler with eta = 0.

    Attributes:
        clip_sample: Whether the predicted image is clipped to plus or minus `clip_sample_range`. The predicted noise is not
            changed by it.
        clip_sample_range: The largest absolute value after clipping.
        set_alpha_to_one: Whether the last step ends without noise, instead of at the noise level of training timestep 0.
    """

    diffusers_name: ClassVar[str] = "DDIMScheduler"
    FIXED = {"thresholding": (False, None)}

    timestep_spacing: common.Spacing = common.Spacing.LEADING
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True

    def __post_init__(self):
        super().__post_init__()
        self._flag("clip_sample", "set_alpha_to_one")
        self._positive_number("clip_sample_range")

    def schedule(self, num_inference_steps: int, start: int = 0) -> tuple[DDIMSteps, float]:
        timesteps = self.whole_timesteps(num_inference_steps)
        timesteps = timesteps[check_start(start, len(timesteps)) :]
        table = self.cumulative_alphas().astype(np.float64)
        self.check_image_left(timesteps[0], table, "timestep_spacing 'leading', another scheduler")
        # as in diffusers a step is always train // steps wide, even if the spacing's next timestep is another
        following = timesteps - self.num_train_timesteps // num_inference_steps
        final = 1.0 if self.set_alpha_to_one else table[0]
        next_squared = np.where(following < 0, final, table[np.maximum(following, 0)])
        alpha, sigma = np.sqrt(table[timesteps]), np.sqrt(1 - table[timesteps])
        image_from_latents, image_from_output = common.image_weights(self.prediction_type, alpha, sigma)
        noise_from_latents, noise_from_output = common.noise_weights(self.prediction_type, alpha, sigma)
        steps = DDIMSteps(
            timestep=timesteps,
            image_scale=alpha,
            noise_scale=sigma,
            image_from_latents=image_from_latents,
            image_from_output=image_from_output,
            noise_from_latents=noise_from_latents,
            noise_from_output=noise_from_output,
            next_alpha=np.sqrt(next_squared),
            next_sigma=np.sqrt(1 - next_squared),
        )
        return to_float32(steps), 1.0

    def update(self, state: State, model_output, step: DDIMSteps, noise=None) -> State:
        latents, output = state.latents, model_output.astype(jnp.float32)
        image = step.image_from_latents * latents + step.image_from_output * output
        predicted_noise = step.noise_from_latents * latents + step.noise_from_output * output
        if self.clip_sample:
            image = jnp.clip(image, -self.clip_sample_range, self.clip_sample_range)
        return State(step.next_alpha * image + step.next_sigma * predicted_noise)
