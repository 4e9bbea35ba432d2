"""PLMS, the linear multistep form of PNDM. Agrees with diffusers' PNDMScheduler.

Each step is DDIM's, with a weighted mean of the model's last four outputs: the weights are those of the fourth-order
Adams-Bashforth method, or of a lower order while the history is short. The first step is made twice, the second time from the
same latents with the mean of the outputs at its two ends. So the model is called once more than there are steps.

References:
    arXiv 2202.09778.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from distrijax.errors import InvalidArgument
from distrijax.schedulers import common
from distrijax.schedulers.base import Column, Scheduler, check_start, to_float32

FIRST_WEIGHTS = ((1, 0, 0, 0), (1 / 2, 1 / 2, 0, 0), (3 / 2, -1 / 2, 0, 0), (23 / 12, -16 / 12, 5 / 12, 0))
"""Weights of the model's output and of the three before it, in the first calls. The second call does not enter the history."""

ADAMS_BASHFORTH = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
"""The weights in all other calls."""

REPEATED_CALL = 1
"""The index of the call that makes the first step again."""


class PNDMSteps(NamedTuple):
    """The constants of PNDM's calls: the weights of what the next latents are a sum of.

    Attributes:
        timestep: The model's argument.
        image_scale: The image's factor in the latents at that timestep.
        noise_scale: The noise's factor in them.
        from_latents: The weight of the latents.
        from_start: The weight of the latents that the previous call started from.
        from_output: The weight of this output of the model.
        from_output_1: The weight of the output before it.
        from_output_2: The weight of the second output before it.
        from_output_3: The weight of the third output before it.
        moves: 1 if this output enters the history, otherwise 0.
    """

    timestep: Column
    image_scale: Column
    noise_scale: Column
    from_latents: Column
    from_start: Column
    from_output: Column
    from_output_1: Column
    from_output_2: Column
    from_output_3: Column
    moves: Column


class PNDMState(NamedTuple):
    """What one call hands to the next, `[b, h, w, c]` each, float32.

    Attributes:
        latents: The latents.
        start: The latents that the previous call started from.
        outputs: The model's last three outputs, newest first.
    """

    latents: Float[Array, "b h w c"]
    start: Float[Array, "b h w c"]
    outputs: tuple[Float[Array, "b h w c"], Float[Array, "b h w c"], Float[Array, "b h w c"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PNDM(Scheduler):
    """diffusers' PNDMScheduler without Runge-Kutta steps, as Stable Diffusion 1.x uses it.

    Attributes:
        skip_prk_steps: Must be true, although diffusers' default is false.
        set_alpha_to_one: Whether the last step ends without noise, instead of at the noise level of training timestep 0.
    """

    diffusers_name: ClassVar[str] = "PNDMScheduler"

    timestep_spacing: common.Spacing = common.Spacing.LEADING
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._flag("skip_prk_steps", "set_alpha_to_one")
        if self.prediction_type == common.Prediction.SAMPLE:
            raise InvalidArgument(
                "prediction_type is 'sample' and PNDM takes epsilon or v_prediction; use another scheduler"
            )
        if not self.skip_prk_steps:
            raise InvalidArgument(
                "skip_prk_steps is False and PNDM's Runge-Kutta steps are not supported; set it to true, as Stable "
                "Diffusion's checkpoints do, or use another scheduler"
            )

    def schedule(self, num_inference_steps: int, start: int = 0) -> tuple[PNDMSteps, float]:
        timesteps = self.whole_timesteps(num_inference_steps)
        stride = self.num_train_timesteps // num_inference_steps
        visited = np.concatenate([timesteps[:2], timesteps[1:]])  # a single step has no second timestep
        # As in diffusers, the second call makes the first one's step again wherever the schedule begins. The whole schedule visits
        # its second timestep twice for that; one that begins after them does not, and skips a timestep after the second call.
        visited = visited[check_start(start, len(visited)) :]
        repeated = np.arange(len(visited)) == REPEATED_CALL
        # as in diffusers a step is always train // steps wide, even if the spacing's is another
        before = visited + stride * repeated
        after = before - stride
        table = self.cumulative_alphas().astype(np.float64)
        final = 1.0 if self.set_alpha_to_one else table[0]
        on_sample, on_output = self._transfer(table[before], np.where(after < 0, final, table[np.maximum(after, 0)]))
        means = np.array([*FIRST_WEIGHTS, *[ADAMS_BASHFORTH] * len(visited)])[: len(visited)]
        steps = PNDMSteps(
            visited,
            np.sqrt(table[visited]),
            np.sqrt(1 - table[visited]),
            np.where(repeated, 0, on_sample),
            np.where(repeated, on_sample, 0),
            *(on_output * weight for weight in means.T),
            moves=~repeated,
        )
        return to_float32(steps), 1.0

    def init(self, latents, init_noise_sigma=1.0) -> PNDMState:
        latents = super().init(latents, init_noise_sigma).latents
        start, *outputs = (jnp.zeros_like(latents) for _ in range(4))
        return PNDMState(latents, start, tuple(outputs))

    def update(self, state: PNDMState, model_output, step: PNDMSteps, noise=None) -> PNDMState:
        output = model_output.astype(jnp.float32)
        first, second, third = state.outputs
        latents = step.from_latents * state.latents + step.from_start * state.start
        latents += step.from_output * output + step.from_output_1 * first
        latents += step.from_output_2 * second + step.from_output_3 * third
        moved = jax.tree.map(
            lambda new, old: jnp.where(step.moves > 0, new, old), (output, first, second), state.outputs
        )
        return PNDMState(latents, state.latents, moved)

    def _transfer(self, squares: common.PerStep, next_squares: common.PerStep) -> tuple[common.PerStep, common.PerStep]:
        """(a, b) such that a * latents + b * model_output are the latents at the next alpha^2 (equation 11, which is DDIM's)."""
        alpha, sigma = np.sqrt(squares), np.sqrt(1 - squares)
        image = common.image_weights(self.prediction_type, alpha, sigma)
        noise = common.noise_weights(self.prediction_type, alpha, sigma)
        next_alpha, next_sigma = np.sqrt(next_squares), np.sqrt(1 - next_squares)
        return tuple(next_alpha * i + next_sigma * n for i, n in zip(image, noise, strict=True))
