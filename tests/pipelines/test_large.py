"""Images larger than the model was trained for: early steps whose deep part runs on a smaller map."""

from __future__ import annotations

import functools

import pytest
import torch
from calls import PROMPT, generated
from facts import refuses, warns
from marks import slow, slow_but
from oracle import relative_error
from tiny_pipeline import load_torch_pipeline
from torch.nn.functional import interpolate

from distrijax import DistriConfig, DistriSDXLPipeline
from distrijax.config import StepKind
from distrijax.parallel.layout import Layout
from distrijax.parallel.mesh import MeshPlan
from distrijax.sampling.large import deep_sizes, read_large
from distrijax.sampling.steps import SizedKind, plan_steps

CALL = {"height": 256, "width": 192, "num_inference_steps": 6, "large": [(700, 0.25), (300, 0.5)]}
"""The small model is trained for 128 x 128 pixels, so at most 1.6 times that is left as it is."""
ODD = CALL | {"height": 264, "width": 200, "large": [(600, 0.4)]}


@pytest.fixture(scope="module")
def pipe_on(shallow_checkpoint):
    @functools.lru_cache(2)
    def load(**settings) -> DistriSDXLPipeline:
        pipe = DistriSDXLPipeline.from_pretrained(shallow_checkpoint, DistriConfig(**{"warmup_steps": 0} | settings))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture(scope="module")
def one(pipe_on):
    return functools.cache(lambda odd: generated(pipe_on(devices=1), **(ODD if odd else CALL)))


def shrunk_in_torch(pipe, patch, schedule):
    """Lets a torch UNet resize its map after conv_in, and back where a skip of another size joins."""
    factor, cat, forward = None, torch.cat, pipe.unet.forward

    def resized(x, size):
        return x if x.shape[2:] == size else interpolate(x, size=size, mode="bicubic", align_corners=False)

    def shrink(module, args, kwargs):
        x = kwargs["hidden_states"]
        return args, kwargs | {"hidden_states": resized(x, torch.Size(round(s * (factor or 1)) for s in x.shape[2:]))}

    def join(tensors, dim=0, **others):
        tensors = list(tensors)
        if dim == 1 and len(tensors) == 2 and tensors[0].ndim == 4:
            tensors[0] = resized(tensors[0], tensors[1].shape[2:])
        return cat(tensors, dim=dim, **others)

    def call(sample, timestep, *args, **kwargs):
        nonlocal factor
        factor = next((each for above, each in schedule if float(timestep) > above), None)
        return forward(sample, timestep, *args, **kwargs)

    patch.setattr(torch, "cat", join)
    patch.setattr(pipe.unet, "forward", call)
    pipe.unet.down_blocks[0].register_forward_pre_hook(shrink, with_kwargs=True)


def test_one_device_equals_torch_diffusers_with_two_resizes(pipe_on, shallow_checkpoint, monkeypatch):
    theirs, noise = load_torch_pipeline(shallow_checkpoint), torch.randn(1, 4, 32, 24)
    call = {name: value for name, value in CALL.items() if name != "large"}
    shrunk_in_torch(theirs, monkeypatch, CALL["large"])
    wanted = theirs(PROMPT, **call, latents=noise.clone(), output_type="latent").images
    got = generated(pipe_on(devices=1), **CALL, latents=noise.numpy())
    assert relative_error(got, wanted) < 1e-3
    other = generated(pipe_on(devices=1), **CALL | {"large": [(700, 0.25)]}, latents=noise.numpy())
    assert relative_error(other, wanted) > 1e-3


MESHES = {
    "2 x 4": ({"devices": 8}, False),
    "3 patches, odd": ({"devices": 3}, True),
    "8 patches, odd": ({"devices": 8, "split_batch": False}, True),
    "tensor": ({"devices": 2, "parallelism": "tensor", "split_batch": False}, False),
}


@pytest.mark.parametrize("mesh", slow_but(["2 x 4"], MESHES))
def test_many_devices_equal_one(mesh, pipe_on, one):
    settings, odd = MESHES[mesh]
    exact = {} if "parallelism" in settings else {"sync_mode": "full_sync"}
    assert relative_error(generated(pipe_on(**settings, **exact), **(ODD if odd else CALL)), one(odd)) < 1e-4


@slow
def test_displaced_steps_are_near_and_the_same_in_chunks_and_as_one_program(pipe_on, one):
    """Each size begins with a synchronous step, which makes the stale state of that size."""
    pipe = pipe_on(devices=8, extrapolate=True, compress="int8")
    got = generated(pipe, **CALL)
    assert 1e-4 < relative_error(got, one(False)) < 1
    assert relative_error(generated(pipe, **CALL, chunk_size=None), got) < 1e-5


def layout(rows: int, columns: int, patches: int = 4) -> Layout:
    return Layout(MeshPlan(1, 1, patches).abstract(), True, (rows, columns), levels=3)


def test_each_size_begins_with_a_synchronous_step():
    sizes = [(8, 8)] * 4 + [(16, 16)] * 2 + [None] * 3
    plan = plan_steps(DistriConfig(devices=4, warmup_steps=1), layout(32, 32), 9, sizes)
    small = [SizedKind(kind, (8, 8)) for kind in [StepKind.SYNCHRONOUS] * 2 + [StepKind.DISPLACED] * 2]
    middle = [SizedKind(kind, (16, 16)) for kind in (StepKind.SYNCHRONOUS, StepKind.DISPLACED)]
    assert plan.kinds == small + middle + [StepKind.SYNCHRONOUS, StepKind.DISPLACED, StepKind.DISPLACED]
    assert [rule.reads for rule in plan.rules.values()] == [False, True] * 3


@pytest.mark.parametrize(
    ("latent", "wanted"),
    [
        ((32, 32), []),
        ((40, 40), []),
        ((64, 64), [(350, (32, 32))]),
        ((128, 128), [(350, (32, 32)), (200, (64, 64))]),
        ((64, 128), [(350, (24, 44)), (200, (44, 92))]),
    ],
)
def test_auto_shrinks_to_the_trained_area(latent, wanted):
    got = read_large("auto", layout(*latent), (32, 32))
    assert list(got) == wanted
    for _, (rows, columns) in got[:1]:
        assert 0.8 < rows * columns / 32**2 < 1.2


def test_sizes_follow_the_timesteps():
    shrinking = [(350.0, (8, 8)), (200.0, (16, 16))]
    assert deep_sizes(shrinking, [999, 351, 350, 201, 200, 0]) == [(8, 8), (8, 8), (16, 16), (16, 16), None, None]
    assert deep_sizes((), [999, 0]) == [None, None]


@pytest.mark.parametrize("value", ["on", [], [(350,)], [(350, 1.5)], [(-1, 0.5)], 7, [(350, "half")]])
def test_other_values_are_refused(value):
    with refuses("large"):
        DistriSDXLPipeline.call_type.of(PROMPT, large=value)


def test_large_images_are_warned_of_once(pipe_on):
    pipe = pipe_on(devices=1)
    pipe._warned_of_size = False
    with warns("128x128", "3.0", "large='auto'"):
        generated(pipe, **CALL | {"large": "off", "num_inference_steps": 1})
    generated(pipe, **CALL | {"large": "off", "num_inference_steps": 1})
