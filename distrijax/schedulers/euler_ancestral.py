"""Euler's method with fresh noise at each step (ancestral sampling, as in k-diffusion).

Agrees with diffusers' EulerAncestralDiscreteScheduler. A step goes down to sigma_down, and fresh noise of sigma_up brings the
latents back to the next noise level: sigma_down^2 + sigma_up^2 = next^2.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from distrijax.schedulers import common
from distrijax.schedulers.base import Column, State, check_start, to_float32
from distrijax.schedulers.euler import SigmaScheduler


class EulerAncestralSteps(NamedTuple):
    """The constants of ancestral steps.

    The next latents are from_latents * latents + from_output * model_output + from_noise * noise.
    """

    timestep: Column
    image_scale: Column
    noise_scale: Column
    input_scale: Column
    from_latents: Column
    from_output: Column
    from_noise: Column


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerAncestral(SigmaScheduler):
    """diffusers' EulerAncestralDiscreteScheduler. In addition it accepts models that predict the image (`sample`)."""

    diffusers_name: ClassVar[str] = "EulerAncestralDiscreteScheduler"
    needs_noise: ClassVar[bool] = True

    def schedule(self, num_inference_steps: int, start: int = 0) -> tuple[EulerAncestralSteps, float]:
        timesteps, sigmas, table = self.levels(num_inference_steps)
        sigmas = common.with_final(sigmas, common.FinalSigma.ZERO, table)
        start = check_start(start, len(timesteps))
        sigma, next_sigma = sigmas[start:-1], sigmas[start + 1 :]
        # sigma_up^2 = next^2 (1 - ratio^2), and so sigma_down = next * ratio. diffusers subtracts the squares in float32
        # instead, which loses digits if next is far below sigma (zero SNR).
        ratio = next_sigma / sigma
        steps = EulerAncestralSteps(
            timestep=timesteps[start:],
            **self.weights(sigma, ratio**2),
            from_noise=next_sigma * np.sqrt(1 - ratio**2),
        )
        return to_float32(steps), self.init_noise_sigma(sigmas)

    def update(self, state: State, model_output, step: EulerAncestralSteps, noise=None) -> State:
        moved = step.from_latents * state.latents + step.from_output * model_output.astype(jnp.float32)
        return State(moved + step.from_noise * noise.astype(jnp.float32))
