"""How an image lies on a mesh: bands of rows, their padding, and the sizes that are possible."""

from __future__ import annotations

import dataclasses
import math

from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distrijax.config import Parallelism, SplitScheme
from distrijax.errors import DistriError
from distrijax.parallel.bands import Bands
from distrijax.parallel.exchange import Exchange, Synchronous, TensorParallel
from distrijax.parallel.mesh import CFG, DATA, PATCH
from distrijax.validate import positive


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a call lies on the mesh. With guidance `cfg` holds its branches; without, it cuts the rows further.

    latent: rows and columns of the whole image's latent. levels: of the UNet, each of half the size. split_scheme: of
    naive_patch. Tensor parallelism cuts weights, for the `patch` axis alone, and leaves the latents whole.
    """

    mesh: Mesh | AbstractMesh  # without devices where a program is only traced
    guided: bool
    latent: tuple[int, int]
    levels: int = 1
    parallelism: Parallelism = Parallelism.PATCH
    split_scheme: SplitScheme = SplitScheme.ALTERNATE

    @property
    def rows(self) -> tuple[str, ...]:
        """The axes along which the rows are cut."""
        if self.parallelism is Parallelism.TENSOR:
            return ()
        return (PATCH,) if self.guided else (PATCH, CFG)

    @property
    def patches(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.rows)

    @property
    def bands(self) -> Bands:
        return Bands.among(self.latent[0], self.patches, levels=self.levels)

    @property
    def padded_shape(self) -> tuple[int, int]:
        """Rows and columns of the latents with their padding; naive_patch paints that, too, and its bands may be of columns."""
        columns = self.latent[1]
        if self.parallelism is Parallelism.NAIVE_PATCH and self.split_scheme is not SplitScheme.ROW:
            columns = self.patches * Bands.among(columns, self.patches, levels=self.levels).rows_per_device
        return self.patches * self.bands.rows_per_device, columns

    @property
    def latents(self) -> P:
        """Images, rows."""
        return P(DATA, self.rows)

    @property
    def branches(self) -> P:
        """Guidance branches, images."""
        return P(CFG if self.guided else None, DATA)

    @property
    def stale(self) -> P:
        """Every leaf: images of all branches, then the axis that concatenates the patches."""
        return P((DATA, CFG) if self.guided else DATA, self.rows)

    def sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def exact(self) -> Exchange:
        """An exchange of fresh values."""
        return TensorParallel() if self.parallelism is Parallelism.TENSOR else Synchronous(self.rows, self.bands)


def check_sizes(*, height: int, width: int, vae_scale: int) -> None:
    """Raises DistriError, naming the nearest sizes that do, unless pixels make whole rows and columns of the latent.

    vae_scale: pixels for each of them.
    """
    for name, size in (("height", height), ("width", width)):
        positive(size, name)
        if size % vae_scale:
            below, above = size // vae_scale * vae_scale, (size // vae_scale + 1) * vae_scale
            near = f"{below} or {above}" if below else str(above)
            raise DistriError(f"{name} is {size} and this model needs a multiple of {vae_scale}; use {near}")


def check_images(images: int, data: int) -> None:
    """Raises DistriError unless so many images divide among the `data` axis."""
    if images % data:
        raise DistriError(f"{images} images do not divide among data={data}; make a multiple of {data}")
