"""DPM-Solver++(2M). Agrees with diffusers' DPMSolverMultistepScheduler.

The predicted image is extrapolated linearly in lambda = log(alpha / sigma), from this step's and the previous step's. With `ratio`
the next sigma / alpha divided by this one, a step is h = -log(ratio) wide in lambda. exp(-h) is `ratio` itself, so a step to
sigma = 0 needs no infinity.

References:
    arXiv 2211.01095, algorithm 2.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from distrijax.schedulers import common
from distrijax.schedulers.base import Column, ZeroSNRScheduler, check_start, to_float32
from distrijax.validate import check_choice


class SolverType(enum.StrEnum):
    """How the slope of the predicted image enters a second-order step."""

    MIDPOINT = "midpoint"
    HEUN = "heun"


class DPMSolverSteps(NamedTuple):
    """The constants of DPM-Solver++'s steps.

    The image is a weighted sum of latents and model output. The next latents are
    from_latents * latents + from_image * image + from_previous_image * previous image.
    """

    timestep: Column
    image_scale: Column
    noise_scale: Column
    image_from_latents: Column
    image_from_output: Column
    from_latents: Column
    from_image: Column
    from_previous_image: Column


class MultistepState(NamedTuple):
    """What one step hands to the next, `[b, h, w, c]`, float32.

    Attributes:
        latents: The latents.
        previous_image: The image that the previous step predicted; zeros before the first step.
    """

    latents: Float[Array, "b h w c"]
    previous_image: Float[Array, "b h w c"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverPP2M(ZeroSNRScheduler):
    """diffusers' DPMSolverMultistepScheduler with algorithm_type dpmsolver++, of order 1 or 2.

    Attributes:
        solver_order: The order of the steps, 1 or 2.
        solver_type: How the slope of the predicted image enters a step of second order.
        lower_order_final: Whether the last step is of first order if there are fewer than 15 steps.
        euler_at_final: Whether the last step is always of first order. A step to sigma = 0 always is.
        use_karras_sigmas: Whether noise levels are spaced as in arXiv 2206.00364, equation 5; timesteps are rounded.
        final_sigmas_type: The noise level after the last step.
    """

    diffusers_name: ClassVar[str] = "DPMSolverMultistepScheduler"
    FIXED = {
        "algorithm_type": ("dpmsolver++",),
        "thresholding": (False, None),
        "lambda_min_clipped": (-float("inf"), None),
        "variance_type": (None, "fixed_small", "fixed_large"),
        "use_beta_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_lu_lambdas": (False, None),
        "use_flow_sigmas": (False, None),
        "use_dynamic_shifting": (False, None),
    }

    solver_order: int = 2
    solver_type: SolverType = SolverType.MIDPOINT
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_karras_sigmas: bool = False
    final_sigmas_type: common.FinalSigma = common.FinalSigma.ZERO

    def __post_init__(self):
        super().__post_init__()
        self._choose(SolverType, "solver_type")
        self._choose(common.FinalSigma, "final_sigmas_type")
        self._flag("lower_order_final", "euler_at_final", "use_karras_sigmas")
        check_choice(self.solver_order, (1, 2), "solver_order")

    def schedule(self, num_inference_steps: int, start: int = 0) -> tuple[DPMSolverSteps, float]:
        timesteps, sigmas = self._levels(num_inference_steps)
        start = check_start(start, len(timesteps))
        sigmas = sigmas[start:]
        alphas = 1 / np.sqrt(sigmas**2 + 1)
        image_scale, noise_scale = alphas[:-1], (sigmas * alphas)[:-1]
        image_from_latents, image_from_output = common.image_weights(self.prediction_type, image_scale, noise_scale)
        ratio = sigmas[1:] / sigmas[:-1]
        slope = self._slope_weights(ratio, alphas[1:], len(timesteps))
        steps = DPMSolverSteps(
            timestep=timesteps[start:],
            image_scale=image_scale,
            noise_scale=noise_scale,
            image_from_latents=image_from_latents,
            image_from_output=image_from_output,
            from_latents=ratio * alphas[1:] / alphas[:-1],
            from_image=alphas[1:] * (1 - ratio) + slope,
            from_previous_image=-slope,
        )
        return to_float32(steps), 1.0

    def init(self, latents, init_noise_sigma=1.0) -> MultistepState:
        latents = super().init(latents, init_noise_sigma).latents
        return MultistepState(latents, jnp.zeros_like(latents))

    def update(self, state: MultistepState, model_output, step: DPMSolverSteps, noise=None) -> MultistepState:
        latents = state.latents
        image = step.image_from_latents * latents + step.image_from_output * model_output.astype(jnp.float32)
        history = step.from_image * image + step.from_previous_image * state.previous_image
        return MultistepState(step.from_latents * latents + history, image)

    def _levels(self, count: int) -> tuple[common.PerStep, common.Boundaries]:
        """The timesteps, which are whole numbers, and the sigmas (divided by alpha) before each step and after the last."""
        table = common.sigma_table(self.cumulative_alphas())
        timesteps = np.round(self.spaced_timesteps(count, omit_zero=True))
        if self.use_karras_sigmas:
            sigmas = common.karras_sigmas(float(table[-1]), float(table[0]), count)
            timesteps = common.sigmas_to_timesteps(sigmas, table)
            # diffusers keeps the fractions of the cosine schedule, but truncates them later
            cosine = self.beta_schedule == common.BetaSchedule.SQUAREDCOS_CAP_V2
            timesteps = np.trunc(timesteps) if cosine else np.round(timesteps)
        else:
            sigmas = np.interp(timesteps, np.arange(len(table)), table)
        return timesteps, common.with_final(sigmas, self.final_sigmas_type, table)

    def _slope_weights(self, ratio: common.PerStep, next_alpha: common.PerStep, total: int) -> common.PerStep:
        """The weight of (image - previous image) in each step; 0 in a step of first order. `total`: steps of the whole schedule."""
        second = np.full(len(ratio), self.solver_order == 2)
        if (
            self.final_sigmas_type == common.FinalSigma.ZERO
            or self.euler_at_final
            or (self.lower_order_final and total < 15)
        ):
            second[-1] = False
        h = -np.log(np.where(ratio > 0, ratio, 1.0))
        h_before = np.append(0.0, h[:-1])
        # the first step has no previous one, and two predictions at one noise level (linspace with nearly all training
        # timesteps) do not define a slope
        second &= h_before > 0
        if self.solver_type == SolverType.MIDPOINT:
            weight = 0.5 * (1 - ratio) * h
        else:
            weight = ratio - 1 + h
        return next_alpha * np.divide(weight, h_before, out=np.zeros_like(h), where=second)
