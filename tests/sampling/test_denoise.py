"""The denoising loop with small models in closed form: guidance, warm-up, noise, and the cut into chunks."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from oracle import nhwc, relative_error

from distrijax.models.unet import Conditioning
from distrijax.parallel.displaced import Displaced, Strategy
from distrijax.parallel.layout import Layout
from distrijax.parallel.mesh import MeshPlan
from distrijax.sampling import denoise
from distrijax.sampling.begin import BeginSpec, FromLatents, begin
from distrijax.sampling.condition import guidance_weights
from distrijax.sampling.denoise import CallInputs, LoopSpec, StepsSpec
from distrijax.sampling.noise import Stream, band_noise, draw_latents, image_keys
from distrijax.sampling.steps import DisplacedSteps, StepInputs, SynchronousSteps
from distrijax.schedulers import SCHEDULERS, State, load_scheduler
from distrijax.weights.models import UNET, Models
from distrijax.weights.sharding import ModelLayout, Replicated

ONE = MeshPlan(1, 1, 1)
PLANS = [ONE, MeshPlan(1, 1, 4), MeshPlan(1, 2, 1), MeshPlan(1, 2, 4), MeshPlan(2, 2, 2)]
EVERY_MESH = pytest.mark.parametrize("plan", PLANS, ids=str)
SHAPE = (2, 8, 4, 3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """Looks one row up and down and at the whole image's mean, in place of a UNet."""

    gain: jax.Array

    def times(self, timestep, conditioning, dtype):
        return {"said": conditioning.embedding + (timestep / 900)[:, None].astype(dtype)}

    def predict(self, sample, times, context, exchange):
        wide = exchange.halo("rows", sample, 1, 1)
        pixels = sample.astype(jnp.float32)
        mean, variance = jnp.moveaxis(exchange.moments("norm", pixels, 1), -1, 0)
        nearby = sample + 0.5 * wide[:, :-2] - 0.25 * wide[:, 2:]
        normal = (nearby - mean[:, None, None]) / jnp.sqrt(variance + 0.1)[:, None, None]
        return self.gain * (normal + times["said"][:, None, None])


class Prompt:
    """A model that says what its prompt says, whatever it sees."""

    def times(self, timestep, conditioning, dtype):
        return {"said": conditioning.embedding}

    def predict(self, sample, times, context, exchange):
        return 0 * sample + times["said"][:, None, None]


jax.tree_util.register_static(Prompt)


class Step(NamedTuple):
    timestep: Any


@dataclasses.dataclass(frozen=True)
class Add:
    """A scheduler that adds the model's output to the latents, and noise where it is asked to."""

    needs_noise: bool = False
    rate: float = 0.1

    def scale_input(self, latents, step):
        return latents

    def update(self, state, output, step, noise):
        return State(state.latents + self.rate * output + (0 if noise is None else noise))


class Seen(NamedTuple):
    latents: jax.Array
    output: jax.Array


class Still:
    """A scheduler that leaves the latents as they are and keeps the model's output."""

    needs_noise = False

    def scale_input(self, latents, step):
        return latents

    def update(self, state, output, step, noise):
        return Seen(state.latents, output)


def keys(images: int = SHAPE[0]) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.arange(images))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


class Call:
    """What a call of the pipeline hands to the compiled programs, for a small model on some mesh."""

    def __init__(
        self, plan, scheduler, *, model=None, guided=True, scale=3.0, rescale=None, said=None, dtype=jnp.float32
    ):
        mesh = plan.build(jax.devices()[: plan.devices])
        leaves, structure = jax.tree.flatten(Model(jnp.float32(0.5)) if model is None else model)
        self.params = {UNET: tuple(leaves)}
        arrays = tuple((index,) for index in range(len(leaves)))
        form = ModelLayout(structure, paths=(), shapes=(), layouts=(Replicated(),) * len(leaves), arrays=arrays)
        self.loop = LoopSpec(Layout(mesh, guided, SHAPE[1:3]), Models.of(unet=form), scheduler, dtype)
        branches = 2 if guided else 1
        said = normal(2, *SHAPE[::3], seed=5) if said is None else said
        weights = guidance_weights(scale, guided=guided)
        self.inputs = CallInputs(
            {UNET: Conditioning({}, said[-branches:].astype(dtype))},
            weights,
            None if rescale is None else np.float32(rescale),
            keys(),
        )

    def run(self, rules, state, *pieces, stale=None):
        """The state, and what the last step published, after pieces of steps by these rules."""
        program = jax.jit(denoise.steps, static_argnums=0)
        return program(StepsSpec(self.loop, rules), self.params, self.inputs, state, stale or {}, pieces)

    def exact(self, state, piece):
        return self.run((EXACT,), state, piece)[0]


STRATEGY = Strategy(Displaced)
EXACT, WARM_UP, DISPLACED = (
    SynchronousSteps(),
    SynchronousSteps(publishing=STRATEGY.publishing),
    DisplacedSteps(STRATEGY),
)


def steps(first: int, last: int) -> StepInputs:
    """The steps from `first` to before `last`."""
    return StepInputs.of(Step(np.linspace(900, 0, 8, dtype=np.float32))).part(first, last)


def start() -> State:
    return State(normal(*SHAPE))


def test_noise_is_the_same_whatever_generator_jax_is_configured_to_use():
    def noise():
        return band_noise(image_keys(jnp.uint32([[1, 0, 0], [2, 0, 0]])), 0, 0, (8, 4, 3))

    usual = noise()
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(noise(), usual)


def test_noise_does_not_depend_on_the_cut_into_bands():
    whole = band_noise(keys(), 3, 0, (8, 4, 3))
    parts = [band_noise(keys(), 3, first, (2, 4, 3)) for first in range(0, 8, 2)]
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole)


def test_noise_is_normal_and_never_the_same_twice():
    values = np.concatenate([band_noise(keys(), number, 0, (32, 16, 4)) for number in (0, 1)])
    assert len(np.unique(values)) > 0.999 * values.size  # float32 normals coincide now and then
    assert abs(values.mean()) < 0.03
    assert abs(values.std() - 1) < 0.03
    rows = values.reshape(-1, 16 * 4)
    assert np.abs(np.corrcoef(rows)[~np.eye(len(rows), dtype=bool)]).max() < 0.7


@pytest.mark.parametrize("guided", [True, False])
@EVERY_MESH
def test_starting_noise_is_bit_identical_on_every_mesh(plan, guided):
    def draw(plan, guided):
        layout = Layout(plan.build(jax.devices()[: plan.devices]), guided, (8, 4))
        return jax.jit(lambda keys: draw_latents(layout, 3, keys))(keys())

    np.testing.assert_array_equal(draw(plan, guided), draw(ONE, True))


@EVERY_MESH
def test_guidance_goes_beyond_the_text_branch(plan):
    said = np.stack([np.full(SHAPE[::3], 1.0), np.full(SHAPE[::3], 3.0)]).astype(np.float32)
    call = Call(plan, Still(), model=Prompt(), said=said, scale=5.0)
    result = call.exact(Seen(start().latents, start().latents), steps(0, 1))
    np.testing.assert_allclose(result.output, np.full(SHAPE, 1.0 + 5.0 * (3.0 - 1.0)), rtol=1e-6)


@EVERY_MESH
def test_without_guidance_the_text_branch_is_the_output(plan):
    said = np.stack([np.full(SHAPE[::3], 1.0), np.full(SHAPE[::3], 3.0)]).astype(np.float32)
    call = Call(plan, Still(), model=Prompt(), said=said, guided=False, scale=1.0)
    result = call.exact(Seen(start().latents, start().latents), steps(0, 1))
    np.testing.assert_array_equal(result.output, np.full(SHAPE, 3.0))


@EVERY_MESH
def test_guidance_rescale_equals_diffusers(plan):
    state = Seen(start().latents, start().latents)
    scale, rescale = 4.0, 0.7
    text = Call(ONE, Still(), guided=False).exact(state, steps(0, 1)).output
    guided = Call(ONE, Still(), scale=scale).exact(state, steps(0, 1)).output
    text, guided = (torch.from_numpy(np.moveaxis(np.array(value), -1, 1)) for value in (text, guided))
    wanted = nhwc(rescale_noise_cfg(guided, text, guidance_rescale=rescale))
    got = Call(plan, Still(), scale=scale, rescale=rescale).exact(state, steps(0, 1)).output
    assert relative_error(got, wanted) < 1e-5
    assert relative_error(got, nhwc(guided)) > 0.01


@pytest.mark.parametrize("guided", [True, False])
@EVERY_MESH
def test_synchronous_steps_with_noise_are_those_of_one_device(plan, guided):
    scheduler = Add(needs_noise=True)
    wanted = Call(ONE, scheduler, guided=guided).exact(start(), steps(0, 4))
    got = Call(plan, scheduler, guided=guided).exact(start(), steps(0, 4))
    assert relative_error(got.latents, wanted.latents) < 1e-5


@EVERY_MESH
def test_displaced_step_with_the_same_input_gives_the_synchronous_output(plan):
    call = Call(plan, Still())
    before, stale = call.run((WARM_UP,), Seen(start().latents, 0 * start().latents), steps(0, 2))
    again = jax.tree.map(lambda column: np.repeat(column, 3, 0), steps(1, 2))
    after, _ = call.run((DISPLACED,), Seen(before.latents, 0 * before.output), again, stale=stale)
    assert relative_error(after.output, before.output) < 1e-5


def test_chunks_and_the_whole_loop_give_the_same_numbers():
    call = Call(MeshPlan(2, 2, 2), Add(needs_noise=True))
    whole, _ = call.run((WARM_UP, DISPLACED), start(), steps(0, 3), steps(3, 8))
    state, stale = call.run((WARM_UP,), start(), steps(0, 3))
    state, stale = call.run((DISPLACED,), state, steps(3, 4), stale=stale)
    state, stale = call.run((DISPLACED,), state, steps(4, 8), stale=stale)
    assert relative_error(state.latents, whole.latents) < 1e-6
    one_by_one = start()
    for i in range(3):
        one_by_one, stale = call.run((WARM_UP,), one_by_one, steps(i, i + 1))
    for i in range(3, 8):
        one_by_one, stale = call.run((DISPLACED,), one_by_one, steps(i, i + 1), stale=stale)
    assert relative_error(one_by_one.latents, whole.latents) < 1e-6


def test_displaced_steps_differ_from_synchronous_ones_where_there_are_bands():
    def difference(plan):
        call = Call(plan, Add(rate=0.5))
        return relative_error(
            call.run((WARM_UP, DISPLACED), start(), steps(0, 1), steps(1, 4))[0].latents,
            call.exact(start(), steps(0, 4)).latents,
        )

    assert difference(MeshPlan(1, 1, 4)) > 1e-3
    assert difference(MeshPlan(1, 2, 1)) < 1e-6  # two branches, each with its whole image: nothing is stale


def test_state_and_guidance_are_float32_when_the_model_is_bfloat16():
    call = Call(MeshPlan(1, 2, 2), Still(), model=Prompt(), dtype=jnp.bfloat16)
    result = jax.eval_shape(call.exact, Seen(start().latents, start().latents), steps(0, 1))
    assert {leaf.dtype for leaf in result} == {jnp.dtype(jnp.float32)}


def test_latents_stay_cut_by_rows():
    call = Call(MeshPlan(2, 2, 2), load_scheduler({"_class_name": "EulerDiscreteScheduler"}))
    table, sigma = call.loop.scheduler.schedule(4)
    xs = StepInputs.of(table)
    state = call.loop.scheduler.init(jnp.asarray(normal(*SHAPE)), np.float32(sigma))
    result = call.exact(state, xs).latents
    assert {shard.data.shape for shard in result.addressable_shards} == {(1, 4, *SHAPE[2:])}


@pytest.mark.parametrize(("guided", "sums"), [(True, 1), (False, 0)])
def test_a_step_sums_over_the_branches_once_and_gathers_only_what_layers_ask_for(guided, sums):
    call = Call(MeshPlan(1, 2, 4), Add(), guided=guided)
    _, stale = jax.eval_shape(lambda *a: call.run((WARM_UP,), *a), start(), steps(0, 1))
    program = jax.jit(lambda stale, *a: call.run((DISPLACED,), *a, stale=stale))
    text = program.lower(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), stale), start(), steps(1, 4)).as_text()
    assert text.count("stablehlo.all_reduce") == sums
    assert text.count("stablehlo.all_gather") == 1  # moments
    assert text.count("stablehlo.collective_permute") == 2  # one row up, one row down


class Timed(Prompt):
    def times(self, timestep, conditioning, dtype):
        return {"said": jnp.sinh(timestep / 1000)[:, None] + conditioning.embedding}


jax.tree_util.register_static(Timed)


def test_what_depends_on_the_timestep_alone_is_computed_before_the_loop():
    call = Call(ONE, Still(), model=Timed(), guided=False)
    state, few = Seen(start().latents, start().latents), steps(2, 6)
    result = call.exact(state, few)
    wanted = np.sinh(few.scheduler.timestep[-1] / 1000) + call.inputs.conditioning[UNET].embedding[0]
    np.testing.assert_allclose(result.output, np.broadcast_to(wanted[:, None, None], SHAPE), rtol=1e-6)
    program = str(jax.make_jaxpr(call.exact)(state, few))
    before, loop = program.split(" scan[")
    assert " sinh " in before and " sinh " not in loop


def test_the_pace_is_the_next_stride_over_the_previous_one():
    """PNDM repeats a timestep; there, and at both ends, nothing is known."""
    steps = StepInputs.of(Step(np.array([900.0, 800, 800, 600, 500, 250])))
    np.testing.assert_allclose(steps.step_ratio, [1, 1, 1, 0.5, 2.5, 1])
    np.testing.assert_array_equal(steps.number, np.arange(1, 7))


def test_a_schedule_that_begins_later_has_no_pace_yet_and_goes_on_with_the_numbers_of_its_steps():
    steps = StepInputs.of(Step(np.array([600.0, 500, 250])), start=3)
    np.testing.assert_allclose(steps.step_ratio, [1, 2.5, 1])
    np.testing.assert_array_equal(steps.number, [4, 5, 6])


@pytest.mark.parametrize("name", ("euler-ancestral", "ddim", "lcm"))
def test_the_rest_of_a_schedule_goes_on_with_the_noise_of_the_whole(name):
    scheduler = load_scheduler({}, name)
    call = Call(MeshPlan(2, 2, 2), scheduler)

    def run(state, first, last):
        steps, _ = scheduler.schedule(6, first)
        return call.exact(state, StepInputs.of(steps, first).part(0, last - first))

    state = scheduler.init(jnp.asarray(start().latents), np.float32(scheduler.schedule(6)[1]))
    whole = run(state, 0, 6).latents
    assert relative_error(run(run(state, 0, 4), 4, 6).latents, whole) < 1e-6


@pytest.mark.parametrize("plan", (ONE, MeshPlan(2, 2, 2)), ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_call_begins_with_an_image_and_the_images_own_noise_on_any_mesh(plan, name):
    call = Call(plan, load_scheduler({}, name))
    layout, scheduler = call.loop.layout, call.loop.scheduler
    step = jax.tree.map(lambda column: column[0], scheduler.schedule(8, 4)[0])
    image, seeds = jnp.asarray(normal(*SHAPE, seed=2)), np.array([[1, 0, 0], [2, 0, 0]], np.uint32)
    run = jax.jit(begin, static_argnums=0)
    spec = BeginSpec(layout, scheduler, SHAPE[-1], FromLatents, Stream.IMAGE)
    made_keys, state = run(spec, (), seeds, None, image, step)
    expected = scheduler.add_noise(image, band_noise(made_keys, int(Stream.IMAGE), 0, SHAPE[1:]), step)
    assert relative_error(state.latents, expected) < 1e-6
    assert state.latents.sharding.is_equivalent_to(layout.sharding(layout.latents), 4)
    given = run(spec, (), seeds, jnp.zeros(SHAPE), image, step)[1]
    np.testing.assert_allclose(given.latents, step.image_scale * image, rtol=1e-6)


def test_no_two_passes_over_an_image_share_noise():
    numbers = [StepInputs.of(Step(np.linspace(900, 0, 1000)), stream=stream).number for stream in Stream]
    assert len({*np.concatenate(numbers).tolist(), *map(int, Stream)}) == len(Stream) * (1000 + 1)
    for number in numbers:  # naive_patch alternates alike
        np.testing.assert_array_equal(number % 2, numbers[0] % 2)
    first = draw_latents(Layout(ONE.build(jax.devices()[:1]), False, (8, 4)), 3, keys())
    again = draw_latents(Layout(ONE.build(jax.devices()[:1]), False, (8, 4)), 3, keys(), Stream.IMAGE)
    assert relative_error(again, first) > 1
