"""The layout of an image on a mesh: which axes shard what, padding, and the sizes that are possible."""

from __future__ import annotations

import dataclasses
import math

from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distrijax.config import Parallelism, SplitScheme
from distrijax.errors import InvalidArgument
from distrijax.parallel.bands import Bands
from distrijax.parallel.exchange import Exchange, Synchronous, TensorParallel
from distrijax.parallel.mesh import CFG, DATA, PATCH
from distrijax.validate import positive


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the latents of a call are sharded over the mesh.

    With guidance, the `cfg` axis holds its branches; without, `cfg` shards the rows further. Tensor parallelism shards
    weights along the `patch` axis instead, and the latents are replicated.

    Attributes:
        mesh: The mesh; an abstract one, without devices, is enough for tracing.
        guided: Whether there are two guidance branches.
        latent: Rows and columns of the whole image's latent.
        levels: Resolutions of the UNet, each of half the size of the one before.
        parallelism: How the UNet is divided.
        split_scheme: The direction of naive_patch's bands.
    """

    mesh: Mesh | AbstractMesh
    guided: bool
    latent: tuple[int, int]
    levels: int = 1
    parallelism: Parallelism = Parallelism.PATCH
    split_scheme: SplitScheme = SplitScheme.ALTERNATE

    @property
    def rows(self) -> tuple[str, ...]:
        """The mesh axes that shard the rows."""
        if self.parallelism is Parallelism.TENSOR:
            return ()
        return (PATCH,) if self.guided else (PATCH, CFG)

    @property
    def patches(self) -> int:
        """How many bands the rows are divided into."""
        return math.prod(self.mesh.shape[axis] for axis in self.rows)

    @property
    def bands(self) -> Bands:
        """How the rows are divided."""
        return Bands.among(self.latent[0], self.patches, levels=self.levels)

    @property
    def padded_shape(self) -> tuple[int, int]:
        """Rows and columns of the latents, padding included. Columns are padded too if naive_patch divides them into bands."""
        columns = self.latent[1]
        if self.parallelism is Parallelism.NAIVE_PATCH and self.split_scheme is not SplitScheme.ROW:
            columns = self.patches * Bands.among(columns, self.patches, levels=self.levels).rows_per_device
        return self.patches * self.bands.rows_per_device, columns

    @property
    def latents(self) -> P:
        """The sharding of latents: images, rows."""
        return P(DATA, self.rows)

    @property
    def branches(self) -> P:
        """The sharding of what differs by branch: guidance branches, images."""
        return P(CFG if self.guided else None, DATA)

    @property
    def stale(self) -> P:
        """The sharding of every leaf of the stale state: images of all branches, then the axis of the patches."""
        return P((DATA, CFG) if self.guided else DATA, self.rows)

    def sharding(self, spec: P) -> NamedSharding:
        """A specification on this mesh.

        Args:
            spec: Mesh axes of each array axis.
        """
        return NamedSharding(self.mesh, spec)

    def exact(self) -> Exchange:
        """A new exchange that answers exactly."""
        return TensorParallel() if self.parallelism is Parallelism.TENSOR else Synchronous(self.rows, self.bands)


def check_sizes(*, height: int, width: int, vae_scale: int) -> None:
    """Checks that an image has whole rows and columns of the latent.

    Args:
        height: Rows of the image, in pixels.
        width: Columns of the image, in pixels.
        vae_scale: Pixels per row, or column, of the latent.

    Raises:
        InvalidArgument: A size is no multiple of `vae_scale`; the message names the nearest ones that are.
    """
    for name, size in (("height", height), ("width", width)):
        positive(size, name)
        if size % vae_scale:
            below, above = size // vae_scale * vae_scale, (size // vae_scale + 1) * vae_scale
            near = f"{below} or {above}" if below else str(above)
            raise InvalidArgument(f"{name} is {size} and this model needs a multiple of {vae_scale}; use {near}")


def check_images(images: int, data: int) -> None:
    """Checks that the images can be divided over the `data` axis.

    Args:
        images: Number of images of a call.
        data: Size of the `data` axis.

    Raises:
        InvalidArgument: If it is not a multiple of the axis' size.
    """
    if images % data:
        raise InvalidArgument(f"{images} images cannot be divided among data={data}; generate a multiple of {data}")
