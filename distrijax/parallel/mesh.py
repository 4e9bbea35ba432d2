"""The mesh: its axes, and the planner that picks their sizes. Axis names are spelled here only."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from distrijax.config import DistriConfig
from distrijax.errors import DistriError
from distrijax.validate import positive

DATA = "data"  # different images
CFG = "cfg"  # the unconditional and the conditional branch of one image (size 1 or 2)
PATCH = "patch"  # bands of rows of one image

EVERY_AXIS = (DATA, PATCH, CFG)
"""In the order in which they number the devices."""


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """Sizes of the three mesh axes; their product is the number of devices."""

    data: int
    cfg: int
    patch: int

    def __post_init__(self):
        for axis in EVERY_AXIS:
            object.__setattr__(self, axis, positive(getattr(self, axis), axis))

    @property
    def devices(self) -> int:
        return self.data * self.cfg * self.patch

    def build(self, devices: Sequence[jax.Device]) -> Mesh:
        """A mesh over `devices`: each branch on its own half, a branch's neighbouring patches on neighbouring devices.

        `patch` comes before `cfg` among the axes, because rows may be cut along both, and a permute numbers the devices
        along several axes in the mesh's order, whatever order it is told.
        Raises DistriError for more devices or fewer.
        """
        if len(devices) != self.devices:
            raise DistriError(
                f"{self} needs {self.devices} devices and {len(devices)} are given; give as many as it needs"
            )
        halves = np.array(devices).reshape(self.data, self.cfg, self.patch)
        return Mesh(halves.transpose(0, 2, 1), EVERY_AXIS, axis_types=(AxisType.Auto,) * 3)

    def abstract(self) -> AbstractMesh:
        """The mesh without devices, for tracing."""
        return AbstractMesh((self.data, self.patch, self.cfg), EVERY_AXIS, axis_types=(AxisType.Auto,) * 3)

    def __str__(self) -> str:
        return f"{DATA} {self.data} x {CFG} {self.cfg} x {PATCH} {self.patch}"


def plan_mesh(config: DistriConfig, devices: int, *, branches: int = 2) -> MeshPlan:
    """Sizes of the axes for so many devices: what the user set, else the CFG split first, then patches.

    branches: of guidance, for this model (`UNetConfig.branches`).
    Raises DistriError where the product of the sizes is not the number of devices, where `config.devices` is another number,
    and for a split of a single branch.
    """
    devices = positive(devices, "devices")
    if config.devices not in (None, devices):
        raise DistriError(
            f"devices is {devices} and the config's is {config.devices}; give the same number, or leave the config's out"
        )
    if config.cfg == 2 and branches == 1:
        raise DistriError(
            "cfg is 2 and this UNet, which is told the guidance scale, has a single branch to run; use 1 or leave cfg out"
        )
    given = {axis: size for axis in (DATA, CFG) if (size := getattr(config, axis))}
    least = math.prod(given.values())
    if config.patch is None and devices % least:
        named = " x ".join(f"{axis}={size}" for axis, size in given.items())
        raise DistriError(
            f"{named} needs a multiple of {least} devices and devices is {devices}; use such a number, or a smaller size"
        )
    data = config.data or 1
    per_image = devices // data
    cfg = config.cfg
    if cfg is None:
        splits = config.split_batch and branches == 2 and per_image % 2 == 0
        cfg = 2 if splits and config.patch in (None, per_image // 2) else 1
    patch = config.patch or per_image // cfg
    if data * cfg * patch != devices:
        raise DistriError(
            f"data {data} x cfg {cfg} x patch {patch} is {data * cfg * patch} and devices is {devices}; "
            "choose axis sizes whose product is the number of devices"
        )
    return MeshPlan(data, cfg, patch)


def pick_devices(devices: Sequence[jax.Device], count: int) -> list[jax.Device]:
    """So many of all processes' devices, process by process and equally many of each.

    `MeshPlan.build` then lets the first axis that is cut cross from host to host, where links are slow: pictures (`data`)
    exchange nothing, the branches of guidance (`cfg`) a sum in each step, neighbouring bands (`patch`) the most.
    Raises DistriError where they cannot be had equally.
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
        raise DistriError(
            f"devices is {count} and {len(own)} processes share them equally; "
            f"give a multiple of {len(own)} up to {len(own) * fewest}, or all {len(devices)}"
        )
    return list(itertools.chain(*(some[:each] for some in own)))
