"""The mesh: its axes, and the planner that picks their sizes. Axis names are spelled here only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from distrijax.config import DistriConfig, DistriError, SplitScheme, positive

DATA = "data"  # different images
CFG = "cfg"  # the unconditional and the conditional branch of one image (size 1 or 2)
PATCH = "patch"  # bands of rows of one image


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """Sizes of the three mesh axes; their product is the number of devices."""

    data: int
    cfg: int
    patch: int

    @property
    def devices(self) -> int:
        return self.data * self.cfg * self.patch

    def build(self, devices: Sequence[jax.Device]) -> Mesh:
        """A mesh over `devices`: each branch on its own half, a branch's neighbouring patches on neighbouring devices.

        `patch` comes before `cfg` among the axes, because rows may be cut along both, and lax.ppermute numbers the devices
        along several axes in the mesh's order, whatever order it is told.
        """
        halves = np.array(devices).reshape(self.data, self.cfg, self.patch)
        return Mesh(halves.transpose(0, 2, 1), (DATA, PATCH, CFG), axis_types=(AxisType.Auto,) * 3)

    def abstract(self) -> AbstractMesh:
        """The mesh without devices, for tracing."""
        return AbstractMesh((self.data, self.patch, self.cfg), (DATA, PATCH, CFG), axis_types=(AxisType.Auto,) * 3)

    def __str__(self) -> str:
        return f"{DATA} {self.data} x {CFG} {self.cfg} x {PATCH} {self.patch}"


def plan_mesh(config: DistriConfig, devices: int) -> MeshPlan:
    """Sizes of the axes for so many devices: what the user set, else the CFG split first, then patches.

    Raises DistriError where the product of the sizes is not the number of devices.
    """
    data = config.data or 1
    per_image = devices // data
    cfg = config.cfg
    if cfg is None:
        cfg = 2 if config.split_batch and per_image % 2 == 0 and config.patch in (None, per_image // 2) else 1
    patch = config.patch or per_image // cfg
    if data * cfg * patch != devices:
        raise DistriError(
            f"data {data} x cfg {cfg} x patch {patch} is {data * cfg * patch} and devices is {devices}; "
            "choose axis sizes whose product is the number of devices"
        )
    return MeshPlan(data, cfg, patch)


def check_sizes(
    *, height: int, width: int, patches: int, vae_scale: int, levels: int, scheme: SplitScheme = SplitScheme.ROW
) -> None:
    """Raises DistriError, naming the nearest sizes that do, unless every level of the UNet divides among the patches.

    height, width: pixels. patches: bands of rows. vae_scale: pixels for each latent row. levels: of the UNet. scheme: of
    naive_patch, whose bands may be of columns too; latents are cut by rows in every scheme.
    """
    pixels = vae_scale * 2 ** (levels - 1)
    across = 1 if scheme == SplitScheme.ROW else patches
    for name, size, parts in (("height", height, patches), ("width", width, across)):
        positive(size, name)
        unit = pixels * parts
        if size % unit:
            why = (
                f"{parts} patches need a multiple of {unit}" if parts > 1 else f"this model needs a multiple of {unit}"
            )
            below, above = size // unit * unit, (size // unit + 1) * unit
            near = f"{below} or {above}" if below else str(above)
            raise DistriError(f"{name} is {size} and {why}; use {near}")


def check_images(images: int, data: int) -> None:
    """Raises DistriError unless so many images divide among the `data` axis."""
    if images % data:
        raise DistriError(f"{images} images do not divide among data={data}; make a multiple of {data}")
