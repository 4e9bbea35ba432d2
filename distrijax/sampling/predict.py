"""What a step predicts with. A predictor asks the modules of the program, and may put their parts together in its own way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from distrijax.config import SplitScheme
from distrijax.models.resize import resize
from distrijax.models.unet import Times
from distrijax.parallel.bands import Bands
from distrijax.parallel.collectives import KeysValues, map_columns
from distrijax.parallel.exchange import Exchange, WholeImage
from distrijax.parallel.layout import Layout
from distrijax.weights.models import UNET


class Predictor(Protocol):
    """What the UNet, and other models beside it, make of a band of rows. Hashable, for it is static."""

    def __call__(
        self,
        modules: Mapping[str, nnx.Module],
        sample: Float[Array, "b h w c"],
        times: Mapping[str, Times],
        context: Mapping[str, dict[str, KeysValues]],
        exchange: Exchange,
        number: Int32[Array, ""],
    ) -> Float[Array, "b h w o"]:
        """The prediction, in the dtype of `sample`.

        Args:
            modules: The models of the program, by name.
            sample: The band's latents, scaled as the scheduler says; the branches of guidance one after another.
            times: `UNet.times` of each model at this step.
            context: `Conditioning.context` of each model.
            exchange: Answers for the rest of the image.
            number: The number of the step (`StepInputs.number`).
        """


@dataclasses.dataclass(frozen=True)
class PredictNoise:
    """The UNet on the whole image."""

    def __call__(self, modules, sample, times, context, exchange, number):
        return modules[UNET].predict(sample, times[UNET], context[UNET], exchange)


PREDICT_NOISE = PredictNoise()


@dataclasses.dataclass(frozen=True)
class ShrinkDeep:
    """The outermost layers at the latents' size, and the UNet's deep part at a smaller one.

    A model then sees objects in the size that it was trained for. The map is resized after `conv_in`, and brought back before
    the last layer, where `conv_in`'s own skip joins: Kohya's "deep shrink", at the outermost place.

    Attributes:
        latent: Rows and columns of the latents.
        size: Rows and columns of the small map.
        bands: How the latents' rows are divided.
        small: How the small map's rows are divided.
    """

    latent: tuple[int, int]
    size: tuple[int, int]
    bands: Bands
    small: Bands

    def __call__(self, modules, sample, times, context, exchange, number):
        unet, told, inner = modules[UNET], (times[UNET], context[UNET]), exchange.at(self.small)
        (rows, columns), (small_rows, small_columns) = self.latent, self.size
        outer = unet.enter(sample, *told, exchange)
        x = resize(outer[0], exchange, "shrink", (rows, small_rows), small_columns, self.small)
        skips = unet.encode([x], *told, inner)
        x = unet.decode(unet.middle(skips[-1], *told, inner), skips[1:], *told, inner)
        x = resize(x, inner, "enlarge", (small_rows, rows), columns, self.bands)
        return unet.leave(x, outer, *told, exchange)


@dataclasses.dataclass(frozen=True)
class IndependentPatches:
    """naive_patch: the UNet on every band as if it were an image of its own.

    Attributes:
        layout: The layout of the latents.
    """

    layout: Layout

    def __call__(self, modules, sample, times, context, exchange, number):
        def on_rows(sample):
            return modules[UNET].predict(sample, times[UNET], context[UNET], WholeImage())

        def across(sample):
            return map_columns(on_rows, sample, self.layout.rows)

        match self.layout.split_scheme:
            case SplitScheme.ROW:
                return on_rows(sample)
            case SplitScheme.COLUMN:
                return across(sample)
            case SplitScheme.ALTERNATE:
                return lax.cond(number % 2 == 1, on_rows, across, sample)
