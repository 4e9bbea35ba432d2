"""Bands of rows: how the rows of an image are divided among devices, and how many of them are padding."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Bands:
    """How the rows of an image are divided into bands of equal height, one for each patch.

    Patches take the image's rows from the top, so all padding is at the bottom, and the last patches may consist of padding
    only. A model halves or doubles the rows from level to level: those of a band exactly, those of the image rounded up.

    Attributes:
        rows: Rows of the whole image.
        rows_per_device: Rows of each band, padding included.
    """

    rows: int
    rows_per_device: int

    @classmethod
    def among(cls, rows: int, patches: int, *, levels: int = 1) -> Bands:
        """The smallest bands that hold `rows`.

        Args:
            rows: Rows of the whole image.
            patches: How many bands. A single one has the image's own rows, without padding.
            levels: Resolutions of the model, each of half the size of the one before; a band has whole rows at all of them.
        """
        unit = 2 ** (levels - 1)
        return cls(rows, rows if patches == 1 else -(-rows // (patches * unit)) * unit)

    def image_rows(self, band: int) -> int:
        """How many rows the whole image has at the level where each band has `band` rows.

        Args:
            band: Rows of a band at that level, padding included.
        """
        return -(-self.rows * band // self.rows_per_device)
