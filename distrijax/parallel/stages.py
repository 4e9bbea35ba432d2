"""The stages of a call. Each is a program, described once; a call runs them on devices, or dry.

    on.put(value, sharding)                       the host's arrays -> the devices
    on.run(STAGE, static, params, *arguments)     runs a stage
    on.get(array)                                 the devices -> the host

`OnDevices` does so. `Dry` moves and computes nothing: shapes with shardings take the place of arrays, and the programs that the
same call would run on devices are compiled in the background. What prepares a call is thus the call itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from distrijax.parallel.processes import to_devices, to_host
from distrijax.parallel.programs import Programs, Stage, program_key, trace


class On(Protocol):
    """Where a call runs."""

    def put(self, value: Any, sharding: NamedSharding) -> Any:
        """Places arrays.

        Args:
            value: A tree of arrays on the host, the same in all processes.
            sharding: The placement of all of them.
        """

    def run(self, stage: Stage, static: Any, params: Any, *arguments: Any) -> Any:
        """Runs a stage, and returns its result.

        Args:
            stage: The stage.
            static: Its static argument.
            params: The parameters of its models.
            *arguments: Its other arguments, placed.
        """

    def get(self, array: Any) -> np.ndarray:
        """Copies an array to the host of every process.

        Args:
            array: An array that is placed.
        """


class OnDevices:
    """Runs a call.

    Args:
        programs: The compiled programs.
    """

    def __init__(self, programs: Programs):
        self._programs = programs

    def put(self, value, sharding):
        return to_devices(value, sharding)

    def run(self, stage, static, params, *arguments):
        return self._programs(stage, static, params, *arguments)

    def get(self, array):
        return to_host(array)


class Described(NamedTuple):
    """A program of a call, described.

    Attributes:
        stage: The stage.
        static: Its static argument.
        params: The parameters, or their shapes with shardings.
        arguments: The shapes of its other arguments, with shardings.
    """

    stage: Stage
    static: Any
    params: Any
    arguments: tuple

    def trace(self) -> jax.stages.Traced:
        """The program, traced for the platform of its devices."""
        return trace(self.stage, self.static, self.params, *self.arguments)


class Dry:
    """Describes what a call runs. What the host would read of the devices is zeros.

    Stages whose results others take are traced here; all else happens in the background.

    Args:
        programs: Compiles what is described, in the background; None for tracing alone, where there may be no devices.
    """

    def __init__(self, programs: Programs | None = None):
        self._programs = programs
        self._results: dict[Any, Any] = {}

    def put(self, value, sharding):
        return with_shardings(value, sharding)

    def run(self, stage, static, params, *arguments):
        key = program_key(stage, static, arguments)
        shapes = self._results.get(key)
        if self._programs is not None and shapes is None:
            shapes = self._programs.results(key)
        if shapes is None:
            traced, shapes = self._describe(stage, static, params, arguments)
            if self._programs is not None:
                self._programs.prepare(stage, static, params, *arguments, traced=traced)
                self._programs.keep_results(key, shapes)
            self._results[key] = shapes
        return shapes

    def _describe(self, stage: Stage, static: Any, params: Any, arguments: tuple) -> tuple[Any, Any]:
        """The traced program, if finding the shapes of the results has traced it, and these shapes."""
        if stage.results is None:
            return None, ()
        shardings, same = stage.results(static), stage.same and stage.same(static)
        if same is not None:
            return None, with_shardings(tuple(arguments[index] for index in same), shardings)
        traced = Described(stage, static, params, arguments).trace()
        return traced, with_shardings(traced.out_info, shardings)

    def get(self, array):
        return np.broadcast_to(np.zeros((), array.dtype), array.shape)


def with_shardings(values: Any, shardings: Any) -> Any:
    """Shapes with their shardings.

    Args:
        values: A tree of arrays or shapes.
        shardings: A tree of shardings; one stands for all leaves of the part of `values` in its place.

    Returns:
        A tree of `jax.ShapeDtypeStruct` with shardings, of the structure of `values`.
    """

    def place(sharding: NamedSharding, part: Any) -> Any:
        def leaf(value: Any) -> jax.ShapeDtypeStruct:
            dtype = jax.dtypes.canonicalize_dtype(value.dtype, allow_extended_dtype=True)
            return jax.ShapeDtypeStruct(value.shape, dtype, sharding=sharding)

        return jax.tree.map(leaf, part)

    return jax.tree.map(place, shardings, values, is_leaf=lambda each: isinstance(each, NamedSharding))
