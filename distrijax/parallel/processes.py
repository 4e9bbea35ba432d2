"""Several processes, on one host or many: they find each other, and share arrays that no one of them holds alone.

All run the same program on one mesh. Each computes on its own devices; what it hands to a program is the same in all
(`put`), and what it reads back is whole in all (`fetch`).
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree, Shaped

from distrijax.errors import DistriError
from distrijax.parallel.launchers import tasks
from distrijax.parallel.threads import interruptible, wait
from distrijax.validate import positive

TIMEOUT = 30
"""Seconds to wait for a process that does not arrive, or falls silent, before the others end."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    devices: int | None = None,
    timeout: int = TIMEOUT,
) -> None:
    """Makes this process one of several (`jax.distributed.initialize`); to be called before JAX looks at a device.

    coordinator: "HOST:PORT" on the host of process 0, the same for all. num_processes, process_id: how many, and which
    of them, from 0. Without these three JAX asks the launcher (SLURM, Open MPI, Kubernetes, TPU pods), and where there is
    none this process stays alone. devices: of all processes together, which CPUs are divided into where their number is
    known. timeout: seconds after which a process that has not arrived, or no longer answers, ends the others.
    Raises DistriError for arguments that cannot be. A process that is missing is no exception: JAX aborts this one.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    timeout = positive(timeout, "timeout")
    if all(value is None for value in given.values()):
        count = tasks()
        if count != 1:
            _divide_cpus(devices, count)
            _start_launched(timeout)
        return
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise DistriError(
            f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} missing; give all of {', '.join(given)}, or none"
        )
    num_processes, process_id = positive(num_processes, "num_processes"), positive(process_id, "process_id", least=0)
    if process_id >= num_processes:
        raise DistriError(f"process_id is {process_id} of {num_processes} processes; give 0 to {num_processes - 1}")
    port = _port(coordinator)
    if num_processes == 1:
        return
    _divide_cpus(devices, num_processes)
    if process_id == 0:
        _check_free(coordinator, port)
    try:
        _initialize(timeout, coordinator, num_processes, process_id, cluster_detection_method="deactivate")
    except (RuntimeError, ValueError) as error:
        raise DistriError(f"process {process_id} could not join the others at {coordinator} ({_line(error)})") from None


def _divide_cpus(devices: int | None, count: int | None) -> None:
    """Has each of so many processes divide its CPU into its share of the devices, where both numbers are known."""
    if devices is None or count is None:
        return
    if devices % count:
        raise DistriError(f"devices is {devices} and {count} processes share them; give a multiple of {count}")
    jax.config.update("jax_num_cpu_devices", devices // count)


def _start_launched(timeout: int) -> None:
    """Lets JAX ask the launcher; where it finds none, or is in use already, this process stays alone."""
    try:
        _initialize(timeout)
    except (RuntimeError, ValueError, OSError) as error:
        if not any(told in str(error) for told in ("coordinator_address should be defined", "must be called before")):
            raise DistriError(
                f"JAX could not join the processes of the launcher ({_line(error)}); "
                "give coordinator, num_processes and process_id"
            ) from None


def _initialize(timeout: int, *coordinates: str | int, **settings: Any) -> None:
    # this service's handler of SIGTERM would only take note, and the process would live on
    jax.config.update("jax_enable_preemption_service", False)
    settings |= {"initialization_timeout": timeout, "heartbeat_timeout_seconds": timeout}
    interruptible(partial(jax.distributed.initialize, *coordinates, **settings))
    interruptible(multihost_utils.sync_global_devices, "start")


def _port(coordinator: str) -> int:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise DistriError(f"coordinator is {coordinator!r}; give HOST:PORT, such as 10.0.0.1:12345")
    return int(port)


def _check_free(coordinator: str, port: int) -> None:
    """Raises DistriError where process 0 could not listen; JAX itself would crash."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that has just ended is no hindrance
            probe.bind(("", port))
    except OSError as error:
        raise DistriError(
            f"process 0 cannot listen at {coordinator} ({error.strerror}); choose another port for coordinator"
        ) from None


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def is_main_process() -> bool:
    """Whether this is process 0, which speaks and writes for all; true where there is no other."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def warm_up_collectives(mesh: Mesh) -> None:
    """Has the processes of a mesh connect along all its axes, now that they are in step.

    Gloo gives a group of devices 30 seconds to form, at its first exchange, and that comes after compiling, which may take
    one process longer than another. A group that has formed waits for as long as it takes.
    """
    if mesh.devices.flat[0].platform != "cpu" or len({device.process_index for device in mesh.devices.flat}) == 1:
        return
    multihost_utils.sync_global_devices("connect")
    axes = [name for name, size in mesh.shape.items() if size > 1]
    groups = [group for size in range(1, len(axes) + 1) for group in itertools.combinations(axes, size)]
    left = tuple(P(*(None if name in group else name for name in mesh.axis_names)) for group in groups)
    whole = P(*mesh.axis_names)

    def sums(x):
        return tuple(jax.lax.psum(x, group) for group in groups)

    ones = to_devices(np.ones(mesh.devices.shape, np.float32), NamedSharding(mesh, whole))
    wait(jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=whole, out_specs=left))(ones))


def to_devices(value: PyTree[Shaped[np.ndarray | jax.Array, "..."]], sharding: NamedSharding) -> PyTree[jax.Array]:
    """A host's arrays on the devices of all processes, each of which has the same ones; nothing travels between them."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.tree.map(lambda leaf: blocks_to_devices(leaf.shape, sharding, leaf.__getitem__), value)


def blocks_to_devices(
    shape: tuple[int, ...], sharding: NamedSharding, block: Callable[[tuple[slice, ...]], np.ndarray | jax.Array]
) -> jax.Array:
    """An array of so many elements along each axis, of which every process makes what its devices hold, and nothing twice."""
    made: dict[tuple, np.ndarray | jax.Array] = {}

    def once(at: tuple[slice, ...]) -> np.ndarray | jax.Array:
        key = tuple((part.start, part.stop) for part in at)
        if key not in made:
            made[key] = block(at)
        return made[key]

    # JAX takes what it makes of the blocks for transfers that nobody meant
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(shape, sharding, once)


def to_host(array: Shaped[jax.Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """The whole of an array on the host, in every process; all of them have to ask for it."""
    here = array.is_fully_addressable or array.is_fully_replicated
    return np.asarray(wait(array)) if here else multihost_utils.process_allgather(array, tiled=True)
