"""The device mesh: its axes, and the planner that chooses their sizes. Only this file spells the names of the axes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from distrijax.config import DistriConfig
from distrijax.errors import InvalidArgument
from distrijax.validate import positive

DATA = "data"  # different images
CFG = "cfg"  # the unconditional and the conditional branch of one image (size 1 or 2)
PATCH = "patch"  # bands of rows of one image

EVERY_AXIS = (DATA, PATCH, CFG)
"""In the order of the mesh's dimensions."""


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """Sizes of the three mesh axes; their product is the number of devices.

    Attributes:
        data: For different images.
        cfg: For guidance branches; 1 or 2.
        patch: For bands of rows.
    """

    data: int
    cfg: int
    patch: int

    def __post_init__(self):
        for axis in EVERY_AXIS:
            object.__setattr__(self, axis, positive(getattr(self, axis), axis))

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return self.data * self.cfg * self.patch

    def build(self, devices: Sequence[jax.Device]) -> Mesh:
        """The mesh over `devices`: each guidance branch on its own half, neighbouring patches on neighbouring devices.

        `patch` comes before `cfg` in the mesh, because rows may be sharded along both, and a permute along several axes
        numbers the devices in the mesh's order, whatever order its argument has.

        Args:
            devices: The devices, in order.

        Raises:
            InvalidArgument: There are more devices than the mesh has, or fewer.
        """
        if len(devices) != self.devices:
            raise InvalidArgument(
                f"{self} needs {self.devices} devices and {len(devices)} are given; give exactly as many"
            )
        halves = np.array(devices).reshape(self.data, self.cfg, self.patch)
        return Mesh(halves.transpose(0, 2, 1), EVERY_AXIS, axis_types=(AxisType.Auto,) * 3)

    def abstract(self) -> AbstractMesh:
        """The same mesh without devices, for tracing."""
        return AbstractMesh((self.data, self.patch, self.cfg), EVERY_AXIS, axis_types=(AxisType.Auto,) * 3)

    def __str__(self) -> str:
        return f"{DATA} {self.data} x {CFG} {self.cfg} x {PATCH} {self.patch}"


def plan_mesh(config: DistriConfig, devices: int, *, branches: int = 2) -> MeshPlan:
    """Chooses the sizes of the mesh axes: those that the config sets, then the CFG split, then patches.

    Args:
        config: What the user set.
        devices: How many devices to use.
        branches: Guidance branches of the model (`UNetConfig.branches`).

    Raises:
        InvalidArgument: The product of the sizes is not `devices`, `config.devices` is another number, or a single branch is to
            be split.
    """
    devices = positive(devices, "devices")
    if config.device_count not in (None, devices):
        raise InvalidArgument(
            f"devices is {devices} and the config's is {config.device_count}; use the same number, or remove the config's"
        )
    if config.cfg == 2 and branches == 1:
        raise InvalidArgument(
            "cfg is 2 and this UNet, which is conditioned on the guidance scale, has a single branch; use 1 or remove cfg"
        )
    given = {axis: size for axis in (DATA, CFG) if (size := getattr(config, axis))}
    least = math.prod(given.values())
    if config.patch is None and devices % least:
        named = " x ".join(f"{axis}={size}" for axis, size in given.items())
        raise InvalidArgument(
            f"{named} needs a multiple of {least} devices and devices is {devices}; use such a number or smaller axes"
        )
    data = config.data or 1
    per_image = devices // data
    cfg = config.cfg
    if cfg is None:
        splits = config.split_batch and branches == 2 and per_image % 2 == 0
        cfg = 2 if splits and config.patch in (None, per_image // 2) else 1
    patch = config.patch or per_image // cfg
    if data * cfg * patch != devices:
        raise InvalidArgument(
            f"data {data} x cfg {cfg} x patch {patch} is {data * cfg * patch} and devices is {devices}; "
            "choose axis sizes whose product is the number of devices"
        )
    return MeshPlan(data, cfg, patch)


def devices_of(config: DistriConfig) -> list[jax.Device]:
    """The devices that a config asks for, in the order in which `MeshPlan.build` takes them.

    Args:
        config: What the user set.

    Raises:
        InvalidArgument: For more devices than JAX lists, or an unequal number of each process.
    """
    listed = config.devices if isinstance(config.devices, tuple) else jax.devices()
    count = config.device_count or len(listed)
    if count > len(listed):
        raise InvalidArgument(
            f"devices is {count} and JAX shows {len(listed)} ({listed[0].platform}); ask for at most {len(listed)}"
        )
    return pick_devices(listed, count)


def pick_devices(devices: Sequence[jax.Device], count: int) -> list[jax.Device]:
    """Picks equally many devices of each process, in the order of the processes.

    `MeshPlan.build` then places the first axis larger than 1 across hosts, whose links are slow: images (`data`) exchange
    nothing, guidance branches (`cfg`) one sum per step, neighbouring patches (`patch`) the most.

    Args:
        devices: The devices of all processes.
        count: How many to pick.

    Raises:
        InvalidArgument: The processes cannot provide equally many.
    """
    processes: dict[int, list[jax.Device]] = {}
    for device in sorted(devices, key=lambda device: device.process_index):
        processes.setdefault(device.process_index, []).append(device)
    own = list(processes.values())
    if count == len(devices):
        return list(itertools.chain(*own))
    each, rest = divmod(count, len(own))
    fewest = min(map(len, own))
    if rest or each > fewest:
        raise InvalidArgument(
            f"devices is {count} and must be divided equally among {len(own)} processes; "
            f"use a multiple of {len(own)} up to {len(own) * fewest}, or all {len(devices)}"
        )
    return list(itertools.chain(*(some[:each] for some in own)))
