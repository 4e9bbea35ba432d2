"""Images larger than the model was trained for: at which steps the deep part of the UNet runs at which size.

Beyond the trained size a model repeats objects. What an image shows is decided in the early steps, and there the deep part sees a
map of the trained size; the last steps, at the full size, draw the edges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from distrijax.config import Parallelism
from distrijax.errors import InvalidArgument
from distrijax.parallel.layout import Layout

Size = tuple[int, int]
"""Rows and columns of a map."""

LARGE = 1.6
"""Times the trained area, above which "auto" shrinks."""

TWO_LEVELS = 2.8
"""Times the trained length of a side, above which "auto" shrinks in two levels."""

UNTIL, SECOND_UNTIL = 350.0, 200.0
"""Timesteps down to which "auto" shrinks: to the trained size, and by the second level to twice that.

With the embedded model they show all named shapes at two and four times the trained size; a higher first one does not.
"""

Shrinking = Sequence[tuple[float, Size]]
"""Timesteps, descending, and the size of the deep part's map at the timesteps above each."""


def is_large(latent: Size, trained: Size) -> bool:
    """Whether an image is larger than a model draws well.

    Args:
        latent: Rows and columns of its latents.
        trained: Those that the model was trained for.
    """
    return math.prod(latent) > LARGE * math.prod(trained)


def read_large(large: str | Sequence[tuple[float, float]], layout: Layout, trained: Size) -> Shrinking:
    """What a call's `large` means for its size; empty where nothing shrinks.

    Args:
        large: As `distrijax.config.check_large` returns it.
        layout: The layout of the latents.
        trained: Rows and columns of the latents that the model was trained for.

    Raises:
        InvalidArgument: For pairs, where patches are independent images.
    """
    if large == "off" or (large == "auto" and not is_large(layout.latent, trained)):
        return ()
    if layout.parallelism is Parallelism.NAIVE_PATCH:
        if large == "auto":
            return ()
        raise InvalidArgument("large has no effect with parallelism naive_patch, whose patches are images; remove it")
    if large == "auto":
        factor = math.sqrt(math.prod(trained) / math.prod(layout.latent))
        large = [(UNTIL, factor)]
        if 1 / factor > TWO_LEVELS:
            large.append((SECOND_UNTIL, 2 * factor))
    return [(timestep, _shrunk(layout, factor)) for timestep, factor in large]


def _shrunk(layout: Layout, factor: float) -> Size:
    """The size of the latents times a factor, in multiples of what the UNet halves."""
    unit = 2 ** (layout.levels - 1)
    rows, columns = (max(unit, round(side * factor / unit) * unit) for side in layout.latent)
    return rows, columns


def deep_sizes(shrinking: Shrinking, timesteps: Sequence[float]) -> list[Size | None]:
    """The size of the deep part's map at each step; None for that of the latents.

    Args:
        shrinking: Of `read_large`.
        timesteps: Of the steps.
    """
    return [next((size for above, size in shrinking if timestep > above), None) for timestep in timesteps]
