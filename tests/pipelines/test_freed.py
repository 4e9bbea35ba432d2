"""What is given back: compiled programs, memory maps and arrays, of pipelines that are deleted and of those that live long."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import jax
import pytest
from facts import refuses

from distrijax import DistriConfig, DistriSDXLPipeline
from distrijax.parallel.programs import MAX_PROGRAMS, Programs, Stage

CALL = {"prompt": "a red circle", "num_inference_steps": 3, "output_type": "latent"}
FEW = 100
"""Memory maps: fewer than a program of the UNet has."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts Linux's memory maps")


def maps() -> int:
    gc.collect()
    with open("/proc/self/maps") as lines:
        return sum(1 for _ in lines)


def arrays() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def load(checkpoint: Path, *, max_programs: int = MAX_PROGRAMS, compile_for: dict | None = None, **settings):
    config = DistriConfig(devices=2, warmup_steps=0, **settings)
    pipe = DistriSDXLPipeline.from_pretrained(checkpoint, config, max_programs=max_programs, compile_for=compile_for)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: DistriSDXLPipeline, size: int = 64) -> None:
    pipe(**CALL, height=64, width=size)


@pytest.mark.parametrize("prepared", [False, True], ids=["compiled in the call", "compiled while weights are read"])
def test_a_pipeline_that_is_deleted_frees_all_that_was_compiled_and_loaded(shallow_checkpoint, prepared):
    """Also what JAX keeps of the trace, which holds on to the pipeline's structure."""

    def live_and_die(mode: str) -> int:
        compile_for = {**CALL, "height": 64, "width": 64} if prepared else None
        pipe = load(shallow_checkpoint, sync_mode=mode, compile_for=compile_for)
        generate(pipe)
        held = maps() - before
        gone = weakref.ref(pipe._unet.form), weakref.ref(next(iter(pipe.programs._compiled.values())).result())
        del pipe
        gc.collect()
        assert [reference() for reference in gone] == [None, None]
        return held

    before, bytes_before = maps(), arrays()
    live_and_die("full_sync")  # what all pipelines share stays
    shared = maps()
    held = live_and_die("corrected_async_gn")
    assert held > 3 * FEW
    assert maps() < shared + FEW
    assert arrays() == bytes_before


def test_calls_of_one_size_add_nothing(shallow_checkpoint):
    pipe = load(shallow_checkpoint)
    generate(pipe)
    before, bytes_before, count = maps(), arrays(), pipe.programs.count
    for _ in range(5):
        generate(pipe)
    assert pipe.programs.count == count
    assert maps() < before + FEW
    assert arrays() == bytes_before


def test_a_pipeline_called_at_many_sizes_keeps_the_programs_it_used_last(shallow_checkpoint):
    pipe, most = load(shallow_checkpoint, max_programs=8), 8
    generate(pipe)
    generate(pipe, 72)
    before, bytes_before = maps(), arrays()
    for size in (80, 88, 96):
        generate(pipe, size)
        assert pipe.programs.count == most
    assert maps() < before + 2 * FEW
    assert arrays() == bytes_before
    seconds = pipe.programs.compile_seconds
    generate(pipe, 96)
    assert pipe.programs.compile_seconds == seconds
    generate(pipe)
    assert pipe.programs.compile_seconds > seconds


def add(static, params, x):
    return x + static


def one(sharding=None):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.device_put(jax.numpy.ones(3), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def kept(programs: Programs) -> list[int]:
    """The static values of its programs."""
    return [key[1] for key in programs._compiled]


def test_the_program_that_was_not_used_for_longest_gives_way():
    programs, x = Programs("cpu", max_programs=2), one()
    for static in (1, 2, 1, 3):
        programs(Stage(add), static, (), x)
    assert kept(programs) == [1, 3]


def test_a_program_in_use_does_not_give_way():
    """Neither one that runs nor one that compiles."""
    programs, x, other = Programs("cpu", max_programs=1), one(), one()

    def outer(static, params, x):
        programs(Stage(add), 5, (), other)  # while this one compiles
        return x

    programs(Stage(outer), 1, (), x)
    with programs._in_use(next(iter(programs._compiled))):
        programs(Stage(add), 2, (), x)
        assert kept(programs) == [1, 2]
    programs(Stage(add), 3, (), x)
    assert kept(programs) == [3]


@pytest.mark.parametrize("most", [0, -1, 1.5, "many"])
def test_a_bound_that_is_no_whole_number_is_refused(shallow_checkpoint, most):
    with refuses("max_programs", most):
        load(shallow_checkpoint, max_programs=most)
