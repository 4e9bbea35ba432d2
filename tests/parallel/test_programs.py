"""Compiled programs: with which options, and which of them run at the same time."""

from __future__ import annotations

import dataclasses
import re
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts import refuses, warns
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distrijax import DistriError
from distrijax.parallel.programs import OPTIONS, Programs, Stage, check_memory, compiled


def slow_sum(static, params, x):
    """A second or so of additions."""
    return jax.lax.fori_loop(0, 300, lambda _, total: total + jnp.sin(x + total), x)


def test_programs_on_virtual_devices_end_before_the_next_begins():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(np.ones((8, 20_000), np.float32), NamedSharding(mesh, P("x")))
    result = Programs("cpu")(Stage(slow_sum), None, (), x)
    assert result.is_ready()


def test_a_program_that_was_prepared_of_shapes_is_not_compiled_again():
    programs, x = Programs("cpu"), jax.device_put(np.ones(3, np.float32), sharding())
    double, shape = (lambda static, params, x: static * x), jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    programs.prepare(Stage(double), 2, (), shape)
    assert programs.count == 1
    np.testing.assert_array_equal(programs(Stage(double), 2, (), x), 2 * x)
    assert programs.count == 1
    np.testing.assert_array_equal(programs(Stage(double), 3, (), x), 3 * x)
    assert programs.count == 2
    assert programs.blocked_seconds <= programs.compile_seconds + 1


def test_products_have_the_precision_that_the_caller_has_set():
    programs, x = Programs("cpu"), jax.device_put(np.ones((3, 3), np.float32), sharding())

    def square(static, params, x):
        return x @ x

    programs(Stage(square), None, (), x)
    with jax.default_matmul_precision("highest"):
        programs(Stage(square), None, (), x)
        programs(Stage(square), None, (), x)
    texts = [program.result().as_text() for program in programs._compiled.values()]
    assert ["operand_precision={highest,highest}" in text for text in texts] == [False, True]


def test_what_fails_to_compile_in_the_background_fails_where_it_is_called():
    programs, x = Programs("cpu"), jax.device_put(np.ones(3, np.float32), sharding())

    def wrong(static, params, x):
        raise DistriError("never")

    programs.prepare(Stage(wrong), None, (), x)
    with refuses("never"):
        programs(Stage(wrong), None, (), x)
    assert programs.count == 0


def test_whoever_waits_for_what_fails_to_compile_is_told_the_same():
    programs, x = Programs("cpu"), jax.device_put(np.ones(3, np.float32), sharding())

    def wrong(static, params, x):
        time.sleep(1)  # until both wait
        raise DistriError("never")

    def call(_):
        with refuses("never"):
            programs(Stage(wrong), None, (), x)

    with ThreadPoolExecutor(2) as callers:
        list(callers.map(call, range(2)))


def test_programs_that_jax_is_told_not_to_compile_are_refused():
    programs, x = Programs("cpu"), jax.device_put(np.ones(3, np.float32), sharding())
    with (
        jax.disable_jit(),
        refuses("jax_disable_jit"),
    ):
        programs(Stage(slow_sum), None, (), x)


@dataclasses.dataclass
class Lowered:
    """Compiles with every option that it knows, and refuses the first other one, as XLA does."""

    known: set[str]

    def compile(self, compiler_options):
        for name in compiler_options:
            if name not in self.known:
                raise jax.errors.JaxRuntimeError(f"INVALID_ARGUMENT: No such compile option: '{name}'")
        return compiler_options


def test_a_users_options_come_before_the_platforms():
    name, other = "xla_gpu_enable_latency_hiding_scheduler", "xla_gpu_enable_cublaslt"
    xla = Lowered({*OPTIONS["gpu"], other})
    assert compiled(xla, OPTIONS["gpu"], {}) == OPTIONS["gpu"]
    assert compiled(xla, OPTIONS["gpu"], {name: False, other: True}) == {**OPTIONS["gpu"], name: False, other: True}
    assert compiled(xla, {}, {}) == {}


def test_an_option_of_ours_that_xla_does_not_have_is_left_out_with_a_warning():
    lost, *others = OPTIONS["gpu"]
    with warns("XLA", lost):
        assert list(compiled(Lowered(set(others)), OPTIONS["gpu"], {})) == others


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"xla_gpu_enable_magic": True}, "'xla_gpu_enable_magic'"),
        ({"xla_backend_optimization_level": "high"}, "'high'"),
    ],
)
def test_options_that_xla_does_not_have_are_refused(options, told):
    x = jax.device_put(np.ones(3, np.float32), sharding())
    with refuses("XLA", "compiler option", told):
        Programs("cpu", options)(Stage(lambda static, params, x: x + 1), None, (), x)


def sharding() -> NamedSharding:
    return NamedSharding(jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), P())


@dataclasses.dataclass
class Device:
    """One that tells how full it is."""

    stats: dict[str, int] | None

    def memory_stats(self):
        return self.stats


def test_a_program_that_does_not_fit_is_refused_before_it_runs():
    """It takes 4 MB and gives 4 MB, none of it in place."""
    program = jax.jit(lambda x: jnp.flip(x) + 1).lower(np.ones(1_000_000, np.float32)).compile()
    check_memory(program, Device(None))
    check_memory(program, Device({"bytes_limit": 20_000_000, "bytes_in_use": 4_000_000}))
    with refuses(re.compile(r"\b0\.00[48]\d* GB"), "0.017 GB", "0.02 GB", "devices"):
        check_memory(program, Device({"bytes_limit": 20_000_000, "bytes_in_use": 17_000_000}))
