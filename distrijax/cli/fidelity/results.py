"""The output folder of `distrijax evaluate`: images, a table of figures, and what both were made with.

    settings.json        what all rows have in common; a run with other values is refused
    fidelity.csv         a row for each setting
    pictures/SETTING/    00000.png, 00001.png ...: image i is of prompt i, with seed i
    pictures/real/       links to the real images, where there are some

All files are written atomically, so an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from distrijax.atomic_write import atomic_write
from distrijax.cli.fidelity.grid import AXES, ONE_DEVICE, Setting, folder_name, text
from distrijax.errors import InvalidArgument

FIGURES = ("exactness", "psnr", "ssim", "lpips", "fid", "fid_real", "received_bytes", "stale_bytes")
"""Columns besides the axes: lossless or lossy; PSNR in dB; SSIM; LPIPS; FID against one device's images, and against real ones;
bytes that the device which receives most receives in a step for one image; bytes that each device keeps for the next step."""

COLUMNS = (*(axis.field for axis in AXES), *FIGURES)

MAX_SHOWN = 250
"""Most characters of two values that an error shows; a list of prompts has more."""

Row = dict[str, str]


class Results:
    """A folder of results.

    Args:
        folder: Where the results are, or will be.
        common: What all rows have in common, by name; None is the same as a name that is left out.

    Raises:
        InvalidArgument: For a folder whose rows have other values in common.
    """

    def __init__(self, folder: Path, common: Mapping[str, Any]):
        common = json.loads(json.dumps(common))  # as it is read back: lists in the place of tuples
        self.folder = folder
        self.table = folder / "fidelity.csv"
        about = folder / "settings.json"
        if about.exists():
            self._check(_read_json(about), common)
        elif self.table.exists():
            raise InvalidArgument(f"{self.table} has no settings.json beside it; choose another --output")
        self.rows = self._read()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgument(
                f"--output {folder} cannot be created ({error.strerror}); choose another folder"
            ) from None
        with atomic_write(about) as beside:
            beside.write_text(json.dumps(common, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def row(self, setting: Setting) -> Row | None:
        """The row of a setting, if it has one.

        Args:
            setting: Of the grid.
        """
        return next((row for row in self.rows if _of(row) == _of(setting)), None)

    def add(self, setting: Setting, figures: Mapping[str, Any]) -> None:
        """Adds the row of a setting to the table, or replaces it.

        Args:
            setting: Of the grid.
            figures: Values of the columns `FIGURES`; those that are missing stay empty.
        """
        row = {column: text({**setting, **figures}.get(column, "")) for column in COLUMNS}
        old = self.row(setting)
        if old is None:
            self.rows.append(row)
        else:
            old.update(row)
        with atomic_write(self.table) as beside, beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)

    def images(self, setting: Mapping[str, Any]) -> Path:
        """The folder of a setting's images.

        Args:
            setting: A setting, or its row in the table.
        """
        return self.folder / "pictures" / folder_name(setting)

    def missing(self, setting: Setting, count: int, batch: int) -> Iterator[range]:
        """Batches with a missing image; batches always begin at the same indices, so images do not depend on interruptions.

        Args:
            setting: Of the grid.
            count: Images of a setting.
            batch: Images of a batch; the last one may have fewer.

        Yields:
            Indices of a batch's images.
        """
        for start in range(0, count, batch):
            indices = range(start, min(start + batch, count))
            if not all(self._image(setting, index).exists() for index in indices):
                yield indices

    def save(self, setting: Setting, index: int, image: Image.Image) -> None:
        """Writes one image of a setting.

        Args:
            setting: Of the grid.
            index: Number of the image's prompt.
            image: Written as PNG.
        """
        path = self._image(setting, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as beside:
            image.save(beside, format="PNG")

    def link_real(self, files: Sequence[Path]) -> Path:
        """Creates a folder of links to the real images.

        Args:
            files: Images; the links are numbered in this order.

        Returns:
            The folder.
        """
        folder = self.folder / "pictures" / "real"
        folder.mkdir(parents=True, exist_ok=True)
        for index, file in enumerate(files):
            with atomic_write(folder / f"{index:05}{file.suffix}") as beside:
                beside.symlink_to(file.absolute())
        return folder

    @property
    def reference(self) -> Path:
        """The folder of one device's images."""
        return self.images(ONE_DEVICE)

    def _image(self, setting: Setting, index: int) -> Path:
        return self.images(setting) / f"{index:05}.png"

    def _check(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                values = f" ({old.get(name)}, now {new.get(name)})"
                values = values if len(values) <= MAX_SHOWN else ""
                raise InvalidArgument(
                    f"--output {self.folder} was made with other {name}{values}; choose another folder, or the same settings"
                )

    def _read(self) -> list[Row]:
        if not self.table.exists():
            return []
        with self.table.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise InvalidArgument(
                    f"{self.table} has other columns than this version writes; choose another --output"
                )
            return list(reader)


def _of(setting: Mapping[str, Any]) -> list[str]:
    """What identifies a setting, and the row that belongs to it."""
    return [text(setting.get(axis.field, "")) for axis in AXES]


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InvalidArgument(f"{path} cannot be read ({error}); choose another --output") from None
