"""The collectives of a step: what travels between devices, and how XLA is led to overlap it with compute."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from distrijax.parallel.mesh import CFG, EVERY_AXIS, PATCH

Axis = str | tuple[str, ...]

KeysValues = tuple[Array, Array]
"""Keys and values, of the same shape."""

LAST, FIRST = ".last", ".first"
"""What the names of a patch's last and first rows end in. They are sent to different patches: apart, neither is copied for it."""


def local_branches(x: Float[Array, "k ..."]) -> Float[Array, "j ..."]:
    """Those of all guidance branches that are this device's."""
    count = x.shape[0] // lax.axis_size(CFG)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(CFG) * count, count)


def all_gather_flat(share: Float[Array, "n"]) -> Float[Array, "N"]:
    """A flat array of which every device of the mesh has an equal piece."""
    return lax.all_gather(share, EVERY_AXIS, tiled=True, to="invarying")


def gather(x: Shaped[Array, "..."], axis: Axis) -> Shaped[Array, "n ..."]:
    """All patches' `x`, blocking."""
    return lax.all_gather(x, axis)


def gather_rows(x: Shaped[Array, "b t c"], axis: Axis) -> Shaped[Array, "b T c"]:
    """All patches' rows or tokens one after the other, blocking."""
    return lax.all_gather(x, axis, axis=1, tiled=True)


def gather_channels(part: Float[Array, "... c"]) -> Float[Array, "... C"]:
    """All channels, of which every device of an image has an equal part."""
    return lax.all_gather(part, (PATCH, CFG), axis=part.ndim - 1, tiled=True, to="invarying")


def device_sum(x: Array, axis: Axis) -> Array:
    """Sum over the devices along an axis."""
    return lax.psum(x, axis)


def branch_sum(x: Array) -> Array:
    """Sum over the guidance branches that live on the two halves of the mesh."""
    return lax.psum(x, CFG)


def vary_over_cfg(x: Array) -> Array:
    """`x`, the same for all guidance branches, as the input of a computation in which they differ."""
    return lax.pcast(x, CFG, to="varying")


def map_columns(function: Callable[[Array], Array], x: Float[Array, "b h w c"], axis: Axis) -> Float[Array, "b h w c"]:
    """`function` of this patch's band of columns, where `x` and the result are its band of rows."""
    columns = lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)
    return lax.all_to_all(function(columns), axis, split_axis=1, concat_axis=2, tiled=True)


def first_row(rows: int, axis: Axis) -> Array:
    """The global index of this patch's first row (or token), when every patch has `rows`."""
    return lax.axis_index(axis) * rows


def with_neighbours(x: Array, edges: dict[str, Array], axis: Axis, *, apart: bool = False) -> Array:
    """`x` between the edges that its neighbours published; ppermute leaves zeros at the image's border.

    apart: XLA combines permutes of equal lists of pairs, and then all wait for the latest. These have a list of their own:
    the same pairs the other way round.
    """
    n = lax.axis_size(axis)
    order = range(n - 1)[:: -1 if apart else 1]
    down, up = [(i, i + 1) for i in order], [(i + 1, i) for i in order]
    above = [lax.ppermute(edges[LAST], axis, down)] if LAST in edges else []
    below = [lax.ppermute(edges[FIRST], axis, up)] if FIRST in edges else []
    return jnp.concatenate([*above, x, *below], 1)


def all_patches(x: Shaped[Array, "..."], axis: Axis) -> Shaped[Array, "n ..."]:
    """All patches' `x`, which is there long before it is read. On TPUs by permutes (`_in_ring_order`), on others by a gather."""

    def permuted(x):
        return jnp.roll(jnp.stack(_in_ring_order(x, axis)), lax.axis_index(axis), 0)

    return lax.platform_dependent(x, tpu=permuted, default=lambda x: lax.all_gather(x, axis))


def gather_kv(
    own: Float[Array, "b t c2"],
    stale: tuple[Shaped[Array, "b ..."], ...],
    restore: Callable[..., Array],
    axis: Axis,
    *,
    in_order: bool,
    after: Array | None,
) -> tuple[Float[Array, "b t c2"], Float[Array, "b T c"], Float[Array, "b T c"]]:
    """This patch's fresh tokens, for it to publish, and all patches' keys and values: these, and the others' stale ones.

    stale: what the patches published of theirs, and `restore` makes tokens of. in_order: whether patch follows patch; on TPUs
    they otherwise begin with this one. after: what is computed on TPUs before the permutes begin. Without it XLA begins all
    permutes of a step at once, more than can be under way, and what they bring waits in memory.
    """

    def gathered(own, stale, after):
        everyone = restore(*(jnp.moveaxis(lax.all_gather(part, axis), 0, 1) for part in stale))
        # what is published can take the stale value's place in memory as soon as that has been sent; XLA would leave such
        # writing to the end of the step, and until then hold everything twice
        own = _after(own, everyone)
        everyone = lax.dynamic_update_slice_in_dim(everyone, own[:, None], lax.axis_index(axis), axis=1)
        return own, *split_kv(everyone.reshape(own.shape[0], -1, own.shape[-1]))

    def permuted(own, stale, after):
        parts = (_in_ring_order(part if after is None else _after(part, after), axis) for part in stale)
        _, *others = zip(*parts, strict=True)
        # keys apart from values: XLA would put all side by side, and then copy each out of that
        everyone = zip(*map(split_kv, (own, *(restore(*part) for part in others))), strict=True)
        shift = lax.axis_index(axis) * own.shape[1] if in_order else 0
        return own, *(jnp.roll(jnp.concatenate(each, 1), shift, 1) for each in everyone)

    return lax.platform_dependent(own, stale, after, tpu=permuted, default=gathered)


def _in_ring_order(x: Shaped[Array, "..."], axis: Axis) -> list[Shaped[Array, "..."]]:
    """This patch's `x`, that of the next one, and so on, round: each by a permute, which can travel beside any computing.

    A gather travels only inside kernels of products on TPUs, and at SDXL's widths some find none.
    """
    n = lax.axis_size(axis)
    return [x, *(lax.ppermute(x, axis, [((i + far) % n, i) for i in range(n)]) for far in range(1, n))]


def _after(x: Array, read: Array) -> Array:
    """`x`, but not before the first number of `read` is there: XLA may else compute it far too early, or too late."""
    zero = jnp.minimum(jnp.abs(read[(0,) * read.ndim]), 0)  # for XLA not a constant, so x now depends on `read`
    return lax.optimization_barrier(x + zero.astype(x.dtype))


def split_kv(kv: Float[Array, "b t c2"]) -> KeysValues:
    keys, values = jnp.split(kv, 2, -1)
    return keys, values
