"""Noise tables of a diffusion process, on the host: betas, timesteps, sigmas.

Latents are alpha * image + sigma * noise with alpha^2 + sigma^2 = 1; divided by alpha, image + (sigma / alpha) * noise.
diffusers calls that quotient sigma, too, and so do "sigmas" and "noise levels" here.

The tables over all training timesteps are float32 where diffusers holds float32 tensors (betas, cumulative products,
sigmas). What is derived from them for a step is float64 until it is shipped.
"""

from __future__ import annotations

import enum

import numpy as np
from jaxtyping import Float

Table = Float[np.ndarray, "train_timesteps"]
Levels = Float[np.ndarray, "steps"]
Boundaries = Float[np.ndarray, "boundaries"]


class BetaSchedule(enum.StrEnum):
    """How the variance added at each training timestep grows."""

    LINEAR = "linear"
    SCALED_LINEAR = "scaled_linear"
    SQUAREDCOS_CAP_V2 = "squaredcos_cap_v2"


class Prediction(enum.StrEnum):
    """What the model puts out: the noise, the velocity alpha * noise - sigma * image, or the image."""

    EPSILON = "epsilon"
    V_PREDICTION = "v_prediction"
    SAMPLE = "sample"


class Spacing(enum.StrEnum):
    """Which training timesteps are visited (table 2 of arXiv 2305.08891)."""

    LEADING = "leading"
    TRAILING = "trailing"
    LINSPACE = "linspace"


class FinalSigma(enum.StrEnum):
    """The noise level after the last step: none, or that of the first training timestep."""

    ZERO = "zero"
    SIGMA_MIN = "sigma_min"


def betas(schedule: BetaSchedule, start: float, end: float, count: int) -> Table:
    """The variances added at each of `count` training timesteps, float32."""
    match schedule:
        case BetaSchedule.LINEAR:
            return np.linspace(start, end, count, dtype=np.float32)
        case BetaSchedule.SCALED_LINEAR:
            return np.linspace(start**0.5, end**0.5, count, dtype=np.float32) ** 2
        case BetaSchedule.SQUAREDCOS_CAP_V2:
            remaining = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.minimum(1 - remaining[1:] / remaining[:-1], 0.999).astype(np.float32)


def cumulative_alphas(betas: Table, *, rescale_zero_snr: bool) -> Table:
    """alpha^2 at every training timestep, float32; `rescale_zero_snr` brings the last one to exactly 0.

    The rescaling is algorithm 1 of arXiv 2305.08891: alpha is shifted to end at 0 and stretched to begin where it did.
    Its differences of nearly equal numbers are taken in float32 and in the order of diffusers, which turns the result
    into betas and back: at the first timesteps 1 - alpha^2 is so small that one rounding more would show in sigma.
    """
    alphas_squared = 1 - betas  # each step's own
    if rescale_zero_snr:
        alphas = np.sqrt(_cumulative_product(alphas_squared))
        squares = ((alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))) ** 2
        alphas_squared = 1 - (1 - np.concatenate([squares[:1], squares[1:] / squares[:-1]]))
    return _cumulative_product(alphas_squared)


def _cumulative_product(factors: Table) -> Table:
    """As torch.cumprod does it: accumulated in float64, stored as float32."""
    return np.cumprod(factors.astype(np.float64)).astype(np.float32)


def sigma_table(cumulative_alphas: Table) -> Table:
    """sigma / alpha at every training timestep, float32; where no image is left (zero SNR) 4096 instead of infinity."""
    squares = np.where(cumulative_alphas == 0, np.float32(2**-24), cumulative_alphas)
    return np.sqrt((1 - squares) / squares)


def spaced_timesteps(spacing: Spacing, train: int, steps: int, offset: int, *, omit_zero: bool = False) -> Levels:
    """`steps` of the `train` timesteps in descending order, float64; only those of `linspace` can have a fraction.

    offset: added to every timestep of `leading`.
    omit_zero: lay `leading` and `linspace` out for one step more and leave away the last, which is timestep 0 (as the
        DPM-Solver schedulers do: from there it is no more than a step to the end).
    """
    points = steps + 1 if omit_zero else steps
    match spacing:
        case Spacing.LINSPACE:
            timesteps = np.linspace(0, train - 1, points)[::-1]
        case Spacing.LEADING:
            timesteps = np.arange(points, dtype=np.float64)[::-1] * (train // points) + offset
        case Spacing.TRAILING:
            # for some counts (61 of 1000, say) rounding makes arange one longer, and diffusers then takes a step at -1
            timesteps = np.arange(train, 0, -train / steps).round() - 1
    return timesteps[:steps]


def karras_sigmas(largest: float, smallest: float, steps: int) -> Levels:
    """Noise levels that are evenly spaced in sigma^(1/7) (equation 5 of arXiv 2206.00364), descending, float64."""
    rho = 7.0
    return np.linspace(largest ** (1 / rho), smallest ** (1 / rho), steps) ** rho


def sigmas_to_timesteps(sigmas: Levels, table: Table) -> Levels:
    """The fractional training timesteps at which the table has these noise levels, by interpolation of log sigma."""
    # np.interp would do but for the differences of the table, which are float32 in diffusers: DPM-Solver rounds the
    # result, or cuts its fraction off, so the last digit can decide between two timesteps
    known, wanted = np.log(table), np.log(sigmas)
    low = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, len(table) - 2)
    weight = np.clip((known[low] - wanted) / (known[low] - known[low + 1]), 0, 1)
    return (1 - weight) * low + weight * (low + 1)


def with_final(sigmas: Levels, final: FinalSigma, table: Table) -> Boundaries:
    """The noise levels before each step and after the last; rounded to float32 as in diffusers, held as float64."""
    last = 0.0 if final == FinalSigma.ZERO else table[0]
    return np.append(sigmas, last).astype(np.float32).astype(np.float64)


def image_weights(prediction: Prediction, alpha: Levels, sigma: Levels) -> tuple[Levels, Levels]:
    """(a, b) such that a * latents + b * model_output is the image, for latents alpha * image + sigma * noise."""
    match prediction:
        case Prediction.EPSILON:
            return 1 / alpha, -sigma / alpha
        case Prediction.V_PREDICTION:
            return alpha, -sigma
        case Prediction.SAMPLE:
            return np.zeros_like(alpha), np.ones_like(sigma)


def noise_weights(prediction: Prediction, alpha: Levels, sigma: Levels) -> tuple[Levels, Levels]:
    """(a, b) such that a * latents + b * model_output is the noise, for latents alpha * image + sigma * noise."""
    on_latents, on_output = image_weights(prediction, alpha, sigma)
    return (1 - alpha * on_latents) / sigma, -alpha * on_output / sigma
