"""A call that is prepared: run dry, it describes what the call on devices runs, and compiles all of it."""

from __future__ import annotations

import dataclasses
import inspect

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import LATENT, PROMPT, SIZE
from facts import refuses
from marks import slow_but

from distrijax import DistriConfig, DistriSDPipeline, DistriSDXLPipeline
from distrijax.parallel.stages import Described, Dry, OnDevices
from distrijax.sampling.begin import put_latents

CALL = SIZE | {"num_inference_steps": 5}


def load(checkpoint, **settings) -> DistriSDXLPipeline:
    pipe = DistriSDXLPipeline.from_pretrained(checkpoint, DistriConfig(**{"warmup_steps": 1} | settings))
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALLS = {
    "chunks": ({"devices": 4}, {"chunk_size": 2, "num_inference_steps": 6}),
    "one program": ({"devices": 4}, {"chunk_size": None}),
    "interrupted": ({"devices": 4, "sync_steps": (3,)}, {"chunk_size": None}),
    "callback, padded": ({"devices": 3}, {"callback_on_step_end": lambda *call: None, "output_type": "latent"}),
    "given noise": ({"devices": 2, "sync_mode": "full_sync"}, {"latents": np.zeros((1, *LATENT), np.float32)}),
}


@pytest.mark.parametrize("case", slow_but(["chunks", "callback, padded"], CALLS))
def test_a_prepared_call_compiles_nothing_more(case, shallow_checkpoint):
    settings, changes = CALLS[case]
    pipe, call = load(shallow_checkpoint, **settings), CALL | changes
    pipe.prepare(**call)
    programs, ran = set(pipe.programs._compiled), set()
    real = pipe.programs.prepare

    def note(*arguments, **others):
        key, begun = real(*arguments, **others)
        ran.add(key)
        return key, begun

    pipe.programs.prepare = note
    pipe(PROMPT, **call)
    assert ran == programs


def test_a_call_that_is_prepared_again_is_not_traced_again(shallow_checkpoint, monkeypatch):
    pipe = load(shallow_checkpoint, devices=2)
    pipe.prepare(**CALL)
    monkeypatch.setattr(Described, "trace", None)
    pipe.prepare(**CALL)


def test_a_hook_of_a_call_is_prepared_and_run(shallow_checkpoint):
    """It pins half of the image, through the pipeline, dry and on devices."""
    pipe, pinned = load(shallow_checkpoint, devices=4), np.full((1, *LATENT), 0.5, np.float32)
    request = pipe._read(pipe.call_type.of(PROMPT, **CALL, output_type="latent"))._replace(after_update=PinTop(pinned))
    pipe._run(Dry(pipe.programs), request, pipe._plan(request), pipe._unwatched)
    count = pipe.programs.count
    latents = np.asarray(pipe._generate(request).images)
    assert pipe.programs.count == count
    rows = LATENT[1] // 2
    np.testing.assert_array_equal(latents[:, :, :rows], pinned[:, :, :rows])
    assert np.abs(latents[:, :, rows:] - 0.5).min(initial=1) > 0


@dataclasses.dataclass(frozen=True, eq=False)
class PinTop:
    """Puts the upper half of the image back after each update."""

    image: np.ndarray

    def facts(self):
        return {"image": self.image}

    def arrays(self, on, layout, begin, steps):
        upper = np.zeros_like(self.image)
        upper[:, :, : self.image.shape[2] // 2] = 1
        return put_latents(on, layout, self.image), put_latents(on, layout, upper)

    @staticmethod
    def specs(layout):
        return layout.latents

    @staticmethod
    def update(loop, inputs, state, x):
        image, upper = inputs.after_update
        return state._replace(latents=jnp.where(upper > 0, image, state.latents))


def test_a_dry_call_describes_the_arrays_of_the_call(shallow_checkpoint, monkeypatch):
    """Shapes, dtypes and shardings of all that stages hand to each other."""
    pipe, seen = load(shallow_checkpoint, devices=4), {}

    def noted(kind):
        run = kind.run

        def note(self, stage, static, params, *arguments):
            seen.setdefault(kind, []).append((stage.name, jax.tree.map(described, arguments)))
            return run(self, stage, static, params, *arguments)

        return note

    def described(leaf):
        return leaf.shape, leaf.dtype, leaf.sharding.shard_shape(leaf.shape), leaf.sharding.mesh

    for kind in (Dry, OnDevices):
        monkeypatch.setattr(kind, "run", noted(kind))
    pipe.prepare(PROMPT, **CALL)
    pipe(PROMPT, **CALL)
    assert seen[Dry] == seen[OnDevices]
    assert {name for name, _ in seen[Dry]} == {"encode_text", "begin", "condition", "steps", "decode"}


def test_what_a_call_refuses_preparing_refuses(shallow_checkpoint):
    pipe = load(shallow_checkpoint, devices=2)
    count = pipe.programs.count
    with refuses("heigth", "height"):
        pipe.prepare(heigth=64)
    with refuses("height", "65"):
        pipe.prepare(height=65)
    with refuses("seed", "2"):
        pipe.prepare(seed=[1, 2])
    assert pipe.programs.count == count


OTHER_IN_DIFFUSERS = {"seed", "chunk_size", "large", "scheduler", "callback_on_step_end", "output_type"}


@pytest.mark.parametrize(
    ("kind", "oracle"),
    [
        (DistriSDPipeline, diffusers.StableDiffusionPipeline),
        (DistriSDXLPipeline, diffusers.StableDiffusionXLPipeline),
    ],
)
def test_the_calls_signature_is_diffusers(kind, oracle):
    ours, theirs = (inspect.signature(each.__call__).parameters for each in (kind, oracle))
    fields = {field.name: field.default for field in dataclasses.fields(kind.call_type)}
    assert {name: each.default for name, each in ours.items() if name != "self"} == fields
    for name, default in fields.items():
        assert f"{name}: " in kind.__call__.__doc__
        if name not in OTHER_IN_DIFFUSERS:
            assert name in theirs
            wanted = theirs[name].default
            assert default == (1 if name == "num_images_per_prompt" and wanted is None else wanted), name


def test_positional_arguments_are_the_prompts(shallow_checkpoint):
    call = DistriSDXLPipeline.call_type.of("one", "two", height=64)
    assert DistriSDXLPipeline.call_type.of(call) is call
    assert (call.prompt, call.prompt_2, call.height) == ("one", "two", 64)
    with refuses("3", "prompt"):
        DistriSDXLPipeline.call_type.of("one", "two", 64)
    with refuses("prompt", "twice"):
        DistriSDXLPipeline.call_type.of("one", prompt="two")
