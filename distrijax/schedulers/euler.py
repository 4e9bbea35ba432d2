"""Euler's method for the probability flow ODE. Agrees with diffusers' EulerDiscreteScheduler.

Latents are image + sigma * noise. A step keeps the share `ratio` of the noise: the next latents are
ratio * latents + (1 - ratio) * image. The predicted image is linear in latents and model output, and so is the step.

References:
    arXiv 2206.00364.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from distrijax.schedulers import common
from distrijax.schedulers.base import Column, State, ZeroSNRScheduler, check_start, to_float32


class EulerSteps(NamedTuple):
    """The constants of Euler's steps: the next latents are from_latents * latents + from_output * model_output."""

    timestep: Column
    image_scale: Column
    noise_scale: Column
    input_scale: Column
    from_latents: Column
    from_output: Column


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmaScheduler(ZeroSNRScheduler):
    """A scheduler whose latents are image + sigma * noise, at descending sigmas."""

    def scale_input(self, latents: Float[Array, "b h w c"], step) -> Float[Array, "b h w c"]:
        """Scales latents to a variance of about 1 at every noise level.

        Args:
            latents: image + sigma * noise.
            step: Constants of the step.
        """
        return latents * step.input_scale

    def levels(self, num_inference_steps: int) -> tuple[common.PerStep, common.PerStep, common.TrainTable]:
        """Noise levels before each step.

        Args:
            num_inference_steps: Number of steps n.

        Returns:
            The timesteps and their sigmas, `[n]` each, and the sigmas of all training timesteps.
        """
        table = common.sigma_table(self.cumulative_alphas())
        timesteps = self.spaced_timesteps(num_inference_steps)
        return timesteps, np.interp(timesteps, np.arange(len(table)), table), table

    def init_noise_sigma(self, sigmas: common.Boundaries) -> float:
        """The standard deviation of the starting noise. As in diffusers, only `leading` includes the variance of the image.

        Args:
            sigmas: Noise levels of the run.
        """
        leading = self.timestep_spacing == common.Spacing.LEADING
        return float(np.sqrt(sigmas.max() ** 2 + leading))

    def weights(self, sigma: common.PerStep, ratio: common.PerStep) -> dict[str, common.PerStep]:
        """The constants of steps from noise level `sigma` to `ratio * sigma`.

        Args:
            sigma: Noise level before each step, `[n]`.
            ratio: Noise level after each step, relative to the one before it, `[n]`.

        Returns:
            Name of a constant to its values, `[n]`.
        """
        alpha = 1 / np.sqrt(sigma**2 + 1)
        on_latents, on_output = common.image_weights(self.prediction_type, alpha, sigma * alpha)
        return {
            "image_scale": np.ones_like(sigma),
            "noise_scale": sigma,
            "input_scale": alpha,
            "from_latents": ratio + (1 - ratio) * on_latents * alpha,
            "from_output": (1 - ratio) * on_output,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(SigmaScheduler):
    """diffusers' EulerDiscreteScheduler without churn.

    Attributes:
        use_karras_sigmas: Whether noise levels are spaced as in arXiv 2206.00364, equation 5, from sigma_max to sigma_min.
        sigma_min: The smallest of these noise levels; None takes that of the last timestep.
        sigma_max: The largest of these noise levels; None takes that of the first timestep.
        final_sigmas_type: The noise level after the last step.
    """

    diffusers_name: ClassVar[str] = "EulerDiscreteScheduler"
    FIXED = {
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "use_beta_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
    }

    use_karras_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: common.FinalSigma = common.FinalSigma.ZERO

    def __post_init__(self):
        super().__post_init__()
        self._choose(common.FinalSigma, "final_sigmas_type")
        self._flag("use_karras_sigmas")
        for name in ("sigma_min", "sigma_max"):
            if getattr(self, name) is not None:
                self._positive_number(name)

    def schedule(self, num_inference_steps: int, start: int = 0) -> tuple[EulerSteps, float]:
        timesteps, sigmas, table = self.levels(num_inference_steps)
        if self.use_karras_sigmas:
            largest, smallest = self.sigma_max or sigmas[0], self.sigma_min or sigmas[-1]
            sigmas = common.karras_sigmas(largest, smallest, num_inference_steps)
            timesteps = common.sigmas_to_timesteps(sigmas, table)
        sigmas = common.with_final(sigmas, self.final_sigmas_type, table)
        start = check_start(start, len(timesteps))
        sigma, next_sigma = sigmas[start:-1], sigmas[start + 1 :]
        steps = EulerSteps(timestep=timesteps[start:], **self.weights(sigma, next_sigma / sigma))
        return to_float32(steps), self.init_noise_sigma(sigmas)

    def update(self, state: State, model_output, step: EulerSteps, noise=None) -> State:
        return State(step.from_latents * state.latents + step.from_output * model_output.astype(jnp.float32))
