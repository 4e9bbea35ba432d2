"""The denoising loop: warm-up, displaced steps, guidance and scheduler, inside one shard_map.

    warm_up             step ... step -> state, stale    synchronous steps; the last one keeps what it published
    displaced           step ... step -> state, stale    each step reads what the step before it published
    synchronous_steps   step ... step -> state           nothing is kept: full_sync, tensor and naive_patch

`warm_up` and `displaced` run as one compiled program (`whole`), or in chunks with the host between them. Both run the same
functions, so the numbers are the same. `Layout` says which mesh axes shard the rows and which the guidance branches; `loop_of`
says which steps a configuration has.
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
"""The sharding of what describes the prompts: all guidance branches on all devices of an image."""


@dataclasses.dataclass(frozen=True)
class LoopSpec:
    """What the compiled programs of a call depend on besides shapes; a static argument of jit.

    Attributes:
        layout: The layout of the latents.
        unet: The layout of the UNet's parameters, which are the `params` of the programs.
        scheduler: The scheduler.
        dtype: The dtype in which the UNet computes.
        strategy: The strategy after the warm-up; None if all steps are synchronous.
    """

    layout: Layout
    unet: ModelLayout
    scheduler: Scheduler
    dtype: Any
    strategy: Strategy | None


def layout_of(
    config: DistriConfig, mesh: Mesh | AbstractMesh, unet: UNetConfig, *, guided: bool, latent: tuple[int, int]
) -> Layout:
    """The layout of a call.

    Args:
        config: What the user set.
        mesh: The mesh.
        unet: The UNet's configuration.
        guided: Whether the guidance scale is above 1.
        latent: Rows and columns of the image's latent.
    """
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
    """The layout of a call, from the size of its images.

    Args:
        config: What the user set.
        mesh: The mesh.
        unet: The UNet's configuration.
        vae: The VAE's configuration.
        size: Height and width in pixels.
        guided: Whether the guidance scale is above 1.

    Raises:
        InvalidArgument: The image does not have whole rows and columns of the latent.
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
    """The loop of a call: the one place that chooses which kinds of steps it has.

    Args:
        config: What the user set.
        layout: The layout of the latents.
        unet: The layout of the UNet's parameters.
        scheduler: The scheduler.
        dtype: The dtype in which the UNet computes.
        steps: How many steps; if all are synchronous, nothing is kept for a next one. None assumes that some are displaced.
    """
    displaced = layout.parallelism is Parallelism.PATCH and (steps is None or not all(config.synchronous(steps)))
    strategy = strategy_of(config, layout.patches) if displaced else None
    return LoopSpec(layout, unet, scheduler, dtype, strategy)


class CallInputs(NamedTuple):
    """What is constant over the steps of a call.

    Attributes:
        conditioning: The prompts; leaves `[branches, images, ...]`, the unconditional branch first.
        weights: `[branches, 2]`: the weights of the branches in the guided prediction, and in the text prediction alone.
        rescale: `guidance_rescale`, or None for none.
        keys: The random key of each image, `[images]`.
    """

    conditioning: Conditioning
    weights: Float[Array, "branches 2"]
    rescale: Float[Array, ""] | None
    keys: Key[Array, "images"]


class StepInputs(NamedTuple):
    """The constants of all steps, or of one.

    Attributes:
        scheduler: The scheduler's constants.
        number: The number of the step in the whole schedule, from 1, which is also the number of its noise.
        step_ratio: The distance to the next timestep over the distance from the previous one.
    """

    scheduler: Any
    number: Int32[Array | np.ndarray, "*steps"]
    step_ratio: Float[Array | np.ndarray, "*steps"]

    @classmethod
    def of(cls, scheduler: Any, start: int = 0) -> StepInputs:
        """The constants of all steps to make, on the host. The ratio is 1 at both ends, and where a timestep is repeated.

        Args:
            scheduler: The scheduler's constants of all steps from `start` on, `[steps]` each.
            start: The index in the whole schedule of the first of them.
        """
        strides = np.diff(np.asarray(scheduler.timestep, np.float64))
        ratio = np.ones(len(strides) + 1, np.float32)
        moving = (strides[1:] != 0) & (strides[:-1] != 0)
        ratio[1:-1][moving] = strides[1:][moving] / strides[:-1][moving]
        return cls(scheduler, np.arange(start + 1, start + len(ratio) + 1, dtype=np.int32), ratio)


def guidance_weights(scale: float, *, guided: bool) -> list[list[float]]:
    """`CallInputs.weights` of classifier-free guidance, uncond + scale * (text - uncond).

    Args:
        scale: The guidance scale.
        guided: Whether there is an unconditional branch.

    References:
        arXiv 2207.12598.
    """
    return [[1.0 - scale, 0.0], [scale, 1.0]] if guided else [[1.0, 1.0]]


def condition(
    static: tuple[Layout, ModelLayout],
    params: Params,
    encoder_hidden_states: Float[Array, "branches images t e"],
    text_embeds: Float[Array, "branches images p"] | None,
    time_ids: Float[Array, "branches images i"] | None,
    guidance_scale: Float[Array, "branches images"] | None,
) -> Conditioning:
    """Runs `UNet.condition` for all branches and images, and leaves each on the devices that will use it.

    The devices of an image share the work: each computes a part of the channels of keys and values, for all branches.

    Args:
        static: The layout of the call, and of the UNet's parameters.
        params: The UNet's parameters.
        encoder_hidden_states: Prompt embeddings, `[branches, images, tokens, e]`.
        text_embeds: Pooled prompt embeddings, `[branches, images, p]`; SDXL's.
        time_ids: Micro-conditioning in pixels, `[branches, images, i]`; SDXL's.
        guidance_scale: `[branches, images]`, for models that are conditioned on it.
    """
    layout, unet = static

    def local(params, arguments):
        lead = arguments[0].shape[:2]
        result = unet.module(params).condition(*_merge_lead_axes(arguments), exchange=layout.exact())
        result = jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), result)
        return jax.tree.map(local_branches, result) if layout.guided else result

    specs = (unet.specs, ALL_BRANCHES)
    mapped = jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=_conditioning_specs(layout))
    return mapped(params, (encoder_hidden_states, text_embeds, time_ids, guidance_scale))


def warm_up(loop: LoopSpec, params: Params, inputs: CallInputs, state: Any, xs: StepInputs) -> tuple[Any, Stale]:
    """Runs synchronous steps, the last of which publishes a stale state.

    Args:
        loop: Static description of the loop.
        params: The UNet's parameters.
        inputs: What is the same in all steps.
        state: The scheduler's state, sharded by rows.
        xs: Constants of the steps to run.

    Returns:
        The state, and the stale state.
    """

    def local(params, inputs, state, xs):
        return _warm_up(loop, params, inputs, state, xs)

    return _shard_map(loop, local, out=(loop.layout.latents, loop.layout.stale))(params, inputs, state, xs)


def synchronous_steps(loop: LoopSpec, params: Params, inputs: CallInputs, state: Any, xs: StepInputs) -> Any:
    """Runs steps that keep nothing for the next one.

    Args:
        loop: Static description of the loop.
        params: The UNet's parameters.
        inputs: What is the same in all steps.
        state: The scheduler's state, sharded by rows.
        xs: Constants of the steps to run.

    Returns:
        The state.
    """

    def local(params, inputs, state, xs):
        return _scan_synchronous(loop, params, inputs, state, _step_constants(loop, params, inputs, xs))

    return _shard_map(loop, local, out=loop.layout.latents)(params, inputs, state, xs)


def displaced(
    loop: LoopSpec, params: Params, inputs: CallInputs, state: Any, stale: Stale, xs: StepInputs
) -> tuple[Any, Stale]:
    """Runs displaced steps.

    Args:
        loop: Static description of the loop.
        params: The UNet's parameters.
        inputs: What is the same in all steps.
        state: The scheduler's state, sharded by rows.
        stale: What the step before published.
        xs: Constants of the steps to run.

    Returns:
        The state, and the new stale state.
    """

    def local(params, inputs, state, stale, xs):
        return _scan_displaced(loop, params, inputs, state, stale, xs)

    specs = (loop.layout.latents, loop.layout.stale)
    return _shard_map(loop, local, stale=True, out=specs)(params, inputs, state, stale, xs)


def whole(loop: LoopSpec, params: Params, inputs: CallInputs, state: Any, warm_xs: StepInputs, xs: StepInputs) -> Any:
    """Runs warm-up and displaced steps in one program.

    Args:
        loop: Static description of the loop.
        params: The UNet's parameters.
        inputs: What is the same in all steps.
        state: The scheduler's state, sharded by rows.
        warm_xs: Constants of the synchronous steps.
        xs: Constants of the displaced steps.

    Returns:
        The state.
    """

    def local(params, inputs, state, all_xs):
        state, stale = _warm_up(loop, params, inputs, state, all_xs[0])
        return _scan_displaced(loop, params, inputs, state, stale, all_xs[1])[0]

    return _shard_map(loop, local, out=loop.layout.latents)(params, inputs, state, (warm_xs, xs))


def specs_of(loop: LoopSpec, *, stale: bool) -> tuple:
    """The shardings of a program's arguments after `loop`.

    Args:
        loop: Static description of the loop.
        stale: Whether the program takes a stale state.
    """
    layout = loop.layout
    inputs = CallInputs(_conditioning_specs(layout), P(CFG) if layout.guided else P(), P(), P(DATA))
    return (loop.unet.specs, inputs, layout.latents, *((layout.stale,) if stale else ()), P())


def _conditioning_specs(layout: Layout) -> Conditioning:
    """As `Layout.branches`; with tensor parallelism, keys and values are sharded by heads."""
    heads = PATCH if layout.parallelism is Parallelism.TENSOR else None
    return Conditioning(P(*layout.branches, None, heads), layout.branches, layout.branches)


def _shard_map(loop: LoopSpec, local, *, out: Any, stale: bool = False):
    """Maps `local` over the mesh. `stale`: whether it takes a stale state."""
    return jax.shard_map(local, mesh=loop.layout.mesh, in_specs=specs_of(loop, stale=stale), out_specs=out)


def _warm_up(loop: LoopSpec, params: Params, inputs: CallInputs, state: Any, xs: StepInputs) -> tuple[Any, Stale]:
    """`warm_up` on one device. Only the last step publishes, so no empty stale state is ever needed."""
    constants = _step_constants(loop, params, inputs, xs)
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
    """naive_patch: the UNet on every band as if it were an image of its own. `number`: of the step, from 1."""

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

    return _scan(body, (state, stale), _step_constants(loop, params, inputs, xs))


def _step_constants(loop: LoopSpec, params: Params, inputs: CallInputs, xs: StepInputs) -> tuple[StepInputs, Times]:
    """`xs`, and `UNet.times` of all steps, `[steps, branches * images, c]` each.

    Computed for all steps of a program together, so that its weights are read once.
    """
    times, conditioning = loop.unet.module(params).times, _merge_lead_axes(inputs.conditioning)
    samples = inputs.weights.shape[0] * inputs.keys.shape[0]

    def of_step(timestep: Float[Array, ""]) -> Times:
        return times(jnp.broadcast_to(timestep, samples), conditioning, loop.dtype)

    return xs, jax.vmap(of_step)(xs.scheduler.timestep)


def _merge_lead_axes(branches_and_images: Any) -> Any:
    """Merges the first two axes of every leaf, branches and images."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), branches_and_images)


def _scan(body, carry, xs):
    """`lax.scan` without outputs. Without steps the body is not compiled."""
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

    Args:
        loop: The loop.
        predict: The UNet on this patch, called with sample, times and context.
        inputs: The inputs of the call.
        state: The scheduler's state.
        x: The constants of this step.
        times: `UNet.times` of this step.

    Returns:
        The scheduler's next state.
    """
    step, number = x.scheduler, x.number
    images, *shape = state.latents.shape
    branches = inputs.weights.shape[0]
    sample = loop.scheduler.scale_input(state.latents, step).astype(loop.dtype)
    if loop.layout.guided:
        sample = vary_over_cfg(sample)
    output = predict(jnp.tile(sample, (branches, 1, 1, 1)), times, _merge_lead_axes(inputs.conditioning.context))
    output = output.astype(jnp.float32).reshape(branches, images, *output.shape[1:])
    noise = None
    if loop.scheduler.needs_noise:
        noise = band_noise(inputs.keys, number, first_row(shape[0], loop.layout.rows), tuple(shape))
    return loop.scheduler.update(state, _guide(loop.layout, inputs, output), step, noise)


def _guide(layout: Layout, inputs: CallInputs, output: Float[Array, "k b h w c"]) -> Float[Array, "b h w c"]:
    """Classifier-free guidance of the branches' predictions; with `rescale`, the text prediction's contrast is restored.

    References:
        arXiv 2305.08891, section 3.4.
    """
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
