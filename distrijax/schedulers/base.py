"""What schedulers share: options read from scheduler_config.json, and the methods that the denoising loop calls.

    steps, init_noise_sigma = scheduler.schedule(20)          on the host, numpy
    state = scheduler.init(noise, init_noise_sigma)
    scan over steps:  model_output = model(scheduler.scale_input(state.latents, step), step.timestep)
                      state = scheduler.update(state, model_output, step, noise)
    state.latents

A call can begin with an image, at any step of the schedule:

    steps, _ = scheduler.schedule(20, start=10)
    state = scheduler.init(scheduler.add_noise(image, noise, first step))

A scheduler is frozen and hashable, so it can be a static argument of `jax.jit`. Whatever differs between steps is a number in
`steps`. No method depends on the index of a step, so one compiled body serves all steps and all numbers of steps.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from distrijax.errors import InvalidArgument
from distrijax.json_config import ModelConfig, freeze
from distrijax.schedulers import common
from distrijax.validate import choose, flag, positive

OTHER_CLASSES_OPTIONS = frozenset(
    "algorithm_type clip_sample clip_sample_range disable_corrector dynamic_thresholding_ratio euler_at_final "
    "final_sigmas_type flow_shift interpolation_type lambda_min_clipped lower_order_final original_inference_steps "
    "predict_x0 rescale_betas_zero_snr sample_max_value set_alpha_to_one shift_terminal sigma_max sigma_min "
    "skip_prk_steps solver_order solver_p solver_type thresholding time_shift_type timestep_scaling timestep_type "
    "use_beta_sigmas use_dynamic_shifting use_exponential_sigmas use_flow_sigmas use_karras_sigmas use_lu_lambdas "
    "variance_type".split()
)
"""Options that only some of diffusers' schedulers have. A config may contain those of other classes (SDXL's does), so that
the class can be changed. In a class that does not have them they have no effect, in diffusers and here."""

Steps = TypeVar("Steps", bound=tuple)

Column = Float[Array | np.ndarray, "*steps"]
"""A constant of each step, float32: `[steps]` in a schedule, a scalar in the slice that one step gets."""


class State(NamedTuple):
    """What one step hands to the next.

    Attributes:
        latents: The latents, `[b, h, w, c]`, float32.
    """

    latents: Float[Array, "b h w c"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheduler(ModelConfig, abc.ABC):
    """A scheduler, with the options that all of them have. Names, defaults and meanings are those of diffusers.

    Attributes:
        diffusers_name: The class in diffusers.
        needs_noise: Whether every step takes fresh noise.
        ignored: Options of this class that have no effect in a subclass.
        num_train_timesteps: Training timesteps.
        beta_start: The first of the variances added at the training timesteps.
        beta_end: The last of them.
        beta_schedule: How they grow.
        trained_betas: The variances themselves, instead of the three options before.
        prediction_type: What the model predicts.
        timestep_spacing: Which training timesteps are visited.
        steps_offset: What is added to the timesteps of `leading` spacing.

    Raises:
        InvalidArgument: A value is not supported.
    """

    diffusers_name: ClassVar[str]
    needs_noise: ClassVar[bool] = False
    ignored: ClassVar[frozenset[str]] = frozenset()

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: common.BetaSchedule = common.BetaSchedule.LINEAR
    trained_betas: tuple[float, ...] | None = None
    prediction_type: common.Prediction = common.Prediction.EPSILON
    timestep_spacing: common.Spacing = common.Spacing.LINSPACE
    steps_offset: int = 0
    _source: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), repr=False, compare=False)

    def __post_init__(self):
        self._choose(common.BetaSchedule, "beta_schedule")
        self._choose(common.Prediction, "prediction_type")
        self._choose(common.Spacing, "timestep_spacing")
        positive(self.num_train_timesteps, "num_train_timesteps", least=2)
        positive(self.steps_offset, "steps_offset", least=0)
        for name in ("beta_start", "beta_end"):
            self._between_zero_and_one(getattr(self, name), name)
        if self.trained_betas is not None:
            self._check_trained_betas()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Scheduler:
        """Creates the scheduler from the content of a scheduler_config.json, whatever class that names.

        Keys with a leading underscore are ignored, and so are `OTHER_CLASSES_OPTIONS` that this class does not have.

        Args:
            config: Key to JSON value.

        Raises:
            CheckpointError: A value would change the result and is not supported.
        """
        handled = cls.options()
        used = {key: value for key, value in config.items() if key in handled or key not in OTHER_CLASSES_OPTIONS}
        source = tuple((key, freeze(value)) for key, value in config.items() if not key.startswith("_"))
        return dataclasses.replace(cls.from_dict(used), _source=source)

    @classmethod
    def options(cls) -> set[str]:
        """The names of all options of the class, including those with a single supported value."""
        return {field.name for field in dataclasses.fields(cls) if not field.name.startswith("_")} | cls.FIXED.keys()

    def to_config(self) -> dict[str, Any]:
        """The config that it was read from, including other classes' options, and every option that is not at its default."""
        config = dict(self._source)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not field.name.startswith("_") and (field.name in config or value != field.default):
                config[field.name] = value
        return config

    @abc.abstractmethod
    def schedule(self, num_inference_steps: int, start: int = 0) -> tuple[Steps, float]:
        """Computes the constants of the steps from `start` on.

        Args:
            num_inference_steps: How many steps the whole schedule has.
            start: The index of the first step to make, counted in calls of the model. Methods that keep a history begin it
                there. It equals `set_begin_index(start)` of diffusers' scheduler, or a loop over its `timesteps[start:]` where
                that method is missing.

        Returns:
            A NamedTuple of float32 numpy arrays to scan over, with an entry for each call of the model: in the whole schedule
            as many as steps, or more if the method needs them (PNDM). Its `timestep` is the model's argument, and
            `image_scale` and `noise_scale` are for `add_noise`. And the standard deviation of the noise that a call without an
            image begins with, whatever `start` is.

        Raises:
            InvalidArgument: The scheduler cannot make so many steps, or has no step `start`.
        """

    def init(
        self,
        latents: Float[Array, "b h w c"],
        init_noise_sigma: float | np.floating | Float[Array, ""] = 1.0,
    ) -> State:
        """The state before the first step, without any history.

        Args:
            latents: What the call begins with, [b, h, w, c]: standard normal noise, or latents from `add_noise`.
            init_noise_sigma: With noise alone, the standard deviation of the first latents.
        """
        return State(jnp.asarray(latents, jnp.float32) * init_noise_sigma)

    def add_noise(
        self, image: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], step: Steps
    ) -> Float[Array, "b h w c"]:
        """The latents at the beginning of a step if the final image is `image`, float32. It is pointwise.

        Args:
            image: Latents without noise, [b, h, w, c].
            noise: Standard normal noise, [b, h, w, c].
            step: The step's constants.
        """
        return step.image_scale * jnp.asarray(image, jnp.float32) + step.noise_scale * jnp.asarray(noise, jnp.float32)

    def scale_input(self, latents: Float[Array, "b h w c"], step: Steps) -> Float[Array, "b h w c"]:
        """The latents as the model takes them, float32.

        Args:
            latents: The latents, [b, h, w, c].
            step: The step's constants.
        """
        return latents

    @abc.abstractmethod
    def update(
        self,
        state: State,
        model_output: Float[Array, "b h w c"],
        step: Steps,
        noise: Float[Array, "b h w c"] | None = None,
    ) -> State:
        """Makes one step. It is pointwise, so that it can run on any part of the latents.

        Args:
            state: The state before the step.
            model_output: The model's prediction, of any floating dtype.
            step: The constants of this step: a slice of what `schedule` returned.
            noise: Standard normal noise of this step if `needs_noise`, otherwise None.

        Returns:
            The state after the step, float32.
        """

    def betas(self) -> common.TrainTable:
        """The variance added at each training timestep, float32."""
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, np.float32)
        return common.betas(self.beta_schedule, self.beta_start, self.beta_end, self.num_train_timesteps)

    def cumulative_alphas(self) -> common.TrainTable:
        """alpha^2 at each training timestep, float32 (diffusers' `alphas_cumprod`)."""
        return common.cumulative_alphas(self.betas(), rescale_zero_snr=False)

    def spaced_timesteps(self, num_inference_steps: int, *, omit_zero: bool = False) -> common.PerStep:
        """The timesteps to visit, descending.

        Args:
            num_inference_steps: Number of steps.
            omit_zero: As in `common.spaced_timesteps`.

        Raises:
            InvalidArgument: For less than 1 step, and for more steps than training timesteps.
        """
        positive(num_inference_steps, "num_inference_steps")
        # without timestep 0, `leading` needs one timestep more than there are steps
        leading = self.timestep_spacing == common.Spacing.LEADING
        most = self.num_train_timesteps - (1 if omit_zero and leading else 0)
        if num_inference_steps > most:
            raise InvalidArgument(
                f"num_inference_steps is {num_inference_steps} and the model was trained on {self.num_train_timesteps} "
                f"timesteps; with timestep_spacing {self.timestep_spacing.value!r} use at most {most}"
            )
        return common.spaced_timesteps(
            self.timestep_spacing, self.num_train_timesteps, num_inference_steps, self.steps_offset, omit_zero=omit_zero
        )

    def whole_timesteps(self, num_inference_steps: int) -> np.ndarray:
        """`spaced_timesteps` as whole numbers.

        Args:
            num_inference_steps: Number of steps.

        Raises:
            InvalidArgument: As `spaced_timesteps`, and if timesteps reach beyond the training timesteps.
        """
        timesteps = np.round(self.spaced_timesteps(num_inference_steps)).astype(int)
        last = self.num_train_timesteps - 1
        if timesteps[0] > last:
            raise InvalidArgument(
                f"{len(timesteps)} steps with steps_offset {self.steps_offset} reach timestep {timesteps[0]} and the "
                f"model's last is {last}; use fewer steps or a smaller steps_offset"
            )
        return timesteps

    def _choose(self, kind, name: str) -> None:
        """Replaces an option's value by the member of `kind`."""
        object.__setattr__(self, name, choose(kind, getattr(self, name), name))

    def _flag(self, *names: str) -> None:
        """Checks options that are true or false; null is false."""
        for name in names:
            value = getattr(self, name)
            object.__setattr__(self, name, value is not None and flag(value, name))

    def _positive_number(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, float | int) or not 0 < value < float("inf"):
            raise InvalidArgument(f"{name} is {value!r}; give a number above 0")

    def _between_zero_and_one(self, value: Any, name: str) -> None:
        if isinstance(value, bool) or not isinstance(value, float | int) or not 0 < value < 1:
            raise InvalidArgument(f"{name} is {value!r}; give a number between 0 and 1")

    def _check_trained_betas(self) -> None:
        object.__setattr__(self, "trained_betas", freeze(self.trained_betas))
        if not isinstance(self.trained_betas, tuple) or len(self.trained_betas) != self.num_train_timesteps:
            raise InvalidArgument(
                f"trained_betas is {self.trained_betas!r:.60}; give null or a list of {self.num_train_timesteps} "
                "numbers, one for each training timestep"
            )
        for value in self.trained_betas:
            self._between_zero_and_one(value, "an entry of trained_betas")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroSNRScheduler(Scheduler):
    """A scheduler that can start from pure noise, with a signal-to-noise ratio of zero.

    Attributes:
        rescale_betas_zero_snr: Whether the last training timestep is made pure noise.

    References:
        arXiv 2305.08891, algorithm 1.
    """

    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._flag("rescale_betas_zero_snr")

    def cumulative_alphas(self) -> common.TrainTable:
        return common.cumulative_alphas(self.betas(), rescale_zero_snr=self.rescale_betas_zero_snr)

    def check_image_left(self, first: int, cumulative_alphas: np.ndarray, instead: str) -> None:
        """Checks that the first timestep determines an image, given latents and the predicted noise.

        Args:
            first: The first timestep.
            cumulative_alphas: alpha^2 at each training timestep.
            instead: What the error suggests to use.

        Raises:
            InvalidArgument: The latents at the first timestep are pure noise, and the model predicts just that.
        """
        if cumulative_alphas[first] == 0 and self.prediction_type == common.Prediction.EPSILON:
            raise InvalidArgument(
                f"prediction_type is 'epsilon' and rescale_betas_zero_snr leaves no image in the latents at timestep "
                f"{first}, so {type(self).__name__} cannot find it; use {instead}, or a model with 'v_prediction'"
            )


def check_start(start: int, calls: int) -> int:
    """Checks the index of the first step to make, and returns it as an int.

    Args:
        start: The index.
        calls: How many calls of the model the whole schedule has.

    Raises:
        InvalidArgument: The schedule has no such step.
    """
    start = positive(start, "start", least=0)
    if start >= calls:
        raise InvalidArgument(f"start is {start} and the schedule has {calls} steps; give at most {calls - 1}")
    return start


def to_float32(steps: Steps) -> Steps:
    """The constants of all steps as contiguous float32 arrays, as the device receives them.

    Args:
        steps: Computed in float64.
    """
    return jax.tree.map(lambda column: np.ascontiguousarray(column, np.float32), steps)
