"""The denoising loop: steps of any kinds, guidance and scheduler, inside one shard_map.

The loop is handed what differs: the rules of its steps (`distrijax.sampling.steps`), each with an exchange and a predictor, and
what follows an update (`AfterUpdate`). Steps of one kind are a `lax.scan`. A program has one such piece, or several; the host
runs a call as one program, or in chunks with the host between them. Both run the same functions, so the numbers are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from distrijax.models.unet import Conditioning, Times
from distrijax.parallel.collectives import branch_sum, first_row, vary_over_cfg
from distrijax.parallel.exchange import Exchange, Stale
from distrijax.parallel.layout import Layout
from distrijax.parallel.mesh import CFG, DATA
from distrijax.parallel.programs import Stage
from distrijax.parallel.stages import On
from distrijax.sampling.begin import Begin
from distrijax.sampling.condition import conditioning_specs, guidance_weights, merge_lead_axes
from distrijax.sampling.noise import band_noise
from distrijax.sampling.steps import StepInputs, StepRule
from distrijax.schedulers import Scheduler
from distrijax.weights.models import Models, NamedParams


class AfterUpdate(Protocol):
    """What follows each update of the scheduler. The class is static; an object has a call's arrays."""

    def facts(self) -> dict[str, Any]:
        """What must be the same in all processes: arrays of numpy, or values whose `repr` says all."""

    def arrays(self, on: On, layout: Layout, begin: Begin, steps: Any) -> Any:
        """What `update` takes besides, placed.

        Args:
            on: Where the call runs.
            layout: The layout of the latents.
            begin: Where the call begins.
            steps: The scheduler's constants of all steps to make, `[steps]` each.
        """

    @staticmethod
    def specs(layout: Layout) -> Any:
        """How `arrays` are sharded.

        Args:
            layout: The layout of the latents.
        """

    @staticmethod
    def update(loop: LoopSpec, inputs: CallInputs, state: Any, x: StepInputs) -> Any:
        """The state to go on with, on one device.

        Args:
            loop: What is static; its scheduler adds noise.
            inputs: The inputs of the call: the images' keys, and this device's part of `arrays` as `after_update`.
            state: The scheduler's state after the step, of this device's rows.
            x: The step's constants.
        """


class NoHook:
    """Nothing follows an update."""

    def facts(self):
        return {}

    def arrays(self, on, layout, begin, steps):
        return ()

    @staticmethod
    def specs(layout):
        return ()

    @staticmethod
    def update(loop, inputs, state, x):
        return state


@dataclasses.dataclass(frozen=True)
class LoopSpec:
    """What all steps of a call depend on besides shapes; static.

    Attributes:
        layout: The layout of the latents.
        models: The models that predict; their parameters are the `params` of the program.
        scheduler: The scheduler.
        dtype: The dtype in which the models compute.
        after_update: What follows each update.
    """

    layout: Layout
    models: Models
    scheduler: Scheduler
    dtype: Any
    after_update: type[AfterUpdate] = NoHook


class StepsSpec(NamedTuple):
    """What a program of steps depends on besides shapes; a static argument of jit.

    Attributes:
        loop: What it has in common with the call's other programs.
        rules: How the steps of each of its pieces are made.
        keep: Whether it returns what the last step published.
    """

    loop: LoopSpec
    rules: tuple[StepRule, ...]
    keep: bool = True


class CallInputs(NamedTuple):
    """What is constant over the steps of a call.

    Attributes:
        conditioning: Of each model, the prompts; leaves `[branches, images, ...]`, the unconditional branch first.
        weights: `[branches, 2]`: the weights of the branches in the guided prediction, and in the text prediction alone.
        rescale: `guidance_rescale`, or None for none.
        keys: The random key of each image, `[images]`.
        after_update: The arrays of `AfterUpdate`.
    """

    conditioning: dict[str, Conditioning]
    weights: Float[Array, "branches 2"]
    rescale: Float[Array, ""] | None
    keys: Key[Array, "images"]
    after_update: Any = ()


def call_inputs(
    on: On,
    layout: Layout,
    conditioning: dict[str, Conditioning],
    keys: Key[Array, "images"],
    guidance_scale: float,
    guidance_rescale: float,
    after_update: Any = (),
) -> CallInputs:
    """What is constant over the steps of a call, on the devices.

    Args:
        on: Where the call runs.
        layout: The layout of the latents.
        conditioning: Of each model, on the devices.
        keys: The random key of each image, on the devices.
        guidance_scale: Scale of classifier-free guidance.
        guidance_rescale: As in a call; 0 for none.
        after_update: `AfterUpdate.arrays`.
    """
    weights = guidance_weights(guidance_scale, guided=layout.guided)
    rescale = None
    if layout.guided and guidance_rescale > 0:
        rescale = on.put(np.float32(guidance_rescale), layout.sharding(P()))
    weights = on.put(weights, layout.sharding(P(CFG) if layout.guided else P()))
    return CallInputs(conditioning, weights, rescale, keys, after_update)


def steps(
    spec: StepsSpec,
    params: NamedParams,
    inputs: CallInputs,
    state: Any,
    stale: Stale,
    pieces: tuple[StepInputs, ...],
) -> tuple[Any, Stale]:
    """Runs steps.

    Args:
        spec: What is static.
        params: The models' parameters.
        inputs: What is the same in all steps.
        state: The scheduler's state, sharded by rows.
        stale: What the step before published; empty if the first piece reads nothing.
        pieces: Constants of the steps of each piece.

    Returns:
        The state, and what the last step published: empty if that is not kept, or nothing was.
    """

    def local(params, inputs, state, stale, pieces):
        for rule, xs in zip(spec.rules, pieces, strict=True):
            state, stale = _run_piece(spec.loop, rule, params, inputs, state, stale, xs)
        return state, stale if spec.keep else {}

    layout = spec.loop.layout
    results = layout.latents, layout.stale
    mapped = jax.shard_map(local, mesh=layout.mesh, in_specs=argument_specs(spec.loop), out_specs=results)
    return mapped(params, inputs, state, stale, pieces)


def argument_specs(loop: LoopSpec) -> tuple:
    """The shardings of the arguments of `steps` after `spec`.

    Args:
        loop: What is static.
    """
    layout = loop.layout
    inputs = CallInputs(
        conditioning_specs(layout, loop.models),
        P(CFG) if layout.guided else P(),
        P(),
        P(DATA),
        loop.after_update.specs(layout),
    )
    return loop.models.specs, inputs, layout.latents, layout.stale, P()


def _results(spec: StepsSpec) -> tuple:
    layout = spec.loop.layout
    return layout.sharding(layout.latents), layout.sharding(layout.stale)


def _same(spec: StepsSpec) -> tuple[int, int] | None:
    """Steps that read what the step before published leave a state and publish of the same shapes."""
    return (1, 2) if spec.keep and all(rule.reads for rule in spec.rules) else None


STEPS = Stage(steps, _results, donate=(1, 2), same=_same)


def run_steps(
    on: On,
    spec: StepsSpec,
    params: NamedParams,
    inputs: CallInputs,
    state: Any,
    stale: Stale,
    pieces: tuple[StepInputs, ...],
) -> tuple[Any, Stale]:
    """Runs the stage `steps`; arguments as there.

    Args:
        on: Where the call runs.
        spec: What is static.
        params: The models' parameters.
        inputs: On the devices.
        state: On the devices.
        stale: On the devices.
        pieces: On the host.
    """
    return on.run(STEPS, spec, params, inputs, state, stale, on.put(pieces, spec.loop.layout.sharding(P())))


def _run_piece(
    loop: LoopSpec, rule: StepRule, params: NamedParams, inputs: CallInputs, state: Any, stale: Stale, xs: StepInputs
) -> tuple[Any, Stale]:
    """Runs the steps of one rule, on one device. Of steps that read nothing only the last publishes: no empty state is needed."""
    constants = _step_constants(loop, params, inputs, xs)

    def step(state: Any, stale: Stale, constants: tuple[StepInputs, dict[str, Times]]) -> tuple[Any, Stale]:
        x, times = constants
        exchange = rule.exchange(loop.layout, stale, x)
        return _step(loop, rule, params, inputs, state, x, times, exchange), exchange.finish()

    if rule.reads:
        return _scan(lambda carry, constants: step(*carry, constants), (state, stale), constants)
    quiet = constants if not rule.publishes else jax.tree.map(lambda a: a[:-1], constants)
    state = _scan(lambda state, constants: step(state, {}, constants)[0], state, quiet)
    if not rule.publishes:
        return state, {}
    return step(state, {}, jax.tree.map(lambda a: a[-1], constants))


def _step_constants(
    loop: LoopSpec, params: NamedParams, inputs: CallInputs, xs: StepInputs
) -> tuple[StepInputs, dict[str, Times]]:
    """`xs`, and each model's `times` of all steps, `[steps, branches * images, c]` each.

    Computed for all steps of a program together, so that its weights are read once.
    """
    modules = loop.models.modules(params)
    samples = inputs.weights.shape[0] * inputs.keys.shape[0]

    def of_step(timestep: Float[Array, ""]) -> dict[str, Times]:
        timesteps = jnp.broadcast_to(timestep, samples)
        return {
            name: module.times(timesteps, merge_lead_axes(inputs.conditioning[name]), loop.dtype)
            for name, module in modules.items()
        }

    return xs, jax.vmap(of_step)(xs.scheduler.timestep)


def _scan(step: Callable[[Any, Any], Any], carry: Any, constants: Any) -> Any:
    """`lax.scan` without outputs. Without steps the body is not compiled."""
    if not jax.tree.leaves(constants)[0].shape[0]:
        return carry
    return lax.scan(lambda carry, x: (step(carry, x), None), carry, constants)[0]


def _step(
    loop: LoopSpec,
    rule: StepRule,
    params: NamedParams,
    inputs: CallInputs,
    state: Any,
    x: StepInputs,
    times: Mapping[str, Times],
    exchange: Exchange,
) -> Any:
    """One denoising step of one patch.

    Args:
        loop: What is static.
        rule: How the step is made.
        params: The models' parameters.
        inputs: The inputs of the call.
        state: The scheduler's state.
        x: The constants of this step.
        times: Each model's `times` of this step.
        exchange: Of this step.

    Returns:
        The scheduler's next state.
    """
    step, number = x.scheduler, x.number
    images, *shape = state.latents.shape
    branches = inputs.weights.shape[0]
    sample = loop.scheduler.scale_input(state.latents, step).astype(loop.dtype)
    if loop.layout.guided:
        sample = vary_over_cfg(sample)
    modules: dict[str, nnx.Module] = loop.models.modules(params)
    context = {name: merge_lead_axes(each.context) for name, each in inputs.conditioning.items()}
    sample = jnp.tile(sample, (branches, 1, 1, 1))
    output = rule.predictor(modules, sample, times, context, exchange, number)
    output = output.astype(jnp.float32).reshape(branches, images, *output.shape[1:])
    noise = None
    if loop.scheduler.needs_noise:
        noise = band_noise(inputs.keys, number, first_row(shape[0], loop.layout.rows), tuple(shape))
    state = loop.scheduler.update(state, _guide(loop.layout, inputs, output), step, noise)
    return loop.after_update.update(loop, inputs, state, x)


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
