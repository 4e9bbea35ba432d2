"""Noise tables of a diffusion process, on the host: betas, timesteps, sigmas.

Latents are alpha * image + sigma * noise with alpha^2 + sigma^2 = 1. Divided by alpha they are image + (sigma / alpha) * noise.
diffusers calls this quotient sigma, too, and so do "sigmas" and "noise levels" here.

Tables over all training timesteps are float32 where diffusers has float32 tensors (betas, cumulative products, sigmas). What is
derived from them for a step is float64 until it goes to the device.
"""

from __future__ import annotations

import enum

import numpy as np
from jaxtyping import Float

TrainTable = Float[np.ndarray, "train_timesteps"]
"""A number for each training timestep."""

PerStep = Float[np.ndarray, "steps"]
"""A number for each step."""

Boundaries = Float[np.ndarray, "boundaries"]
"""A number before each step, and one after the last."""


class BetaSchedule(enum.StrEnum):
    """How the variance added at each training timestep grows."""

    LINEAR = "linear"
    SCALED_LINEAR = "scaled_linear"
    SQUAREDCOS_CAP_V2 = "squaredcos_cap_v2"


class Prediction(enum.StrEnum):
    """What the model predicts: the noise, the velocity alpha * noise - sigma * image, or the image."""

    EPSILON = "epsilon"
    V_PREDICTION = "v_prediction"
    SAMPLE = "sample"


class Spacing(enum.StrEnum):
    """Which training timesteps are visited (table 2 of arXiv 2305.08891)."""

    LEADING = "leading"
    TRAILING = "trailing"
    LINSPACE = "linspace"


class FinalSigma(enum.StrEnum):
    """The noise level after the last step: zero, or that of the first training timestep."""

    ZERO = "zero"
    SIGMA_MIN = "sigma_min"


def betas(schedule: BetaSchedule, start: float, end: float, count: int) -> TrainTable:
    """The variance added at each training timestep, float32.

    Args:
        schedule: How they grow.
        start: The first one.
        end: The last one; `squaredcos_cap_v2` uses neither.
        count: Number of training timesteps.
    """
    match schedule:
        case BetaSchedule.LINEAR:
            return np.linspace(start, end, count, dtype=np.float32)
        case BetaSchedule.SCALED_LINEAR:
            return np.linspace(start**0.5, end**0.5, count, dtype=np.float32) ** 2
        case BetaSchedule.SQUAREDCOS_CAP_V2:
            remaining = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.minimum(1 - remaining[1:] / remaining[:-1], 0.999).astype(np.float32)


def cumulative_alphas(betas: TrainTable, *, rescale_zero_snr: bool) -> TrainTable:
    """alpha^2 at each training timestep, float32; with `rescale_zero_snr` the last one is exactly 0.

    The rescaling shifts alpha to end at 0 and stretches it to begin where it did. Differences of nearly equal numbers are taken
    in float32 and in diffusers' order, which converts the result to betas and back: at the first timesteps 1 - alpha^2 is so
    small that one more rounding would show in sigma.

    Args:
        betas: As from `betas`.
        rescale_zero_snr: Whether the last timestep has no signal.

    References:
        arXiv 2305.08891, algorithm 1.
    """
    alphas_squared = 1 - betas  # of each timestep, not cumulative
    if rescale_zero_snr:
        alphas = np.sqrt(_cumulative_product(alphas_squared))
        squares = ((alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))) ** 2
        alphas_squared = 1 - (1 - np.concatenate([squares[:1], squares[1:] / squares[:-1]]))
    return _cumulative_product(alphas_squared)


def _cumulative_product(factors: TrainTable) -> TrainTable:
    """The cumulative product as torch.cumprod computes it: accumulated in float64, stored as float32."""
    return np.cumprod(factors.astype(np.float64)).astype(np.float32)


def sigma_table(cumulative_alphas: TrainTable) -> TrainTable:
    """sigma / alpha at each training timestep, float32. With zero SNR it is 4096 instead of infinity, as in diffusers.

    Args:
        cumulative_alphas: alpha^2 at each training timestep.
    """
    squares = np.where(cumulative_alphas == 0, np.float32(2**-24), cumulative_alphas)
    return np.sqrt((1 - squares) / squares)


def spaced_timesteps(spacing: Spacing, train: int, steps: int, offset: int, *, omit_zero: bool = False) -> PerStep:
    """Timesteps in descending order, float64. Only those of `linspace` can have a fraction.

    Args:
        spacing: How they are spaced.
        train: How many training timesteps there are.
        steps: How many to choose.
        offset: What is added to every timestep of `leading`.
        omit_zero: Whether `leading` and `linspace` are spaced for one step more, and the last one, timestep 0, is dropped. The
            DPM-Solver schedulers do so, because one step leads from the timestep before to the end.
    """
    points = steps + 1 if omit_zero else steps
    match spacing:
        case Spacing.LINSPACE:
            timesteps = np.linspace(0, train - 1, points)[::-1]
        case Spacing.LEADING:
            timesteps = np.arange(points, dtype=np.float64)[::-1] * (train // points) + offset
        case Spacing.TRAILING:
            # for some counts, such as 61 of 1000, rounding makes arange one longer, and diffusers then makes a step at -1
            timesteps = np.arange(train, 0, -train / steps).round() - 1
    return timesteps[:steps]


def karras_sigmas(largest: float, smallest: float, steps: int) -> PerStep:
    """Noise levels that are evenly spaced in sigma^(1/7), descending, float64.

    Args:
        largest: The first one.
        smallest: The last one.
        steps: Number of levels.

    References:
        arXiv 2206.00364, equation 5.
    """
    rho = 7.0
    return np.linspace(largest ** (1 / rho), smallest ** (1 / rho), steps) ** rho


def sigmas_to_timesteps(sigmas: PerStep, table: TrainTable) -> PerStep:
    """The training timesteps, with fractions, of these noise levels, by linear interpolation of log sigma.

    Args:
        sigmas: Noise levels.
        table: sigma / alpha at each training timestep.
    """
    # not np.interp, because differences of the table are float32 in diffusers: DPM-Solver rounds or truncates the result,
    # so the last digit can decide between two timesteps
    known, wanted = np.log(table), np.log(sigmas)
    low = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, len(table) - 2)
    weight = np.clip((known[low] - wanted) / (known[low] - known[low + 1]), 0, 1)
    return (1 - weight) * low + weight * (low + 1)


def with_final(sigmas: PerStep, final: FinalSigma, table: TrainTable) -> Boundaries:
    """The noise levels before each step and after the last. Rounded to float32 as in diffusers, stored as float64.

    Args:
        sigmas: The noise level before each step.
        final: The one after the last step.
        table: sigma / alpha at each training timestep.
    """
    last = 0.0 if final == FinalSigma.ZERO else table[0]
    return np.append(sigmas, last).astype(np.float32).astype(np.float64)


def image_weights(prediction: Prediction, alpha: PerStep, sigma: PerStep) -> tuple[PerStep, PerStep]:
    """(a, b) such that a * latents + b * model_output is the image, for latents alpha * image + sigma * noise.

    Args:
        prediction: What the model's output is.
        alpha: The image's factor in the latents.
        sigma: The noise's factor in the latents.
    """
    match prediction:
        case Prediction.EPSILON:
            return 1 / alpha, -sigma / alpha
        case Prediction.V_PREDICTION:
            return alpha, -sigma
        case Prediction.SAMPLE:
            return np.zeros_like(alpha), np.ones_like(sigma)


def noise_weights(prediction: Prediction, alpha: PerStep, sigma: PerStep) -> tuple[PerStep, PerStep]:
    """(a, b) such that a * latents + b * model_output is the noise, for latents alpha * image + sigma * noise.

    Args:
        prediction: What the model's output is.
        alpha: The image's factor in the latents.
        sigma: The noise's factor in the latents.
    """
    on_latents, on_output = image_weights(prediction, alpha, sigma)
    return (1 - alpha * on_latents) / sigma, -alpha * on_output / sigma
