"""What must hold in every mode and parallelism, whatever else they do: one test for each invariant and setting it applies to.

Small random weights, in a UNet of two levels, for each setting compiles programs of its own. More levels: test_any_size.py has
synchronous steps on uneven bands, tests/models/test_unet.py a displaced step, and tests/parallel/test_exchange.py the exchanges of
every mode. The embedded model's trained weights are in test_default_model.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from calls import PROMPT, generated, trajectory
from marks import slow
from oracle import relative_error
from tiny_pipeline import load_torch_pipeline

from distrijax import Compression, DistriConfig, DistriSDXLPipeline, Parallelism, SplitScheme, SyncMode
from distrijax.config import StepKind
from distrijax.parallel.displaced import STRATEGIES, SeparateGN
from distrijax.parallel.layout import Layout
from distrijax.parallel.mesh import MeshPlan, plan_mesh
from distrijax.sampling.denoise import StepsSpec, run_steps
from distrijax.sampling.noise import draw_latents
from distrijax.sampling.steps import plan_steps

IMAGE = {"height": 136, "width": 64, "num_inference_steps": 4}
CALL = IMAGE | {"num_images_per_prompt": 2}
ROWS_COLUMNS = (17, 8)  # of the latent: no number of devices divides its rows
WARM_UP = 1

OURS = {"sync_mode": SyncMode.DAMPED_ASYNC_GN, "extrapolate": True}
PATCH = {mode.value: {"sync_mode": mode} for mode in SyncMode}
PATCH |= {"extrapolated": OURS, **{f"extrapolated and {kind}": OURS | {"compress": kind} for kind in Compression}}
NAIVE = {f"naive {scheme}": {"parallelism": Parallelism.NAIVE_PATCH, "split_scheme": scheme} for scheme in SplitScheme}
TENSOR = {"tensor": {"parallelism": Parallelism.TENSOR}}
EVERY = PATCH | NAIVE | TENSOR
EXACT = {name: EVERY[name] for name in ("full_sync", "tensor")}
DISPLACED = {name: PATCH[name] for name in PATCH if name != "full_sync"}
# by definition the moments of the others never come in: the synchronous answer is not their fixed point
POOLED = {name: it for name, it in DISPLACED.items() if not issubclass(STRATEGIES[it["sync_mode"]], SeparateGN)}

SOME = {name: DISPLACED[name] for name in ("corrected_async_gn", "extrapolated and int4")}
DEFAULT = {name: DISPLACED[name] for name in ("corrected_async_gn",)}

ROUNDED = {None: 1e-5, Compression.INT8: 2e-3, Compression.INT4: 2e-3 * 255 / 15}
"""How near its fixed point an exchange comes: the fewer the levels of what it rounds, the less."""

MESHES = {
    "one device": {"devices": 1},
    "3 patches": {"devices": 3},
    "2 x 4": {"devices": 8},  # the last of four patches is nothing but padding
    "2 x 2 x 2": {"devices": 8, "data": 2},
}


class Case(NamedTuple):
    """A setting and a mesh; `pipe` gives the pipeline of settings, and `exact` the trajectory of synchronous steps on a mesh."""

    setting: dict
    mesh: str
    pipe: Callable[..., DistriSDXLPipeline]
    exact: Callable[[str], list[np.ndarray]]

    @property
    def own(self) -> DistriSDXLPipeline:
        return self.pipe(**self.setting, **MESHES[self.mesh])


def one_device_is_torch_diffusers(case: Case, request) -> None:
    noise, wanted = request.getfixturevalue("torch_latents")
    got = generated(case.own, **IMAGE, guidance_scale=5.0, latents=noise)
    assert relative_error(got, wanted) < 1e-3


def one_device_runs_the_synchronous_program(case: Case, request) -> None:
    """Whatever the mode: what `one_device_is_torch_diffusers` says of full_sync then holds of every mode."""
    plan = MeshPlan(1, 1, 1).build(jax.devices()[:1])
    config = DistriConfig(**case.setting, **MESHES[case.mesh], warmup_steps=WARM_UP)
    layout = Layout(plan, guided=True, latent=ROWS_COLUMNS)
    mode, exact = (
        plan_steps(each, layout, IMAGE["num_inference_steps"]) for each in (config, DistriConfig(sync_mode="full_sync"))
    )
    assert mode == exact


def many_devices_equal_one(case: Case, request) -> None:
    assert relative_error(generated(case.own, **CALL), case.exact("one device")[-1]) < 1e-4


def the_synchronous_answer_is_a_fixed_point(case: Case, request) -> None:
    """A displaced step that sees what the step before saw answers as that did."""
    pipe, seen = case.own, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe, "_denoise", lambda *arguments: seen.append(arguments) or arguments[4])
        generated(pipe, **CALL)
    ((on, loop, plan, inputs, state, xs, *_),) = seen

    def step(kind, stale):
        """How far the programs of the call itself, which may overwrite the state, move the latents."""
        begun, spec = jax.tree.map(jnp.copy, state), StepsSpec(loop, (plan.rules[kind],))
        after, stale = run_steps(on, spec, pipe._params, inputs, begun, stale, (xs.part(0, 1),))
        return np.asarray(after.latents - state.latents)[:, : ROWS_COLUMNS[0]], stale

    wanted, stale = step(StepKind.SYNCHRONOUS, {})
    got, _ = step(StepKind.DISPLACED, stale)
    assert relative_error(got, wanted) < ROUNDED[plan.rules[StepKind.DISPLACED].strategy.compress]
    count = pipe.programs.count
    generated(pipe, **CALL)
    assert pipe.programs.count == count  # these were its programs


def first_steps_are_synchronous(case: Case, request) -> None:
    errors = [relative_error(*both) for both in zip(trajectory(case.own, **CALL), case.exact(case.mesh), strict=True)]
    assert max(errors[: WARM_UP + 1]) < 1e-6
    assert min(errors[WARM_UP + 1 :]) > 1e-5


def the_same_seed_gives_the_same_bits(case: Case, request) -> None:
    np.testing.assert_array_equal(generated(case.own, **CALL), generated(case.own, **CALL))


def the_same_seed_gives_the_same_noise_as_on_one_device(case: Case, request) -> None:
    keys = jax.random.split(jax.random.key(0), 2)

    def noise(**settings):
        config = DistriConfig(**settings)
        mesh = plan_mesh(config, config.devices, branches=2).build(jax.devices()[: config.devices])
        cut = {"parallelism": config.parallelism, "split_scheme": config.split_scheme}
        layout = Layout(mesh, guided=True, latent=ROWS_COLUMNS, levels=3, **cut)
        return np.asarray(jax.jit(lambda keys: draw_latents(layout, 4, keys))(keys))[
            :, : ROWS_COLUMNS[0], : ROWS_COLUMNS[1]
        ]

    np.testing.assert_array_equal(noise(**case.setting, **MESHES[case.mesh]), noise(devices=1))


APPLIES = {
    one_device_is_torch_diffusers: (EXACT | NAIVE, ["one device"]),
    one_device_runs_the_synchronous_program: (DISPLACED, ["one device"]),
    many_devices_equal_one: (EXACT, ["3 patches", "2 x 4", "2 x 2 x 2"]),
    the_synchronous_answer_is_a_fixed_point: (POOLED, ["2 x 4"]),
    first_steps_are_synchronous: (DISPLACED, ["2 x 4"]),
    the_same_seed_gives_the_same_noise_as_on_one_device: (EXACT | NAIVE, ["2 x 4", "2 x 2 x 2"]),
    the_same_seed_gives_the_same_bits: (EVERY, ["2 x 4"]),
}
IMAGES_APART = {
    first_steps_are_synchronous: (SOME, ["2 x 2 x 2"]),
    the_same_seed_gives_the_same_bits: (SOME | EXACT, ["2 x 2 x 2"]),
}
"""Different images on different devices: how rows are exchanged does not depend on them."""
BRANCHES_TOGETHER = {
    the_synchronous_answer_is_a_fixed_point: (DEFAULT, ["3 patches"]),
    first_steps_are_synchronous: (DEFAULT, ["3 patches"]),
}
"""Both guidance branches on each device: they are images of a batch to the exchanges."""
QUICK = [("full_sync", "one device"), ("full_sync", "2 x 4"), ("extrapolated and int4", "2 x 4")]


@pytest.fixture(scope="module")
def pipe(shallow_checkpoint):
    """A pipeline by its configuration; tests of one follow each other, so that few are kept."""

    @functools.lru_cache(2)
    def load(**settings) -> DistriSDXLPipeline:
        config = DistriConfig(**{"warmup_steps": WARM_UP} | settings)
        pipe = DistriSDXLPipeline.from_pretrained(shallow_checkpoint, config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture(scope="module")
def exact(pipe):
    return functools.cache(lambda mesh: trajectory(pipe(**MESHES[mesh], sync_mode=SyncMode.FULL_SYNC), **CALL))


@pytest.fixture(scope="module")
def torch_latents(shallow_checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """Starting noise, and what torch diffusers makes of it."""
    noise = torch.randn(1, 4, *ROWS_COLUMNS)
    call = IMAGE | {"latents": noise.clone(), "output_type": "latent"}
    return noise.numpy(), load_torch_pipeline(shallow_checkpoint)(PROMPT, **call).images.numpy()


def cases() -> Iterator:
    """Setting by setting, for the sake of `pipe`."""
    found = [
        (name, mesh, invariant)
        for applies in (APPLIES, IMAGES_APART, BRANCHES_TOGETHER)
        for invariant, (settings, meshes) in applies.items()
        for name in settings
        for mesh in meshes
    ]
    for name, mesh, invariant in sorted(
        found, key=lambda case: (list(EVERY).index(case[0]), list(MESHES).index(case[1]))
    ):
        marks = [] if (name, mesh) in QUICK else [slow]
        yield pytest.param(invariant, EVERY[name], mesh, marks=marks, id=f"{invariant.__name__}-{name}-{mesh}")


@pytest.mark.parametrize(("invariant", "setting", "mesh"), list(cases()))
def test_invariant_holds(invariant, setting, mesh, pipe, exact, request):
    invariant(Case(setting, mesh, pipe, exact), request)
