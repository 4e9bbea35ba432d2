"""What must hold in every mode and parallelism, whatever else they do: one test for each invariant and setting it applies to.

Small random weights; the embedded model's trained ones have tests of their own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch
from oracle import relative_error
from test_denoise import Seen, Still

from distrijax import Compression, DistriConfig, DistriSDXLPipeline, Parallelism, SplitScheme, SyncMode
from distrijax.parallel.displaced import STRATEGIES, SeparateGN
from distrijax.sampling import denoise
from distrijax.sampling.noise import draw_latents

PROMPT = "a red circle on the left"
SIZE = {"height": 136, "width": 64}  # 17 rows of the latent: no number of devices divides them
WARM_UP = 1
STEPS = 4

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

ROUNDED = {None: 1e-5, Compression.INT8: 2e-3, Compression.INT4: 2e-3 * 255 / 15}
"""How near its fixed point an exchange comes: the fewer the levels of what it rounds, the less."""

MESHES = {"one device": {"devices": 1}, "3 patches": {"devices": 3}, "2 x 2 x 2": {"devices": 8, "data": 2}}


class Case(NamedTuple):
    """A setting on a mesh, and how to paint with it."""

    settings: dict
    pipe: Callable[..., DistriSDXLPipeline]

    def paint(self, **call) -> np.ndarray:
        """Latents of two images, unless `call` says otherwise."""
        return latents(self.pipe(**self.settings), **call)


def latents(pipe: DistriSDXLPipeline, prompt: str = PROMPT, **changes) -> np.ndarray:
    call = SIZE | {"num_inference_steps": STEPS, "num_images_per_prompt": 2, "output_type": "latent"} | changes
    return np.asarray(pipe(prompt, **call).images)


def trajectory(pipe: DistriSDXLPipeline) -> list[np.ndarray]:
    seen = []
    latents(pipe, callback_on_step_end=lambda *arguments: seen.append(np.asarray(arguments[3]["latents"])))
    return seen


def one_device_is_torch_diffusers(case: Case, request) -> None:
    noise, wanted = request.getfixturevalue("torch_latents")
    got = case.paint(num_images_per_prompt=1, guidance_scale=5.0, latents=noise)
    assert relative_error(got, wanted) < 1e-3


def many_devices_equal_one(case: Case, request) -> None:
    assert relative_error(case.paint(), latents(case.pipe(devices=1))) < 1e-4


def the_synchronous_answer_is_a_fixed_point(case: Case, request) -> None:
    """A displaced step that sees what the step before saw answers as that did."""
    pipe, seen = case.pipe(**case.settings), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe, "_denoise", lambda *arguments: seen.append(arguments) or arguments[2])
        latents(pipe)
    ((loop, inputs, state, xs, *_),) = seen
    loop = dataclasses.replace(loop, scheduler=Still())
    once = jax.tree.map(lambda column: column[:1], xs)

    def run(function, *arguments):
        state, stale = jax.jit(function, static_argnums=0)(loop, pipe._unet.params, inputs, *arguments, once)
        return np.asarray(state.output)[:, : SIZE["height"] // 8], stale

    blank = Seen(state.latents, 0 * state.latents)
    wanted, stale = run(denoise.warm_up, blank)
    got, _ = run(denoise.displaced, blank, stale)
    assert relative_error(got, wanted) < ROUNDED[loop.strategy.compress]


def first_steps_are_synchronous(case: Case, request) -> None:
    exact = case.pipe(**MESHES["2 x 2 x 2"] | {"sync_mode": "full_sync"})
    got, wanted = trajectory(case.pipe(**case.settings)), trajectory(exact)
    errors = [relative_error(*both) for both in zip(got, wanted, strict=True)]
    assert max(errors[: WARM_UP + 1]) < 1e-6
    assert min(errors[WARM_UP + 1 :]) > 1e-5


def the_same_seed_gives_the_same_noise_and_the_same_bits(case: Case, request) -> None:
    np.testing.assert_array_equal(case.paint(), case.paint())
    layout = functools.partial(denoise.Layout, guided=True, latent=(17, 8), levels=3)
    pipe, keys = case.pipe(**case.settings), jax.random.split(jax.random.key(0), 2)

    def noise(pipe):
        parallelism, scheme = pipe.config.parallelism, pipe.config.split_scheme
        whole = layout(pipe.mesh, parallelism=parallelism, split_scheme=scheme)
        return np.asarray(jax.jit(lambda keys: draw_latents(whole, 4, keys))(keys))[:, :17, :8]

    np.testing.assert_array_equal(noise(pipe), noise(case.pipe(devices=1)))


APPLIES = {
    one_device_is_torch_diffusers: (EVERY, ["one device"]),
    many_devices_equal_one: (EXACT, ["3 patches", "2 x 2 x 2"]),
    the_synchronous_answer_is_a_fixed_point: (POOLED, ["3 patches"]),
    first_steps_are_synchronous: (DISPLACED, ["2 x 2 x 2"]),
    the_same_seed_gives_the_same_noise_and_the_same_bits: (EVERY, ["2 x 2 x 2"]),
}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    """A pipeline by its configuration."""

    @functools.cache
    def load(**settings) -> DistriSDXLPipeline:
        config = DistriConfig(**{"warmup_steps": WARM_UP} | settings)
        pipe = DistriSDXLPipeline.from_pretrained(tiny_checkpoint, config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture(scope="module")
def torch_latents(torch_pipe) -> tuple[np.ndarray, np.ndarray]:
    """Starting noise, and what torch diffusers makes of it."""
    noise = torch.randn(1, 4, 17, 8)
    call = SIZE | {"num_inference_steps": STEPS, "latents": noise.clone(), "output_type": "latent"}
    return noise.numpy(), torch_pipe(PROMPT, **call).images.numpy()


def cases() -> Iterator:
    for invariant, (settings, meshes) in APPLIES.items():
        for name, setting in settings.items():
            for mesh in meshes:
                yield pytest.param(invariant, setting | MESHES[mesh], id=f"{invariant.__name__}-{name}-{mesh}")


@pytest.mark.parametrize(("invariant", "settings"), list(cases()))
def test_invariant_holds(invariant, settings, pipe, request):
    invariant(Case(settings, pipe), request)
