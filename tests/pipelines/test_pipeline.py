"""The pipeline against torch diffusers on one device, many devices against one, and what a call promises.

Pipelines are made once for each mesh and share what they have compiled; so nearly all calls have one size.
"""

from __future__ import annotations

import functools

import calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from calls import LATENT, OTHER, PROMPT, SIZE, generated, trajectory
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from facts import refuses, warns
from marks import slow, slow_but
from oracle import psnr, relative_error
from PIL import Image
from tiny_pipeline import TEXT_WIDTH, load_torch_pipeline

from distrijax import DistriConfig, DistriSDXLPipeline, DistriWarning
from distrijax.sampling.begin import BEGIN
from distrijax.sampling.denoise import STEPS
from distrijax.sampling.steps import SynchronousSteps
from distrijax.schedulers import with_class

EMBEDDINGS = {
    "prompt_embeds": np.zeros((1, 154, 2 * TEXT_WIDTH), np.float32),
    "pooled_prompt_embeds": np.zeros((1, TEXT_WIDTH), np.float32),
}
"""Of a prompt of twice the usual length."""


@pytest.fixture(scope="module")
def pipe_on(shallow_checkpoint):
    """A pipeline by its configuration: pipe_on(devices=4, split_batch=False). The last ones are kept, and the fixtures below."""

    @functools.lru_cache(2)
    def load(**settings) -> DistriSDXLPipeline:
        pipe = DistriSDXLPipeline.from_pretrained(shallow_checkpoint, DistriConfig(**settings))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture(scope="module")
def torch_pipe(shallow_checkpoint):
    """The same checkpoint in torch diffusers."""
    return load_torch_pipeline(shallow_checkpoint)


@pytest.fixture(scope="module")
def one(pipe_on):
    """One device."""
    return pipe_on(devices=1, sync_mode="full_sync")


@pytest.fixture(scope="module")
def stale(pipe_on):
    """Two branches of two bands, displaced after two exact steps."""
    return pipe_on(devices=4, warmup_steps=1)


@pytest.fixture(scope="module")
def exact(pipe_on):
    """On the mesh of `stale`, every step synchronous."""
    return pipe_on(devices=4, sync_mode="full_sync")


ORACLES = {
    "euler": (
        EulerDiscreteScheduler,
        {
            "negative_prompt": "a blue square",
            "negative_prompt_2": "",
            "original_size": (512, 300),
            "crops_coords_top_left": (16, 8),
            "target_size": (240, 80),
        },
    ),
    "ddim": (
        DDIMScheduler,
        {
            "guidance_scale": 7.5,
            "guidance_rescale": 0.7,
            "negative_original_size": (128, 100),
            "negative_crops_coords_top_left": (4, 2),
            "negative_target_size": (200, 50),
        },
    ),
    "dpm++2m": (
        DPMSolverMultistepScheduler,
        {"prompt_2": OTHER, "negative_prompt": "", "negative_prompt_2": "a circle", "clip_skip": 1},
    ),
    "euler-karras": (EulerDiscreteScheduler, {"prompt_2": "", "guidance_scale": 1.0, "num_inference_steps": 5}),
}


@pytest.mark.parametrize("scheduler", slow_but(["euler"], ORACLES))
def test_one_device_equals_torch_diffusers(monkeypatch, one, torch_pipe, scheduler):
    kind, settings = ORACLES[scheduler]
    options = {"use_karras_sigmas": True} if "karras" in scheduler else {}
    monkeypatch.setattr(torch_pipe, "scheduler", kind.from_config(torch_pipe.scheduler.config, **options))
    monkeypatch.setattr(one, "scheduler", with_class(one.scheduler, scheduler))
    noise = torch.randn(1, *LATENT)

    def wanted(output_type):
        defaults = SIZE | {"num_inference_steps": 4, "latents": noise.clone()}
        return torch_pipe(PROMPT, **defaults | settings, output_type=output_type).images

    assert relative_error(generated(one, latents=noise.numpy(), **settings), wanted("latent")) < 1e-3
    assert psnr(generated(one, kind="np", latents=noise.numpy(), **settings), wanted("np")) > 50


def test_embeddings_of_torch_diffusers_take_the_place_of_prompts(one, torch_pipe):
    with torch.no_grad():
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        given = dict(zip(names, torch_pipe.encode_prompt(PROMPT, negative_prompt=OTHER), strict=True))
    got = generated(one, None, **{name: value.numpy() for name, value in given.items()})
    assert relative_error(got, generated(one, negative_prompt=OTHER)) < 1e-4
    held = {name: value.bfloat16().requires_grad_() for name, value in given.items()}
    assert relative_error(generated(one, None, **held), got) < 0.1


def test_what_encode_prompt_returns_takes_the_place_of_prompts(one, torch_pipe):
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    got = one.encode_prompt(PROMPT, negative_prompt=OTHER)
    with torch.no_grad():
        for ours, theirs in zip(got, torch_pipe.encode_prompt(PROMPT, negative_prompt=OTHER), strict=True):
            assert relative_error(ours, theirs.numpy()) < 1e-4
    given = generated(one, None, **dict(zip(names, got, strict=True)))
    np.testing.assert_array_equal(given, generated(one, negative_prompt=OTHER))


@pytest.mark.parametrize("devices", slow_but([1], [1, 3, 4]))
def test_latents_are_decoded_to_the_image_of_the_call(pipe_on, one, stale, devices):
    pipe = {1: one, 4: stale}.get(devices) or pipe_on(devices=devices)
    call = {"height": 72, "width": 64, "num_inference_steps": 2}
    latents, wanted = (pipe(PROMPT, **call, output_type=kind).images for kind in ("latent", "np"))
    assert np.abs(pipe.decode(latents, output_type="np").images - wanted).max() < 1e-5
    assert pipe.decode(latents).images[0].size == (64, 72)
    with refuses("latents", "[4, 9, 8]", "[images, 4, rows, columns]"):
        pipe.decode(latents[0])


def test_missing_negative_prompt_is_zeros_and_not_the_empty_prompt(one):
    assert relative_error(generated(one), generated(one, negative_prompt="")) > 1e-3


@pytest.mark.parametrize(
    "given",
    [
        {"negative_original_size": (128, 100)},
        {"negative_crops_coords_top_left": (4, 2), "negative_target_size": (200, 50)},
    ],
)
def test_negative_sizes_without_both_change_nothing_and_are_told(one, given):
    with warns(", ".join(given), "negative_original_size", "negative_target_size") as caught:
        got = generated(one, num_inference_steps=1, **given)
    assert [warning.filename for warning in caught] == [calls.__file__]  # where the pipeline is called
    np.testing.assert_array_equal(got, generated(one, num_inference_steps=1))
    generated(
        one, num_inference_steps=1, guidance_scale=1.0, **given
    )  # warnings are errors: no word of what no branch would use


@slow
@pytest.mark.parametrize(
    "settings",
    [{"devices": 2}, {"devices": 8}, {"devices": 8, "split_batch": False}],
    ids=str,
)
def test_full_sync_equals_one_device(pipe_on, one, settings):
    many = pipe_on(**settings, sync_mode="full_sync")
    assert relative_error(generated(many), generated(one)) < 1e-4
    assert relative_error(generated(many, kind="np"), generated(one, kind="np")) < 1e-4


@slow
def test_two_patches_for_each_branch_equal_one_device(exact, one):
    assert relative_error(generated(exact), generated(one)) < 1e-4
    assert relative_error(generated(exact, kind="np"), generated(one, kind="np")) < 1e-4


@slow
def test_without_guidance_both_halves_of_the_mesh_share_the_rows(exact, one):
    got = exact(PROMPT, **SIZE, num_inference_steps=4, guidance_scale=1.0, output_type="latent").images
    assert {shard.data.shape for shard in got.addressable_shards} == {(1, 4, 8, 8)}
    assert relative_error(got, generated(one, guidance_scale=1.0)) < 1e-4


def test_devices_that_repeat_the_work_of_others_are_told(pipe_on):
    with refuses(
        "devices", "split_batch=False", error=DistriWarning
    ):  # warnings are errors here: before anything is compiled
        generated(pipe_on(devices=2, parallelism="tensor"), guidance_scale=1.0, num_inference_steps=1)


@slow
def test_guidance_of_one_or_less_runs_the_text_branch_alone(one):
    np.testing.assert_array_equal(generated(one, guidance_scale=1.0), generated(one, guidance_scale=0.0))
    np.testing.assert_array_equal(
        generated(one, guidance_scale=1.0), generated(one, guidance_scale=1.0, negative_prompt=OTHER)
    )


@pytest.fixture(scope="module")
def pair(one):
    """Two prompts with a seed each, as a batch on one device."""
    return generated(one, [PROMPT, OTHER], seed=[3, 4])


@slow
def test_images_of_a_batch_are_those_of_single_calls(one, pair):
    assert pair.shape == (2, *LATENT)
    for i, (prompt, seed) in enumerate([(PROMPT, 3), (OTHER, 4)]):
        assert relative_error(pair[i : i + 1], generated(one, prompt, seed=seed)) < 1e-4


@slow
def test_prompts_on_different_devices_are_those_of_a_batch(pipe_on, pair):
    many = pipe_on(devices=4, data=2, sync_mode="full_sync")
    assert relative_error(generated(many, [PROMPT, OTHER], seed=[3, 4]), pair) < 1e-4
    with refuses(1, "data=2", 2):
        generated(many, PROMPT)


@slow
def test_images_of_one_prompt_differ_and_the_first_is_that_of_a_single_call(one):
    got = generated(one, num_images_per_prompt=2, seed=7)
    assert relative_error(got[:1], generated(one, seed=7)) < 1e-4
    assert relative_error(got[1], got[0]) > 0.1
    assert relative_error(got, generated(one, [PROMPT, PROMPT], seed=7)) < 1e-5


def test_seeds_draw_different_noise(one):
    assert relative_error(generated(one, seed=1 + 2**32), generated(one, seed=1)) > 0.1
    assert relative_error(generated(one, seed=1), generated(one, seed=2)) > 0.1
    np.testing.assert_array_equal(generated(one, seed=[1]), generated(one, seed=1))


def test_the_guidance_scale_may_be_an_array_without_dimensions(one):
    np.testing.assert_array_equal(generated(one, guidance_scale=jnp.float32(3)), generated(one, guidance_scale=3.0))


@slow
def test_further_synchronous_steps_are_exact(pipe_on, one):
    """Step 3 from where step 2 went, and the last one, are one device's; two programs do for any order of steps."""
    pipe = pipe_on(devices=4, warmup_steps=1, sync_steps=(3, -1, 40))
    got = trajectory(pipe, num_inference_steps=6)

    def restarted(at: int) -> np.ndarray:
        """One device's latents after step `at`, from the displaced ones before it."""
        seen = []

        def callback(pipe, step, timestep, tensors):
            seen.append(np.asarray(tensors["latents"]))
            return {"latents": got[step]} if step == at - 1 else None

        generated(one, callback_on_step_end=callback, num_inference_steps=6)
        return seen[at]

    errors = [relative_error(got[step], restarted(step)) for step in range(1, 6)]
    assert max(errors[i - 1] for i in (1, 3, 5)) < 1e-5
    assert min(errors[i - 1] for i in (2, 4)) > 1e-5
    count = pipe.programs.count
    at_once = generated(pipe, num_inference_steps=6, chunk_size=None)
    np.testing.assert_array_equal(at_once, got[-1])
    assert pipe.programs.count == count


def naive(pipe_on, scheme: str, **settings) -> DistriSDXLPipeline:
    return pipe_on(devices=4, parallelism="naive_patch", split_scheme=scheme, **settings)


@slow
@pytest.mark.parametrize(("scheme", "axis"), [("row", 2), ("column", 3)])
def test_naive_patches_are_images_of_their_own(pipe_on, one, scheme, axis):
    """Each band equals one device's image of the band's size, conditioned on the whole image's size."""
    noise = np.random.default_rng(1).standard_normal((1, 4, 32, 32), np.float32)
    whole = {"height": 256, "width": 256, "latents": noise, "num_inference_steps": 3}
    got = generated(naive(pipe_on, scheme, split_batch=False), **whole)
    sides = {"height": 256, "width": 256, ("height", "width")[axis - 2]: 64}
    for band, start in zip(np.split(got, 4, axis), np.split(noise, 4, axis), strict=True):
        alone = generated(one, **whole | sides | {"latents": start}, original_size=(256, 256), target_size=(256, 256))
        assert relative_error(band, alone) < 1e-4


@slow
@pytest.mark.parametrize("settings", [{}, {"split_batch": False}], ids=["CFG split", "bands"])
def test_alternate_cuts_rows_then_columns(pipe_on, settings):
    size = {"height": 128, "width": 128, "num_inference_steps": 2}
    rows, columns, both = (naive(pipe_on, scheme, **settings) for scheme in ("row", "column", "alternate"))
    after_rows, _ = trajectory(rows, **size)

    def continued(pipe, step, timestep, tensors):
        return {"latents": after_rows} if step == 0 else None

    wanted = generated(columns, callback_on_step_end=continued, **size)
    assert relative_error(generated(both, **size), wanted) < 1e-5
    assert relative_error(generated(rows, **size), wanted) > 1e-3


def test_running_twice_gives_the_same_bits(stale):
    first, second = (generated(stale, kind="np", seed=11) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@slow
@pytest.mark.parametrize("chunk_size", [3, None])
def test_chunks_give_the_same_numbers(stale, chunk_size):
    wanted = generated(stale, num_inference_steps=6)
    assert relative_error(generated(stale, num_inference_steps=6, chunk_size=chunk_size), wanted) < 1e-5


@slow
def test_fewer_steps_than_the_warm_up_are_all_exact(exact, stale):
    wanted = generated(exact, num_inference_steps=2)
    assert relative_error(generated(stale, num_inference_steps=2), wanted) < 1e-6
    assert relative_error(generated(stale, num_inference_steps=1), wanted) > 1e-3


@slow
def test_a_call_whose_steps_are_all_exact_keeps_nothing_for_a_next_one(shallow_checkpoint):
    call = {"prompt": PROMPT, "height": 64, "width": 64, "num_inference_steps": 4}
    pipe = DistriSDXLPipeline.from_pretrained(
        shallow_checkpoint, DistriConfig(devices=2, split_batch=False), compile_for=call
    )
    pipe.set_progress_bar_config(disable=True)
    count = pipe.programs.count
    pipe(**call)
    assert pipe.programs.count == count
    (rules,) = (static.rules for stage, static, *_ in pipe.programs._compiled if stage is STEPS)
    assert rules == (SynchronousSteps(),)


@slow
def test_only_new_shapes_compile(one, stale):
    for pipe in (one, stale):
        generated(pipe, kind="np", negative_prompt=OTHER)
        generated(pipe, latents=np.zeros((1, *LATENT)))
        count = pipe.programs.count
        generated(pipe, OTHER, kind="np", seed=5, guidance_scale=8.0, num_inference_steps=7)
        generated(
            pipe, negative_prompt=PROMPT, num_inference_steps=3, original_size=(1, 2), latents=np.ones((1, *LATENT))
        )
        assert pipe.programs.count == count


@slow
@pytest.mark.parametrize(
    ("settings", "changes", "programs"),
    [
        ({"devices": 4}, {}, 7),
        ({"devices": 2, "sync_mode": "full_sync"}, {"guidance_scale": 1.0, "num_images_per_prompt": 2}, 6),
        ({"devices": 2, "parallelism": "tensor"}, {"guidance_rescale": 0.5, "height": 40}, 6),
        ({"devices": 2}, {"clip_skip": 1, "negative_prompt": OTHER, "latents": np.zeros((1, 4, 8, 8))}, 8),
        ({"devices": 2}, {"prompt": None, **EMBEDDINGS}, 4),
    ],
    ids=["displaced", "synchronous without guidance", "tensor", "skipped layers", "embeddings"],
)
def test_what_the_first_call_needs_is_compiled_while_weights_are_read(
    shallow_checkpoint, settings, changes, programs, caplog
):
    """Two text encoders, the conditioning, the noise, one or two kinds of steps, the decoder; and nothing besides, on the way.

    Twice as many text encoders where the prompt's skip layers and the negative prompt's do not; none for embeddings.
    """
    call = {"prompt": PROMPT, "height": 64, "width": 64, "num_inference_steps": 6, **changes}
    config = DistriConfig(warmup_steps=1, **settings)
    jax.clear_caches()
    with jax.log_compiles():  # of this thread, and programs are compiled by others
        pipe = DistriSDXLPipeline.from_pretrained(shallow_checkpoint, config, compile_for=call)
        assert pipe.programs.count == programs
        pipe.set_progress_bar_config(disable=True)
        pipe(**call)
    assert pipe.programs.count == programs
    assert not [message for message in caplog.messages if "XLA compilation" in message]


@slow
def test_another_scheduler_compiles_the_loop_again_and_nothing_else(one, monkeypatch):
    generated(one, kind="np")
    before = set(one.programs._compiled)
    monkeypatch.setattr(one, "scheduler", with_class(one.scheduler, "euler-ancestral"))
    generated(one, kind="np")
    assert {stage for stage, *_ in one.programs._compiled.keys() - before} == {BEGIN, STEPS}


def test_numpys_whole_numbers_are_as_good_as_pythons(stale):
    wanted = generated(stale)
    count = stale.programs.count
    given = {name: np.int64(value) for name, value in {**SIZE, "num_inference_steps": 4, "chunk_size": 1}.items()}
    np.testing.assert_array_equal(generated(stale, **given), wanted)
    assert stale.programs.count == count


@slow
def test_another_size_compiles_again_and_only_once(one):
    before = one.programs.count
    first = generated(one, height=32, width=32)
    after = one.programs.count
    assert first.shape == (1, 4, 4, 4)
    assert after > before
    generated(one, height=32, width=32, seed=9)
    assert one.programs.count == after
    assert one.programs.compile_seconds > 0


def test_callback_sees_every_step_and_may_change_the_latents(one):
    calls = []

    def callback(pipe, step, timestep, tensors):
        calls.append((pipe is one, step, timestep))
        return {"latents": np.full((1, *LATENT), 0.5)} if step == 2 else None

    changed = generated(one, seed=1, callback_on_step_end=callback)
    timesteps = one.scheduler.schedule(4)[0].timestep
    assert calls == [(True, step, float(timesteps[step])) for step in range(4)]
    np.testing.assert_array_equal(changed, generated(one, seed=2, callback_on_step_end=callback))
    assert relative_error(changed, generated(one, seed=1)) > 1e-3


def test_callback_with_latents_of_another_shape_is_refused(one):
    with refuses("callback", "latents", "[1, 4, 4, 4]", "[1, 4, 32, 8]"):
        generated(one, callback_on_step_end=lambda *_: {"latents": np.zeros((1, 4, 4, 4))})


@pytest.mark.parametrize("returned", [[1], {"latents": None}, {"latents": "noise"}])
def test_a_callback_that_returns_no_latents_is_refused(one, returned):
    with refuses(*(["list", "dict", "None"] if returned == [1] else ["latents", "array"])):
        generated(one, callback_on_step_end=lambda *_: returned)


def test_a_callback_that_returns_more_than_latents_is_refused(one):
    with refuses("callback_on_step_end", "prompt_embeds", "latents"):
        generated(one, callback_on_step_end=lambda *_: {"latents": np.zeros((1, *LATENT)), "prompt_embeds": None})


def test_progress_bar_counts_the_steps(monkeypatch, capsys, one):
    monkeypatch.setattr(one, "_progress", {})
    generated(one)
    assert "4/4" in capsys.readouterr().err
    one.set_progress_bar_config(disable=True)
    generated(one)
    assert capsys.readouterr().err == ""


def test_output_types(one):
    values = generated(one, kind="np")
    assert values.shape == (1, 256, 64, 3)
    assert values.dtype == np.float32
    assert 0 <= values.min() < values.max() <= 1
    (image,) = one(PROMPT, **SIZE, num_inference_steps=4).images
    assert isinstance(image, Image.Image)
    assert image.size == (64, 256)
    np.testing.assert_array_equal(np.asarray(image), np.round(values[0] * 255).astype(np.uint8))
    assert generated(one, kind="latent").shape == (1, *LATENT)


@slow
def test_default_size_is_the_models(one):
    (image,) = one(PROMPT, num_inference_steps=1).images
    assert image.size == (128, 128)


@slow
def test_bfloat16_is_close_to_float32(shallow_checkpoint, one):
    short = DistriSDXLPipeline.from_pretrained(shallow_checkpoint, DistriConfig(devices=1), dtype="bfloat16")
    short.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).standard_normal((1, *LATENT), np.float32)
    settings = {"latents": latents, "kind": "np", "num_inference_steps": 2, "guidance_scale": 1.0}
    assert psnr(generated(short, **settings), generated(one, **settings)) > 30


def test_parameters_lie_on_every_device(stale):
    devices = set(jax.devices()[:4])
    assert all(leaf.sharding.device_set == devices for leaf in stale._unet.params)
