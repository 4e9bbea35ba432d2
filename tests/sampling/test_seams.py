"""What the loop is handed, with toys on the other side: models beside the UNet, hooks, kinds of steps, ways to begin."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import relative_error
from unet_configs import CONVOLUTIONS

from distrijax.models.layers import name_layers
from distrijax.models.unet import UNet
from distrijax.models.unet_config import UNetConfig
from distrijax.parallel.displaced import Displaced, Strategy
from distrijax.parallel.exchange import Synchronous, WholeImage
from distrijax.parallel.layout import Layout
from distrijax.parallel.mesh import MeshPlan
from distrijax.parallel.programs import Programs
from distrijax.parallel.stages import OnDevices
from distrijax.sampling.begin import FromNoise
from distrijax.sampling.condition import CONDITION, PromptInputs
from distrijax.sampling.denoise import LoopSpec, NoHook, StepsSpec, call_inputs, steps
from distrijax.sampling.noise import image_keys
from distrijax.sampling.steps import DisplacedSteps, StepInputs, StepPlan, SynchronousSteps
from distrijax.schedulers import load_scheduler
from distrijax.weights.models import UNET, Models
from distrijax.weights.sharding import ModelLayout

SMALL = CONVOLUTIONS | {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 1,
    "attention_head_dim": (1, 2),
    "norm_num_groups": 4,
}
SECOND = "second"
LATENTS = (1, 16, 8, 4)
ONE, EIGHT = MeshPlan(1, 1, 1), MeshPlan(1, 2, 4)
SCHEDULER = load_scheduler({"_class_name": "DDIMScheduler"})
STEPS = StepInputs.of(SCHEDULER.schedule(6)[0])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.cache
def unet(seed: int, prefix: str = "") -> UNet:
    """A small UNet of random weights, whose layers have `prefix` before their paths."""
    module = UNet(UNetConfig.from_dict(SMALL), rngs=nnx.Rngs(seed))
    name_layers(module, prefix)
    return module


class Run:
    """A loop of small models on some mesh."""

    def __init__(self, plan: MeshPlan, modules: dict[str, UNet] | None = None, hook=None):
        modules, hook = modules or {UNET: unet(0)}, hook or NoHook()
        layout = Layout(plan.build(jax.devices()[: plan.devices]), True, LATENTS[1:3], levels=2)
        models = Models.of(**{name: ModelLayout.of(module) for name, module in modules.items()})
        self.loop = LoopSpec(layout, models, SCHEDULER, jnp.float32, type(hook))
        self.params = {name: form.fuse_params(modules[name]) for name, form in models.layouts}
        prompt = PromptInputs(normal(2, 1, 7, SMALL["cross_attention_dim"], seed=3))
        conditioning = jax.jit(CONDITION.function, static_argnums=0)((layout, models), self.params, prompt)
        keys = image_keys(jnp.zeros((1, 3), jnp.uint32))
        on, table = OnDevices(Programs("cpu")), SCHEDULER.schedule(6)[0]
        arrays = hook.arrays(on, layout, FromNoise(), table)
        self.inputs = call_inputs(on, layout, conditioning, keys, 3.0, 0.0, arrays)

    def __call__(self, rules, *pieces, state=None, stale=None):
        """Latents and stale state after pieces of steps by these rules."""
        spec = StepsSpec(self.loop, tuple(rules))
        state = SCHEDULER.init(normal(*LATENTS)) if state is None else state
        return jax.jit(steps, static_argnums=0)(spec, self.params, self.inputs, state, stale or {}, pieces)


@dataclasses.dataclass(frozen=True)
class SumOfTwo:
    """The UNet's prediction, and half of a second UNet's, which asks the same exchange."""

    def __call__(self, modules, sample, times, context, exchange, number):
        first, second = (modules[name].predict(sample, times[name], context[name], exchange) for name in (UNET, SECOND))
        return first + 0.5 * second


BOTH = {UNET: unet(0), SECOND: unet(1, "second.")}


def test_a_second_model_adds_to_the_prediction():
    """Against both modules called by themselves, without a mesh."""
    run = Run(ONE, BOTH)
    got, _ = run([SynchronousSteps(SumOfTwo())], STEPS.part(2, 3))
    step = jax.tree.map(lambda column: column[2], STEPS.scheduler)
    outputs = []
    for branch in range(2):
        prompt = normal(2, 1, 7, SMALL["cross_attention_dim"], seed=3)[branch]
        first, second = (
            module(normal(*LATENTS), step.timestep, module.condition(prompt), WholeImage()) for module in BOTH.values()
        )
        outputs.append(first + 0.5 * second)
    negative, text = outputs
    wanted = SCHEDULER.update(SCHEDULER.init(normal(*LATENTS)), negative + 3.0 * (text - negative), step)
    assert relative_error(got.latents, wanted.latents) < 1e-5
    alone, _ = Run(ONE)([SynchronousSteps()], STEPS.part(2, 3))
    assert relative_error(got.latents, alone.latents) > 1e-3


def test_a_second_model_is_displaced_with_the_first():
    strategy = Strategy(Displaced)
    exact = SynchronousSteps(SumOfTwo())
    publishing = SynchronousSteps(SumOfTwo(), strategy.publishing)
    one, _ = Run(ONE, BOTH)([exact], STEPS.part(0, 1))
    eight = Run(EIGHT, BOTH)
    first, stale = eight([publishing], STEPS.part(0, 1))
    assert relative_error(first.latents, one.latents) < 1e-5
    again, fresh = eight([DisplacedSteps(strategy, SumOfTwo())], STEPS.part(0, 1), stale=stale)
    assert relative_error(again.latents, first.latents) < 1e-5
    names = [name for _, name in fresh]
    of_second = [name for name in names if name.startswith("second.")]
    assert {f"second.{name}" for name in names if name not in of_second} == set(of_second)


def test_models_that_share_paths_are_noticed():
    with pytest.raises(KeyError, match="used twice"):
        Run(EIGHT, {UNET: unet(0), SECOND: unet(1)})([SynchronousSteps(SumOfTwo())], STEPS.part(0, 1))


class PinLeftHalf:
    """Puts the left half of the image back after each update."""

    def facts(self):
        return {}

    def arrays(self, on, layout, begin, steps):
        return {"image": on.put(normal(*LATENTS, seed=9), layout.sharding(layout.latents))}

    @staticmethod
    def specs(layout):
        return layout.latents

    @staticmethod
    def update(loop, inputs, state, x):
        left = jnp.arange(state.latents.shape[2]) < state.latents.shape[2] // 2
        return state._replace(latents=jnp.where(left[None, None, :, None], inputs.after_update["image"], state.latents))


def test_a_hook_after_the_update_pins_half_the_image():
    strategy = Strategy(Displaced)
    rules = [SynchronousSteps(publishing=strategy.publishing), DisplacedSteps(strategy)]
    pinned, _ = Run(EIGHT, hook=PinLeftHalf())(rules, STEPS.part(0, 2), STEPS.part(2, 6))
    left, right = np.split(np.asarray(pinned.latents), 2, axis=2)
    np.testing.assert_array_equal(left, normal(*LATENTS, seed=9)[:, :, :4])
    free, _ = Run(EIGHT)(rules, STEPS.part(0, 2), STEPS.part(2, 6))
    assert relative_error(right, np.split(np.asarray(free.latents), 2, axis=2)[1]) > 1e-3
    one, _ = Run(ONE, hook=PinLeftHalf())([SynchronousSteps()], STEPS)
    eight, _ = Run(EIGHT, hook=PinLeftHalf())([SynchronousSteps()], STEPS)
    assert relative_error(eight.latents, one.latents) < 1e-4


REMEMBERED = ("remembered", "deep")


class Remembering(Synchronous):
    """Exact answers; carries the features of the deep part from step to step."""

    deep: jax.Array | None = None

    def finish(self):
        return {REMEMBERED: self.deep}


@dataclasses.dataclass(frozen=True)
class Deep:
    """The UNet from its parts; keeps the features of the deep part, or takes those of the step before."""

    computes: bool

    def __call__(self, modules, sample, times, context, exchange, number):
        parts, asked = modules[UNET], (times[UNET], context[UNET], exchange)
        outer = parts.enter(sample, *asked)
        if self.computes:
            skips = parts.encode(outer, *asked)
            exchange.deep = parts.decode(parts.middle(skips[-1], *asked), skips[1:], *asked)
        return parts.leave(exchange.deep, outer, *asked)


@dataclasses.dataclass(frozen=True)
class DeepSteps:
    """A third kind of step: `Remembering` exchanges, and the predictor `Deep`."""

    computes: bool
    publishes: ClassVar[bool] = True

    @property
    def predictor(self):
        return Deep(self.computes)

    @property
    def reads(self) -> bool:
        return not self.computes

    def exchange(self, layout, stale, x):
        exchange = Remembering(layout.rows, layout.bands)
        exchange.deep = stale.get(REMEMBERED)
        return exchange


FULL, SHALLOW = DeepSteps(True), DeepSteps(False)


def test_a_third_kind_of_step():
    """Steps that remember the deep part: a full one equals a usual one, a shallow one is the outermost layers alone."""
    plain, _ = Run(ONE)([SynchronousSteps()], STEPS.part(0, 2))
    full, stale = Run(ONE)([FULL], STEPS.part(0, 2))
    assert relative_error(full.latents, plain.latents) < 1e-6
    shallow, kept = Run(ONE)([SHALLOW], STEPS.part(2, 4), state=full, stale=stale)
    np.testing.assert_array_equal(kept[REMEMBERED], stale[REMEMBERED])
    exact, _ = Run(ONE)([SynchronousSteps()], STEPS.part(2, 4), state=full)
    assert relative_error(shallow.latents, exact.latents) > 1e-4
    plan = StepPlan(["full", "full", "shallow", "shallow", "full", "shallow"], {"full": FULL, "shallow": SHALLOW})
    pieces = list(plan.pieces(6))
    assert pieces == [(0, 2), (2, 4), (4, 5), (5, 6)]
    rules = [plan.rules[plan.kinds[start]] for start, _ in pieces]
    one, eight = (Run(mesh)(rules, *(STEPS.part(*piece) for piece in pieces))[0].latents for mesh in (ONE, EIGHT))
    assert relative_error(eight, one) < 1e-4


@pytest.mark.parametrize("outer", (1, 2))
def test_the_parts_of_the_unet_make_its_prediction(outer):
    module = UNet(UNetConfig.from_dict(SMALL | {"layers_per_block": 2}), rngs=nnx.Rngs(0))
    conditioning = module.condition(normal(1, 7, SMALL["cross_attention_dim"]))
    times, exchange = module.times(jnp.float32([500]), conditioning, jnp.float32), WholeImage()
    asked = (times, conditioning.context, exchange)
    first = module.enter(normal(*LATENTS), *asked, outer=outer)
    assert len(first) == outer
    skips = module.encode(first, *asked)
    x = module.decode(module.middle(skips[-1], *asked), skips[outer:], *asked)
    got = module.leave(x, first, *asked)
    assert relative_error(got, module.predict(normal(*LATENTS), *asked)) < 1e-6


def test_the_deep_part_runs_at_another_size():
    """The outermost layers at the latents' size; in between the map is half as large, and so are its skips."""
    module = unet(0)
    conditioning = module.condition(normal(1, 7, SMALL["cross_attention_dim"]))
    asked = (module.times(jnp.float32([500]), conditioning, jnp.float32), conditioning.context, WholeImage())
    (outer,) = module.enter(normal(*LATENTS), *asked)

    def resized(x, rows, columns):
        return jax.image.resize(x, (1, rows, columns, x.shape[-1]), "nearest")

    skips = module.encode([resized(outer, 8, 4)], *asked)
    x = module.decode(module.middle(skips[-1], *asked), skips[1:], *asked)
    assert x.shape[1:3] == (8, 4)
    assert module.leave(resized(x, 16, 8), [outer], *asked).shape == LATENTS
