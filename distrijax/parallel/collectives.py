"""The collectives of a step, and what makes XLA overlap them with compute.

Exchanges (`exchange.py`) decide what devices send each other; this module decides how. What is known from the previous step can
start early: halo rows by permutes (`with_neighbours`), the rest by all-gathers (`all_patches`, `gather_kv`). TPUs use permutes for
the rest, too: there an all-gather overlaps with compute only inside the kernel of a matmul, and at SDXL's widths some find none.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from distrijax.parallel.mesh import CFG, EVERY_AXIS, PATCH
from distrijax.parallel.platform import platform_dependent

Axis = str | tuple[str, ...]

KeysValues = tuple[Array, Array]
"""Keys and values, of the same shape."""

LAST, FIRST = ".last", ".first"
"""Suffixes of the keys of a patch's last and first rows: two arrays, because a part of one would be copied before it is sent."""


def local_branches(x: Float[Array, "k ..."]) -> Float[Array, "j ..."]:
    """This device's guidance branches, of all branches.

    Args:
        x: An array whose first axis is all guidance branches.
    """
    count = x.shape[0] // lax.axis_size(CFG)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(CFG) * count, count)


def all_gather_flat(share: Float[Array, "n"]) -> Float[Array, "N"]:
    """All-gathers a flat array of which every device of the mesh has an equal share.

    Args:
        share: This device's share, [n].
    """
    return lax.all_gather(share, EVERY_AXIS, tiled=True, to="invarying")


def gather(x: Shaped[Array, "..."], axis: Axis) -> Shaped[Array, "n ..."]:
    """All-gathers `x` along a new first axis, blocking.

    Args:
        x: This patch's array.
        axis: The mesh axis, or axes, of the patches.
    """
    return lax.all_gather(x, axis)


def gather_rows(x: Shaped[Array, "b t c"], axis: Axis) -> Shaped[Array, "b T c"]:
    """All-gathers `x` along its second axis (rows, or pixels), blocking.

    Args:
        x: This patch's rows or pixels, [b, t, c].
        axis: The mesh axis, or axes, of the patches.
    """
    return lax.all_gather(x, axis, axis=1, tiled=True)


def gather_channels(part: Float[Array, "... c"]) -> Float[Array, "... C"]:
    """All-gathers channels of which every device of an image has an equal part.

    Args:
        part: This device's channels, [..., c].
    """
    return lax.all_gather(part, (PATCH, CFG), axis=part.ndim - 1, tiled=True, to="invarying")


def device_sum(x: Array, axis: Axis) -> Array:
    """Sums over the devices along an axis.

    Args:
        x: Summed elementwise.
        axis: A mesh axis, or several.
    """
    return lax.psum(x, axis)


def branch_sum(x: Array) -> Array:
    """Sums over the guidance branches, which are on two halves of the mesh.

    Args:
        x: Of this device's branch; the result is the same on both halves.
    """
    return lax.psum(x, CFG)


def vary_over_cfg(x: Array) -> Array:
    """Marks `x`, which is the same for all guidance branches, as the input of a computation in which they differ.

    Args:
        x: Its values stay as they are, and nothing is transferred.
    """
    return lax.pcast(x, CFG, to="varying")


def map_columns(function: Callable[[Array], Array], x: Float[Array, "b h w c"], axis: Axis) -> Float[Array, "b h w c"]:
    """Applies `function` to bands of columns, where `x` and the result are bands of rows.

    Args:
        function: Maps [b, H, w, c] to the same shape.
        x: A band of rows, [b, h, W, c].
        axis: The mesh axis, or axes, of the patches.
    """
    columns = lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)
    return lax.all_to_all(function(columns), axis, split_axis=1, concat_axis=2, tiled=True)


def first_row(rows: int, axis: Axis) -> Array:
    """The index in the image of this patch's first row.

    Args:
        rows: Rows of every patch.
        axis: The mesh axis, or axes, of the patches.
    """
    return lax.axis_index(axis) * rows


def with_neighbours(x: Array, edges: dict[str, Array], axis: Axis, *, separate: bool = False) -> Array:
    """Puts the neighbours' edges above and below `x`; ppermute leaves zeros at the image's border.

    Args:
        x: This patch.
        edges: What every patch sends: its last rows to the patch below, under `LAST`, and its first ones to the patch above,
            under `FIRST`; either may be missing.
        axis: The mesh axis, or axes, of the patches.
        separate: Whether XLA must not combine these permutes with others. It combines permutes with equal lists of pairs, and
            all of them then wait for the latest; so these list the same pairs in reverse order.
    """
    n = lax.axis_size(axis)
    order = range(n - 1)[:: -1 if separate else 1]
    down, up = [(i, i + 1) for i in order], [(i + 1, i) for i in order]
    above = [lax.ppermute(edges[LAST], axis, down)] if LAST in edges else []
    below = [lax.ppermute(edges[FIRST], axis, up)] if FIRST in edges else []
    return jnp.concatenate([*above, x, *below], 1)


def all_patches(x: Shaped[Array, "..."], axis: Axis) -> Shaped[Array, "n ..."]:
    """All patches' `x`, which is known long before it is read: by permutes on TPUs, by an all-gather elsewhere.

    Args:
        x: This patch's array.
        axis: The mesh axis, or axes, of the patches.
    """

    def permuted(x):
        return jnp.roll(jnp.stack(_in_ring_order(x, axis)), lax.axis_index(axis), 0)

    return platform_dependent(x, tpu=permuted, default=lambda x: lax.all_gather(x, axis))


def gather_kv(
    own: Float[Array, "b t c2"],
    stale: tuple[Shaped[Array, "b ..."], ...],
    restore: Callable[..., Array],
    axis: Axis,
    *,
    in_order: bool,
    after: Array | None,
) -> tuple[Float[Array, "b t c2"], Float[Array, "b T c"], Float[Array, "b T c"]]:
    """Keys and values of all patches: this patch's of this step, the others' of the previous one.

    Args:
        own: This patch's keys and values of this step, side by side.
        stale: What this patch published at the previous step: keys and values, or their compressed form.
        restore: Makes keys and values of `stale`.
        axis: The mesh axis, or axes, of the patches.
        in_order: Whether the result must be in the order of the patches. If not, it begins with this patch on TPUs.
        after: What is computed before the permutes start, on TPUs. Without it XLA starts all permutes of a step at once; more
            than can be under way, and their results wait in memory.

    Returns:
        `own`, which is to be published, and the keys and the values of all patches.
    """

    def gathered(own, stale, after):
        everyone = restore(*(jnp.moveaxis(lax.all_gather(part, axis), 0, 1) for part in stale))
        # `own` is published, and can take the stale value's place in memory once that has been sent. Without this dependency
        # XLA writes it at the end of the step, and holds both until then.
        own = _after(own, everyone)
        everyone = lax.dynamic_update_slice_in_dim(everyone, own[:, None], lax.axis_index(axis), axis=1)
        return own, *split_kv(everyone.reshape(own.shape[0], -1, own.shape[-1]))

    def permuted(own, stale, after):
        parts = (_in_ring_order(part if after is None else _after(part, after), axis) for part in stale)
        _, *others = zip(*parts, strict=True)
        # keys and values are concatenated separately: XLA would concatenate them together and then copy each out
        everyone = zip(*map(split_kv, (own, *(restore(*part) for part in others))), strict=True)
        shift = lax.axis_index(axis) * own.shape[1] if in_order else 0
        return own, *(jnp.roll(jnp.concatenate(each, 1), shift, 1) for each in everyone)

    return platform_dependent(own, stale, after, tpu=permuted, default=gathered)


def _in_ring_order(x: Shaped[Array, "..."], axis: Axis) -> list[Shaped[Array, "..."]]:
    """This patch's `x`, that of the next patch, and so on around the ring: one permute each, which any compute can overlap."""
    n = lax.axis_size(axis)
    return [x, *(lax.ppermute(x, axis, [((i + far) % n, i) for i in range(n)]) for far in range(1, n))]


def _after(x: Array, read: Array) -> Array:
    """`x`, but not before the first element of `read` is computed; XLA may otherwise schedule it far too early, or too late."""
    zero = jnp.minimum(jnp.abs(read[(0,) * read.ndim]), 0)  # not a constant to XLA, so `x` now depends on `read`
    return lax.optimization_barrier(x + zero.astype(x.dtype))


def split_kv(kv: Float[Array, "b t c2"]) -> KeysValues:
    """Splits keys and values, [b, t, c] each.

    Args:
        kv: Keys and values side by side, [b, t, 2 c].
    """
    keys, values = jnp.split(kv, 2, -1)
    return keys, values
