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
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32, Key

from distrijax.config import DistriConfig, Parallelism, SplitScheme
from distrijax.models.unet import Conditioning, Times, UNet
from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import VAEConfig
from distrijax.parallel.collectives import KeysValues, branch_sum, first_row, local_branches, map_columns, vary_over_cfg
from distrijax.parallel.displaced import Strategy, strategy_of
from distrijax.parallel.exchange import Stale, Synchronous, WholeImage
from distrijax.parallel.layout import Layout, check_sizes
from distrijax.parallel.mesh import CFG, DATA, PATCH
from distrijax.parallel.programs import Params
from distrijax.sampling.noise import band_noise
from distrijax.schedulers import Scheduler
from distrijax.weights.sharding import ModelLayout

ALL_BRANCHES = P(None, DATA)
"""Guidance branches, images: what describes the prompt to all devices of an image."""


@dataclasses.dataclass(frozen=True)
class LoopSpec:
    """What the compiled programs of a call depend on besides shapes; a static argument of jit."""

    layout: Layout
    unet: ModelLayout  # whose parameters are the `params` of the programs
    scheduler: Scheduler
    dtype: Any
    strategy: Strategy | None  # what follows the warm-up; None where all steps are stateless


def layout_of(
    config: DistriConfig, mesh: Mesh | AbstractMesh, unet: UNetConfig, *, guided: bool, latent: tuple[int, int]
) -> Layout:
    """How a call of this configuration lies on the mesh. guided: whether the guidance scale is above 1."""
    guided, levels = guided and unet.branches == 2, len(unet.block_out_channels)
    return Layout(mesh, guided, latent, levels, config.parallelism, config.split_scheme)


def image_layout(
    config: DistriConfig,
    mesh: Mesh | AbstractMesh,
    unet: UNetConfig,
    vae: VAEConfig,
    size: tuple[int, int],
    *,
    guided: bool,
) -> Layout:
    """How an image of `size` pixels lies on a mesh; raises DistriError for sizes that are no whole rows of the latent.

    guided: whether the guidance scale is above 1.
    """
    check_sizes(height=size[0], width=size[1], vae_scale=vae.scale)
    latent = size[0] // vae.scale, size[1] // vae.scale
    return layout_of(config, mesh, unet, guided=guided, latent=latent)


def loop_of(
    config: DistriConfig,
    layout: Layout,
    unet: ModelLayout,
    scheduler: Scheduler,
    dtype: Any,
    steps: int | None = None,
) -> LoopSpec:
    """The loop of a call of this configuration: the one place that chooses which steps it has.

    steps: how many; None is enough of them for some to be displaced. Where none is, nothing is kept for the next.
    """
    displaced = layout.parallelism is Parallelism.PATCH and (steps is None or not all(config.synchronous(steps)))
    strategy = strategy_of(config, layout.patches) if displaced else None
    return LoopSpec(layout, unet, scheduler, dtype, strategy)


class CallInputs(NamedTuple):
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


class StepInputs(NamedTuple):
    """The constants of all steps, or of one.

    scheduler: its own. number: of the step, from 1, and so of its noise. step_ratio: how far the next timestep is, over how far
    the previous one was.
    """

    scheduler: Any
    number: Int32[Array | np.ndarray, "*steps"]
    step_ratio: Float[Array | np.ndarray, "*steps"]

    @classmethod
    def of(cls, scheduler: Any) -> StepInputs:
        """All steps of a schedule, on the host. The ratio is 1 where a timestep repeats itself, and at both ends."""
        strides = np.diff(np.asarray(scheduler.timestep, np.float64))
        ratio = np.ones(len(strides) + 1, np.float32)
        moving = (strides[1:] != 0) & (strides[:-1] != 0)
        ratio[1:-1][moving] = strides[1:][moving] / strides[:-1][moving]
        return cls(scheduler, np.arange(1, len(ratio) + 1, dtype=np.int32), ratio)


def guidance_weights(scale: float, *, guided: bool) -> list[list[float]]:
    """`CallInputs.weights`: uncond + scale * (text - uncond), as weights of the two branches (arXiv 2207.12598)."""
    return [[1.0 - scale, 0.0], [scale, 1.0]] if guided else [[1.0, 1.0]]


def condition(
    static: tuple[Layout, ModelLayout],
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
        return jax.tree.map(local_branches, result) if layout.guided else result

    specs = (unet.specs, ALL_BRANCHES)
    mapped = jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=_conditioning_specs(layout))
    return mapped(params, (encoder_hidden_states, text_embeds, time_ids, guidance_scale))


def warm_up(loop: LoopSpec, params: Params, inputs: CallInputs, state: Any, xs: StepInputs) -> tuple[Any, Stale]:
    """Synchronous steps; the last one keeps what it published."""

    def local(params, inputs, state, xs):
        return _warm_up(loop, params, inputs, state, xs)

    return _on_mesh(loop, local, out=(loop.layout.latents, loop.layout.stale))(params, inputs, state, xs)


def synchronous_steps(loop: LoopSpec, params: Params, inputs: CallInputs, state: Any, xs: StepInputs) -> Any:
    """Steps that keep nothing for the next one."""

    def local(params, inputs, state, xs):
        return _scan_synchronous(loop, params, inputs, state, _constants(loop, params, inputs, xs))

    return _on_mesh(loop, local, out=loop.layout.latents)(params, inputs, state, xs)


def displaced(
    loop: LoopSpec, params: Params, inputs: CallInputs, state: Any, stale: Stale, xs: StepInputs
) -> tuple[Any, Stale]:
    """Displaced steps from the stale state of the step before."""

    def local(params, inputs, state, stale, xs):
        return _scan_displaced(loop, params, inputs, state, stale, xs)

    specs = (loop.layout.latents, loop.layout.stale)
    return _on_mesh(loop, local, stale=True, out=specs)(params, inputs, state, stale, xs)


def whole(loop: LoopSpec, params: Params, inputs: CallInputs, state: Any, warm_xs: StepInputs, xs: StepInputs) -> Any:
    """Warm-up and displaced steps in one program."""

    def local(params, inputs, state, all_xs):
        state, stale = _warm_up(loop, params, inputs, state, all_xs[0])
        return _scan_displaced(loop, params, inputs, state, stale, all_xs[1])[0]

    return _on_mesh(loop, local, out=loop.layout.latents)(params, inputs, state, (warm_xs, xs))


def specs_of(loop: LoopSpec, *, stale: bool) -> tuple:
    """How the arguments of a program after `loop` lie on the mesh. stale: whether it takes a stale state."""
    layout = loop.layout
    inputs = CallInputs(_conditioning_specs(layout), P(CFG) if layout.guided else P(), P(), P(DATA))
    return (loop.unet.specs, inputs, layout.latents, *((layout.stale,) if stale else ()), P())


def _conditioning_specs(layout: Layout) -> Conditioning:
    """As `Layout.branches`; of keys and values every device has those of its heads."""
    heads = PATCH if layout.parallelism is Parallelism.TENSOR else None
    return Conditioning(P(*layout.branches, None, heads), layout.branches, layout.branches)


def _on_mesh(loop: LoopSpec, local, *, out: Any, stale: bool = False):
    return jax.shard_map(local, mesh=loop.layout.mesh, in_specs=specs_of(loop, stale=stale), out_specs=out)


def _warm_up(loop: LoopSpec, params: Params, inputs: CallInputs, state: Any, xs: StepInputs) -> tuple[Any, Stale]:
    """All but the last step keep nothing; so the last one creates the stale state, and no empty one is ever needed."""
    constants = _constants(loop, params, inputs, xs)
    state = _scan_synchronous(loop, params, inputs, state, jax.tree.map(lambda a: a[:-1], constants))
    exchange = Synchronous(loop.layout.rows, loop.layout.bands, loop.strategy.publishing)
    predict = partial(loop.unet.module(params).predict, exchange=exchange)
    last = jax.tree.map(lambda a: a[-1], constants)
    return _step(loop, predict, inputs, state, *last), exchange.finish()


def _scan_synchronous(
    loop: LoopSpec, params: Params, inputs: CallInputs, state: Any, constants: tuple[StepInputs, Times]
) -> Any:
    def body(state, constants):
        x, times = constants
        unet = loop.unet.module(params)
        if loop.layout.parallelism is Parallelism.NAIVE_PATCH:
            predict = partial(_predict_independent_patches, loop.layout, unet, x.number)
        else:
            predict = partial(unet.predict, exchange=loop.layout.exact())
        return _step(loop, predict, inputs, state, x, times), None

    return _scan(body, state, constants)


def _predict_independent_patches(
    layout: Layout, unet: UNet, number: Array, sample: Array, times: Times, context: dict[str, KeysValues]
) -> Array:
    """naive_patch: the UNet on every band as if it were a picture of its own. number: of the step, from 1."""

    def on_rows(sample):
        return unet.predict(sample, times, context, WholeImage())

    def across(sample):
        return map_columns(on_rows, sample, layout.rows)

    match layout.split_scheme:
        case SplitScheme.ROW:
            return on_rows(sample)
        case SplitScheme.COLUMN:
            return across(sample)
        case SplitScheme.ALTERNATE:
            return lax.cond(number % 2 == 1, on_rows, across, sample)


def _scan_displaced(
    loop: LoopSpec, params: Params, inputs: CallInputs, state: Any, stale: Stale, xs: StepInputs
) -> tuple[Any, Stale]:
    def body(carry, constants):
        (state, stale), (x, times) = carry, constants
        exchange = loop.strategy(stale, loop.layout.rows, loop.layout.bands, x.step_ratio)
        predict = partial(loop.unet.module(params).predict, exchange=exchange)
        return (_step(loop, predict, inputs, state, x, times), exchange.finish()), None

    return _scan(body, (state, stale), _constants(loop, params, inputs, xs))


def _constants(loop: LoopSpec, params: Params, inputs: CallInputs, xs: StepInputs) -> tuple[StepInputs, Times]:
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
    loop: LoopSpec,
    predict: Callable[[Array, Times, dict[str, KeysValues]], Array],
    inputs: CallInputs,
    state: Any,
    x: StepInputs,
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
        sample = vary_over_cfg(sample)
    output = predict(jnp.tile(sample, (branches, 1, 1, 1)), times, _merged(inputs.conditioning.context))
    output = output.astype(jnp.float32).reshape(branches, images, *output.shape[1:])
    noise = None
    if loop.scheduler.needs_noise:
        noise = band_noise(inputs.keys, number, first_row(shape[0], loop.layout.rows), tuple(shape))
    return loop.scheduler.update(state, _guide(loop.layout, inputs, output), step, noise)


def _guide(layout: Layout, inputs: CallInputs, output: Float[Array, "k b h w c"]) -> Float[Array, "b h w c"]:
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
