"""Several processes, on one host or many: how they join, and arrays that are sharded over the devices of all.

All processes run the same program on one device mesh, each on its own devices. A program's inputs are the same in all processes
(`to_devices`), and results that are read back are complete in all of them (`to_host`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree, Shaped

from distrijax.errors import InvalidArgument
from distrijax.parallel.launchers import tasks
from distrijax.parallel.threads import interruptible, wait
from distrijax.validate import positive

TIMEOUT = 30
"""Seconds without a sign of another process, at the start or later, after which a process ends."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    devices: int | None = None,
    timeout: int = TIMEOUT,
) -> None:
    """Joins this process with others (`jax.distributed.initialize`); call it before JAX looks for devices.

    Give all of coordinator, num_processes and process_id, or none of them: then JAX asks the launcher (SLURM, Open MPI,
    Kubernetes, TPU pods), and without a launcher this process stays alone. A process that does not arrive raises no exception:
    JAX aborts this one.

    Args:
        coordinator: "HOST:PORT" on the host of process 0, the same for all processes.
        num_processes: Number of processes.
        process_id: This process's number, from 0.
        devices: Number of devices of all processes together; on CPUs, each process makes its share of virtual devices if the
            number of processes is known.
        timeout: Seconds after which a process that has not arrived, or does not answer, ends the others.

    Raises:
        InvalidArgument: For invalid arguments, and if this process could not join the others.
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
        raise InvalidArgument(
            f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} missing; give all of {', '.join(given)}, or none"
        )
    num_processes, process_id = positive(num_processes, "num_processes"), positive(process_id, "process_id", least=0)
    if process_id >= num_processes:
        raise InvalidArgument(f"process_id is {process_id} of {num_processes} processes; give 0 to {num_processes - 1}")
    port = _port(coordinator)
    if num_processes == 1:
        return
    _divide_cpus(devices, num_processes)
    if process_id == 0:
        _check_free(coordinator, port)
    try:
        _initialize(timeout, coordinator, num_processes, process_id, cluster_detection_method="deactivate")
    except (RuntimeError, ValueError) as error:
        raise InvalidArgument(
            f"process {process_id} could not join the others at {coordinator} ({_line(error)})"
        ) from None


def _divide_cpus(devices: int | None, count: int | None) -> None:
    """Sets the number of this process's virtual CPU devices, an equal share of `devices`, where both numbers are known."""
    if devices is None or count is None:
        return
    if devices % count:
        raise InvalidArgument(f"devices is {devices} and {count} processes share them; give a multiple of {count}")
    jax.config.update("jax_num_cpu_devices", devices // count)


def _start_launched(timeout: int) -> None:
    """Lets JAX ask the launcher; where there is none, or JAX is in use already, this process stays alone."""
    try:
        _initialize(timeout)
    except (RuntimeError, ValueError, OSError) as error:
        if not any(words in str(error) for words in ("coordinator_address should be defined", "must be called before")):
            raise InvalidArgument(
                f"JAX could not join the processes of the launcher ({_line(error)}); "
                "give coordinator, num_processes and process_id"
            ) from None


def _initialize(timeout: int, *coordinates: str | int, **settings: Any) -> None:
    # this service's SIGTERM handler only sets a flag, and the process would live on
    jax.config.update("jax_enable_preemption_service", False)
    settings |= {"initialization_timeout": timeout, "heartbeat_timeout_seconds": timeout}
    interruptible(partial(jax.distributed.initialize, *coordinates, **settings))
    interruptible(multihost_utils.sync_global_devices, "start")


def _port(coordinator: str) -> int:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InvalidArgument(f"coordinator is {coordinator!r}; give HOST:PORT, such as 10.0.0.1:12345")
    return int(port)


def _check_free(coordinator: str, port: int) -> None:
    """Raises DistriError if process 0 cannot listen; JAX would crash."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a run that has just ended is free
            probe.bind(("", port))
    except OSError as error:
        raise InvalidArgument(
            f"process 0 cannot listen at {coordinator} ({error.strerror}); choose another port for coordinator"
        ) from None


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def is_main_process() -> bool:
    """Whether this is process 0, the only one that prints and writes files; true if there is only one process."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _count_processes(devices: Iterable[jax.Device]) -> int:
    return len({device.process_index for device in devices})


def warm_up_collectives(mesh: Mesh) -> None:
    """Connects the processes of a CPU mesh along all its axes; does nothing on accelerators.

    Gloo gives a group of devices 30 seconds to connect at its first collective. Without this function that comes after
    compiling, which may take one process longer than another. A connected group has no time limit.

    Args:
        mesh: The device mesh; every process must call this with the same one.
    """
    if mesh.devices.flat[0].platform != "cpu" or _count_processes(mesh.devices.flat) == 1:
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


def versions() -> dict[str, str]:
    """The versions that all processes must have in common."""
    return {name: importlib.metadata.version(name) for name in ("distrijax", "jax", "jaxlib")}


def check_agreement(devices: Iterable[jax.Device], facts: Callable[[], Mapping[str, Any]]) -> None:
    """Checks that all processes were started alike, before one waits for another in a program that only it runs.

    Does nothing where all devices are of one process. All processes must call it at the same points, with the same names.

    Args:
        devices: The devices that the processes share.
        facts: Returns, by name, what must be the same in all of them: arrays, or values whose `repr` says all. It is called
            only if there are several processes.

    Raises:
        InvalidArgument: In every process, and names the facts that differ.
    """
    devices = list(devices)
    processes = _count_processes(devices)
    if processes == 1:
        return
    named = facts()
    digests = np.stack([_digest(value) for value in named.values()])
    sharding = NamedSharding(Mesh(np.array(devices), ("device",)), P("device"))
    everyone = to_host(blocks_to_devices((len(devices), *digests.shape), sharding, lambda at: digests[None]))
    differing = [name for name, each in zip(named, np.moveaxis(everyone, 1, 0), strict=True) if (each != each[0]).any()]
    if differing:
        raise InvalidArgument(
            f"{', '.join(differing)} {'differs' if len(differing) == 1 else 'differ'} among the {processes} "
            "processes; start all of them with the same arguments and versions"
        )


def _digest(value: Any) -> np.ndarray:
    """Of a value, as four uint32."""
    leaves = [
        leaf.tobytes() if isinstance(leaf, np.ndarray) else repr(leaf).encode() for leaf in jax.tree.leaves(value)
    ]
    return np.frombuffer(hashlib.blake2b(b"\0".join(leaves), digest_size=16).digest(), np.uint32)


def to_devices(value: PyTree[Shaped[np.ndarray | jax.Array, "..."]], sharding: NamedSharding) -> PyTree[jax.Array]:
    """Places arrays that every process has on the devices of all processes, without communication.

    Args:
        value: Arrays on the host, the same in all processes.
        sharding: Where they are placed.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.tree.map(lambda leaf: blocks_to_devices(leaf.shape, sharding, leaf.__getitem__), value)


def blocks_to_devices(
    shape: tuple[int, ...], sharding: NamedSharding, block: Callable[[tuple[slice, ...]], np.ndarray | jax.Array]
) -> jax.Array:
    """Makes an array block by block; a process makes the blocks of its own devices, each of them once.

    Args:
        shape: The array's shape.
        sharding: The array's placement.
        block: Returns the block at these slices of the array.
    """
    made: dict[tuple, np.ndarray | jax.Array] = {}

    def once(at: tuple[slice, ...]) -> np.ndarray | jax.Array:
        key = tuple((part.start, part.stop) for part in at)
        if key not in made:
            made[key] = block(at)
        return made[key]

    # JAX counts the transfer of the blocks as implicit
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(shape, sharding, once)


def to_host(array: Shaped[jax.Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """Copies an array to the host of every process, sharded or not; all processes must call it.

    Args:
        array: An array of any shape and placement.
    """
    here = array.is_fully_addressable or array.is_fully_replicated
    return np.asarray(wait(array)) if here else multihost_utils.process_allgather(array, tiled=True)
