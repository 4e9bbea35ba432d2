"""Bands of rows: how the rows of an image are divided among devices, and where padding fills them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Bands:
    """How the rows of an image are shared out: every patch has `rows_per_device` of them, and those beyond the image's are padding.

    rows: of the whole image. Patches take their rows from the top, so all padding lies at the bottom, and the last patches
    may have nothing else. A model halves or doubles the rows from level to level: those of a band exactly, those of the
    image rounded up.
    """

    rows: int
    rows_per_device: int

    @classmethod
    def among(cls, rows: int, patches: int, *, levels: int = 1) -> Bands:
        """Bands as equal as a model of so many levels allows; a single patch has the image's own rows at every level."""
        unit = 2 ** (levels - 1)
        return cls(rows, rows if patches == 1 else -(-rows // (patches * unit)) * unit)

    def image_rows(self, band: int) -> int:
        """The rows of the whole image at the level where every patch has `band`."""
        return -(-self.rows * band // self.rows_per_device)
