"""The denoising loop: noise, guidance, warm-up, scan, and the one shard_map around them.

    warm-up     step ... step -> latents, stale     every exchange fresh; the last of these steps keeps what it published
    displaced   step ... step -> latents            every exchange of the previous step's values
    stateless   step ... step -> latents            steps that keep nothing: full_sync, tensor and naive_patch

The first two run as one compiled program (`whole`), or in chunks with the host between them (`warm_up`, `displaced`): the
same functions, so the same numbers. `Layout` says which mesh axes cut the rows and which the guidance branches, and
`loop_of` which steps a configuration asks for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32, Key, UInt32

from distrijax.config import DistriConfig, Parallelism, SplitScheme
from distrijax.exchange import (
    Exchange,
    KeysValues,
    PartOfChannels,
    Stale,
    Strategy,
    Synchronous,
    WholeImage,
    branch_sum,
    first_row,
    for_each_branch,
    on_columns,
    own_branches,
    strategy_of,
)
from distrijax.mesh import CFG, DATA, PATCH, Bands
from distrijax.placement import Form
from distrijax.programs import Params
from distrijax.schedulers import Scheduler
from distrijax.unet import Conditioning, Times, UNet, UNetConfig

ALL_BRANCHES = P(None, DATA)
"""Guidance branches, images: what describes the prompt to all devices of an image."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a call lies on the mesh. With guidance `cfg` holds its branches; without, it cuts the rows further.

    latent: rows and columns of the whole image's latent. levels: of the UNet, each of half the size. split_scheme: of
    naive_patch. Tensor parallelism cuts weights, for the `patch` axis alone, and leaves the latents whole.
    """

    mesh: Mesh | AbstractMesh  # without devices where a program is only traced
    guided: bool
    latent: tuple[int, int]
    levels: int = 1
    parallelism: Parallelism = Parallelism.PATCH
    split_scheme: SplitScheme = SplitScheme.ALTERNATE

    @property
    def rows(self) -> tuple[str, ...]:
        """The axes along which the rows are cut."""
        if self.parallelism is Parallelism.TENSOR:
            return ()
        return (PATCH,) if self.guided else (PATCH, CFG)

    @property
    def patches(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.rows)

    @property
    def bands(self) -> Bands:
        return Bands.among(self.latent[0], self.patches, levels=self.levels)

    @property
    def canvas(self) -> tuple[int, int]:
        """Rows and columns of the latents with their padding; naive_patch paints that, too, and its bands may be of columns."""
        columns = self.latent[1]
        if self.parallelism is Parallelism.NAIVE_PATCH and self.split_scheme is not SplitScheme.ROW:
            columns = self.patches * Bands.among(columns, self.patches, levels=self.levels).band
        return self.patches * self.bands.band, columns

    @property
    def latents(self) -> P:
        """Images, rows."""
        return P(DATA, self.rows)

    @property
    def branches(self) -> P:
        """Guidance branches, images."""
        return P(CFG if self.guided else None, DATA)

    @property
    def conditioning(self) -> Conditioning:
        """As `branches`; of keys and values every device has those of its heads."""
        heads = PATCH if self.parallelism is Parallelism.TENSOR else None
        return Conditioning(P(*self.branches, None, heads), self.branches, self.branches)

    @property
    def stale(self) -> P:
        """Every leaf: images of all branches, then the axis that concatenates the patches."""
        return P((DATA, CFG) if self.guided else DATA, self.rows)

    def sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def exact(self) -> Exchange:
        """An exchange of fresh values."""
        return PartOfChannels() if self.parallelism is Parallelism.TENSOR else Synchronous(self.rows, self.bands)


@dataclasses.dataclass(frozen=True)
class Loop:
    """What the compiled programs of a call depend on besides shapes; a static argument of jit."""

    layout: Layout
    unet: Form  # whose parameters are the `params` of the programs
    scheduler: Scheduler
    dtype: Any
    strategy: Strategy | None  # what follows the warm-up; None where all steps are stateless


def layout_of(
    config: DistriConfig, mesh: Mesh | AbstractMesh, unet: UNetConfig, *, guided: bool, latent: tuple[int, int]
) -> Layout:
    """How a call of this configuration lies on the mesh. guided: whether the guidance scale is above 1."""
    guided, levels = guided and unet.branches == 2, len(unet.block_out_channels)
    return Layout(mesh, guided, latent, levels, config.parallelism, config.split_scheme)


def loop_of(
    config: DistriConfig,
    layout: Layout,
    unet: Form,
    scheduler: Scheduler,
    dtype: Any,
    steps: int | None = None,
) -> Loop:
    """The loop of a call of this configuration: the one place that chooses which steps it has.

    steps: how many; None is enough of them for some to be displaced. Where none is, nothing is kept for the next.
    """
    displaced = layout.parallelism is Parallelism.PATCH and (steps is None or not all(config.synchronous(steps)))
    strategy = strategy_of(config, layout.patches) if displaced else None
    return Loop(layout, unet, scheduler, dtype, strategy)


class Inputs(NamedTuple):
    """What is constant over the steps of a call and may change from call to call.

    conditioning: leaves [branches, images, ...]; the unconditional branch first.
    weights: [branches, 2]; guidance as a weighted sum of the branches, and the text branch alone.
    rescale: guidance_rescale, or None to leave it out.
    keys: [images], from which all noise of an image is drawn.
    """

    conditioning: Conditioning
    weights: Float[Array, "branches 2"]
    rescale: Float[Array, ""] | None
    keys: Key[Array, "images"]


class Steps(NamedTuple):
    """The constants of all steps, or of one.

    scheduler: its own. number: of the step, from 1, and so of its noise. pace: how far the next timestep is, over how far
    the previous one was.
    """

    scheduler: Any
    number: Int32[Array | np.ndarray, "*steps"]
    pace: Float[Array | np.ndarray, "*steps"]

    @classmethod
    def of(cls, scheduler: Any) -> Steps:
        """All steps of a schedule, on the host. The pace is 1 where a timestep repeats itself, and at both ends."""
        strides = np.diff(np.asarray(scheduler.timestep, np.float64))
        pace = np.ones(len(strides) + 1, np.float32)
        moving = (strides[1:] != 0) & (strides[:-1] != 0)
        pace[1:-1][moving] = strides[1:][moving] / strides[:-1][moving]
        return cls(scheduler, np.arange(1, len(pace) + 1, dtype=np.int32), pace)


def guidance_weights(scale: float, *, guided: bool) -> list[list[float]]:
    """`Inputs.weights`: uncond + scale * (text - uncond), as weights of the two branches (arXiv 2207.12598)."""
    return [[1.0 - scale, 0.0], [scale, 1.0]] if guided else [[1.0, 1.0]]


def image_keys(seeds: UInt32[Array, "b 3"]) -> Key[Array, "b"]:
    """Random keys from the low and the high half of a seed (`jax.random.key` alone reads the low one), and one of its streams.

    Threefry's whatever JAX is configured to use: of many keys at once, its other generators heed the first alone.
    """

    def image_key(low, high, stream):
        key = jax.random.key(low, impl="threefry2x32")
        return jax.random.fold_in(jnp.where(high > 0, jax.random.fold_in(key, high), key), stream)

    return jax.vmap(image_key)(*seeds.T)


def band_noise(
    keys: Key[Array, "b"], number: Array | int, first: Array | int, shape: tuple[int, int, int]
) -> Float[Array, "b h w c"]:
    """Normal noise of some rows of images; each row has its own key, so the cut into bands changes no value.

    number: which noise of the image (0 is the starting one). first: global index of the first row. shape: [h, w, c].
    """
    rows, width, channels = shape

    def row(key, index):
        return jax.random.normal(jax.random.fold_in(key, index), (width, channels), jnp.float32)

    def image(key):
        return jax.vmap(lambda index: row(jax.random.fold_in(key, number), index))(first + jnp.arange(rows))

    return jax.vmap(image)(keys)


def draw_latents(layout: Layout, channels: int, keys: Key[Array, "images"]) -> Float[Array, "b h w c"]:
    """The starting noise of the whole canvas, drawn band by band on the devices."""
    rows, columns = layout.bands.band, layout.canvas[1]

    def band(keys):
        return band_noise(keys, 0, first_row(rows, layout.rows), (rows, columns, channels))

    return jax.shard_map(band, mesh=layout.mesh, in_specs=P(DATA), out_specs=layout.latents)(keys)


def condition(
    static: tuple[Layout, Form],
    params: Params,
    encoder_hidden_states: Float[Array, "branches images t e"],
    text_embeds: Float[Array, "branches images p"] | None,
    time_ids: Float[Array, "branches images i"] | None,
    guidance_scale: Float[Array, "branches images"] | None,
) -> Conditioning:
    """`UNet.condition` for all branches and images, each on the devices that will use it. static: the UNet is its second.

    The devices of an image make it together: each its part of the channels of keys and values, of all branches.
    """
    layout, unet = static

    def local(params, arguments):
        lead = arguments[0].shape[:2]
        result = unet.module(params).condition(*_merged(arguments), exchange=layout.exact())
        result = jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), result)
        return jax.tree.map(own_branches, result) if layout.guided else result

    specs = (unet.specs, ALL_BRANCHES)
    mapped = jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=layout.conditioning)
    return mapped(params, (encoder_hidden_states, text_embeds, time_ids, guidance_scale))


def warm_up(loop: Loop, params: Params, inputs: Inputs, state: Any, xs: Steps) -> tuple[Any, Stale]:
    """Synchronous steps; the last one keeps what it published."""

    def local(params, inputs, state, xs):
        return _warm_up(loop, params, inputs, state, xs)

    return _on_mesh(loop, local, out=(loop.layout.latents, loop.layout.stale))(params, inputs, state, xs)


def stateless(loop: Loop, params: Params, inputs: Inputs, state: Any, xs: Steps) -> Any:
    """Steps that keep nothing for the next one."""

    def local(params, inputs, state, xs):
        return _keep_nothing(loop, params, inputs, state, _constants(loop, params, inputs, xs))

    return _on_mesh(loop, local, out=loop.layout.latents)(params, inputs, state, xs)


def displaced(loop: Loop, params: Params, inputs: Inputs, state: Any, stale: Stale, xs: Steps) -> tuple[Any, Stale]:
    """Displaced steps from the stale state of the step before."""

    def local(params, inputs, state, stale, xs):
        return _scan_displaced(loop, params, inputs, state, stale, xs)

    specs = (loop.layout.latents, loop.layout.stale)
    return _on_mesh(loop, local, stale=True, out=specs)(params, inputs, state, stale, xs)


def whole(loop: Loop, params: Params, inputs: Inputs, state: Any, warm_xs: Steps, xs: Steps) -> Any:
    """Warm-up and displaced steps in one program."""

    def local(params, inputs, state, all_xs):
        state, stale = _warm_up(loop, params, inputs, state, all_xs[0])
        return _scan_displaced(loop, params, inputs, state, stale, all_xs[1])[0]

    return _on_mesh(loop, local, out=loop.layout.latents)(params, inputs, state, (warm_xs, xs))


def specs_of(loop: Loop, *, stale: bool) -> tuple:
    """How the arguments of a program after `loop` lie on the mesh. stale: whether it takes a stale state."""
    layout = loop.layout
    inputs = Inputs(layout.conditioning, P(CFG) if layout.guided else P(), P(), P(DATA))
    return (loop.unet.specs, inputs, layout.latents, *((layout.stale,) if stale else ()), P())


def _on_mesh(loop: Loop, local, *, out: Any, stale: bool = False):
    return jax.shard_map(local, mesh=loop.layout.mesh, in_specs=specs_of(loop, stale=stale), out_specs=out)


def _warm_up(loop: Loop, params: Params, inputs: Inputs, state: Any, xs: Steps) -> tuple[Any, Stale]:
    """All but the last step keep nothing; so the last one creates the stale state, and no empty one is ever needed."""
    constants = _constants(loop, params, inputs, xs)
    state = _keep_nothing(loop, params, inputs, state, jax.tree.map(lambda a: a[:-1], constants))
    exchange = Synchronous(loop.layout.rows, loop.layout.bands, loop.strategy)
    predict = partial(loop.unet.module(params).predict, exchange=exchange)
    last = jax.tree.map(lambda a: a[-1], constants)
    return _step(loop, predict, inputs, state, *last), exchange.finish()


def _keep_nothing(loop: Loop, params: Params, inputs: Inputs, state: Any, constants: tuple[Steps, Times]) -> Any:
    def body(state, constants):
        x, times = constants
        unet = loop.unet.module(params)
        if loop.layout.parallelism is Parallelism.NAIVE_PATCH:
            predict = partial(_predict_alone, loop.layout, unet, x.number)
        else:
            predict = partial(unet.predict, exchange=loop.layout.exact())
        return _step(loop, predict, inputs, state, x, times), None

    return _scan(body, state, constants)


def _predict_alone(
    layout: Layout, unet: UNet, number: Array, sample: Array, times: Times, context: dict[str, KeysValues]
) -> Array:
    """naive_patch: the UNet on every band as if it were a picture of its own. number: of the step, from 1."""

    def on_rows(sample):
        return unet.predict(sample, times, context, WholeImage())

    def across(sample):
        return on_columns(on_rows, sample, layout.rows)

    match layout.split_scheme:
        case SplitScheme.ROW:
            return on_rows(sample)
        case SplitScheme.COLUMN:
            return across(sample)
        case SplitScheme.ALTERNATE:
            return lax.cond(number % 2 == 1, on_rows, across, sample)


def _scan_displaced(
    loop: Loop, params: Params, inputs: Inputs, state: Any, stale: Stale, xs: Steps
) -> tuple[Any, Stale]:
    def body(carry, constants):
        (state, stale), (x, times) = carry, constants
        exchange = loop.strategy(stale, loop.layout.rows, loop.layout.bands, x.pace)
        predict = partial(loop.unet.module(params).predict, exchange=exchange)
        return (_step(loop, predict, inputs, state, x, times), exchange.finish()), None

    return _scan(body, (state, stale), _constants(loop, params, inputs, xs))


def _constants(loop: Loop, params: Params, inputs: Inputs, xs: Steps) -> tuple[Steps, Times]:
    """`xs` and `UNet.times` of all steps of a program, [steps, branches * images, c] each: its kernels are read once for all."""
    times, conditioning = loop.unet.module(params).times, _merged(inputs.conditioning)
    samples = inputs.weights.shape[0] * inputs.keys.shape[0]

    def of_step(timestep: Float[Array, ""]) -> Times:
        return times(jnp.broadcast_to(timestep, samples), conditioning, loop.dtype)

    return xs, jax.vmap(of_step)(xs.scheduler.timestep)


def _merged(branches_and_images: Any) -> Any:
    """The first two axes of every leaf as one."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), branches_and_images)


def _scan(body, carry, xs):
    """lax.scan without results; a scan of no steps compiles no body."""
    return lax.scan(body, carry, xs)[0] if jax.tree.leaves(xs)[0].shape[0] else carry


def _step(
    loop: Loop,
    predict: Callable[[Array, Times, dict[str, KeysValues]], Array],
    inputs: Inputs,
    state: Any,
    x: Steps,
    times: Times,
) -> Any:
    """One denoising step of one patch.

    predict: the UNet on this patch, of sample, times and context. x, times: the constants of this step.
    """
    step, number = x.scheduler, x.number
    images, *shape = state.latents.shape
    branches = inputs.weights.shape[0]
    sample = loop.scheduler.scale_input(state.latents, step).astype(loop.dtype)
    if loop.layout.guided:
        sample = for_each_branch(sample)
    output = predict(jnp.tile(sample, (branches, 1, 1, 1)), times, _merged(inputs.conditioning.context))
    output = output.astype(jnp.float32).reshape(branches, images, *output.shape[1:])
    noise = None
    if loop.scheduler.needs_noise:
        noise = band_noise(inputs.keys, number, first_row(shape[0], loop.layout.rows), tuple(shape))
    return loop.scheduler.update(state, _guide(loop.layout, inputs, output), step, noise)


def _guide(layout: Layout, inputs: Inputs, output: Float[Array, "k b h w c"]) -> Float[Array, "b h w c"]:
    """Classifier-free guidance; with `rescale`, the text prediction's contrast is restored (arXiv 2305.08891, 3.4)."""
    columns = inputs.weights if inputs.rescale is not None else inputs.weights[:, :1]
    sums = jnp.einsum("kn,kbhwc->nbhwc", columns, output, precision=lax.Precision.HIGHEST)
    if layout.guided:
        sums = branch_sum(sums)
    if inputs.rescale is None:
        return sums[0]
    guided, text = sums
    text_variance, variance = (layout.exact().moments("guidance", x, x.shape[-1])[..., 1] for x in (text, guided))
    ratio = jnp.sqrt(text_variance / variance)[..., None, None]
    return guided * (inputs.rescale * ratio + (1 - inputs.rescale))
