"""Euler's method with a part of the noise drawn anew at each step (k-diffusion's ancestral sampling).

Agrees with diffusers' EulerAncestralDiscreteScheduler: the step goes down to sigma_down, and fresh noise of sigma_up
brings it back up to the next level, sigma_down^2 + sigma_up^2 = next^2.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from distrijax.schedulers import common
from distrijax.schedulers.base import Column, State, to_float32
from distrijax.schedulers.euler import SigmaScheduler


class EulerAncestralSteps(NamedTuple):
    """The next latents are from_latents * latents + from_output * model_output + from_noise * fresh noise."""

    timestep: Column
    input_scale: Column
    from_latents: Column
    from_output: Column
    from_noise: Column


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerAncestral(SigmaScheduler):
    """diffusers' EulerAncestralDiscreteScheduler; additionally it takes models that predict the image (`sample`)."""

    diffusers_name: ClassVar[str] = "EulerAncestralDiscreteScheduler"
    needs_noise: ClassVar[bool] = True

    def schedule(self, num_inference_steps: int) -> tuple[EulerAncestralSteps, float]:
        timesteps, sigmas, table = self.levels(num_inference_steps)
        sigmas = common.with_final(sigmas, common.FinalSigma.ZERO, table)
        sigma, next_sigma = sigmas[:-1], sigmas[1:]
        # sigma_up^2 = next^2 (1 - ratio^2), which leaves sigma_down = next * ratio. diffusers subtracts the squares in
        # float32 instead, and where next is far below sigma (zero SNR) the difference loses digits.
        ratio = next_sigma / sigma
        steps = EulerAncestralSteps(
            timestep=timesteps, **self.weights(sigma, ratio**2), from_noise=next_sigma * np.sqrt(1 - ratio**2)
        )
        return to_float32(steps), self.init_noise_sigma(sigmas)

    def update(self, state: State, model_output, step: EulerAncestralSteps, noise=None) -> State:
        moved = step.from_latents * state.latents + step.from_output * model_output.astype(jnp.float32)
        return State(moved + step.from_noise * noise.astype(jnp.float32))
