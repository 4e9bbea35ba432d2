"""Figures of `distrijax evaluate`: a table in Markdown, a plot, and a contact sheet of images with their errors."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from distrijax.cli.fidelity.grid import AXES, Axis, label
from distrijax.cli.fidelity.metrics import NOT_AVAILABLE
from distrijax.cli.fidelity.results import Results, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAIN = 4  # factor of the difference maps
THUMBNAIL = 128  # pixels of the longer side
MARGIN, TEXT = 6, 34  # pixels of the sheet


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Groups of rows that differ only in the number of devices, by their label, which leaves out axes that never differ.

    Args:
        rows: Of the table.

    Returns:
        Label to rows in order of the number of devices. The row of one device is left out, and so are empty values of rows.
    """
    filled = [{key: value for key, value in row.items() if value != ""} for row in rows]
    axes = _varying_axes(rows)
    result: dict[str, list[Row]] = {}
    for row in filled:
        if row["devices"] != "1":
            result.setdefault(label(row, axes), []).append(row)
    return {name: sorted(group, key=lambda row: int(row["devices"])) for name, group in result.items()}


def _varying_axes(rows: Sequence[Row]) -> list[Axis]:
    """The axes that name a mode, and the other axes on which rows have different values."""
    return [
        axis
        for axis in AXES
        if issubclass(axis.kind, enum.StrEnum) or len({row[axis.field] for row in rows} - {""}) > 1
    ]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table: a line for each mode; each cell has a figure for each number of devices.

    Args:
        rows: Of the table of results.
    """
    devices = sorted({int(row["devices"]) for row in rows} - {1})
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("", lambda row: row["exactness"]),
        ("PSNR, dB", lambda row: _number(row["psnr"], "z.1f")),
        ("SSIM", lambda row: _number(row["ssim"], "z.3f")),
        ("LPIPS", lambda row: _number(row["lpips"], "z.3f")),
        ("FID", lambda row: _number(row["fid"], "z.2f")),
        ("received per step, MB", lambda row: _number(str(float(row["received_bytes"]) / 1e6), "z.3g")),
    ]
    if any(row["fid_real"] for row in rows):
        columns.insert(5, ("FID, real images", lambda row: _number(row["fid_real"], "z.2f")))
    lines = [[f"on {' / '.join(map(str, devices))} devices", *(name for name, _ in columns)]]
    lines += [["---"] * len(lines[0])]
    for name, group in groups(rows).items():
        by_devices = {int(row["devices"]): row for row in group}
        cells = [[read(by_devices[n]) if n in by_devices else "-" for n in devices] for _, read in columns]
        lines.append([f"`{name}`", *(cell[0] if len(set(cell)) == 1 else " / ".join(cell) for cell in cells)])
    one = next((row for row in rows if row["devices"] == "1"), None)
    if one is not None and one["fid_real"]:
        lines.append(["one device", *(read(one) for _, read in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(text: str, form: str) -> str:
    if text in ("", NOT_AVAILABLE):
        return text
    return "∞" if math.isinf(float(text)) else format(float(text), form)


def plot(rows: Sequence[Row], title: str) -> Figure:
    """Plots PSNR against the bytes received in a step: a line for each mode, a point for each number of devices.

    Lossless modes are off the scale and are drawn on the upper edge.

    Args:
        rows: Of the table of results.
        title: Above the plot.

    Raises:
        ImportError: Without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    lossy = [float(row["psnr"]) for row in rows if row["exactness"] == "lossy"]
    top = max((value for value in lossy if math.isfinite(value)), default=40.0) + 5
    for index, (name, group) in enumerate(groups(rows).items()):
        x = [float(row["received_bytes"]) / 1e6 for row in group]
        exact = all(row["exactness"] == "lossless" for row in group)
        y = [top if exact else min(float(row["psnr"]), top) for row in group]
        name += " (lossless)" if exact else ""
        axes.plot(x, y, marker="os^Dv<>p*"[index % 9], color=f"C{index % 10}", label=name, clip_on=False)
        for row, *place in zip(group, x, y, strict=True):
            axes.annotate(row["devices"], place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="MB received by a device in a step", ylabel="PSNR, dB")
    axes.set_title(title, pad=16)
    axes.set_ylim(top=top)
    axes.grid(alpha=0.3)
    axes.legend(bbox_to_anchor=(1.02, 1), loc="upper left", fontsize=8, title="numbers: devices", title_fontsize=8)
    return figure


def contact_sheet(results: Results, count: int) -> Image.Image:
    """The first images of one device and, below, of each mode on the most devices, each beside its difference.

    Args:
        results: With at least one row.
        count: Images of each mode.
    """
    most = str(max(int(row["devices"]) for row in results.rows))
    chosen = [(results.reference, f"one device; below on {most} devices, right of each image {GAIN} x its difference")]
    for name, group in groups(results.rows).items():
        row = group[-1]
        if row["devices"] == most:
            chosen.append((results.images(row), f"{name}: {_number(row['psnr'], '.1f')} dB"))
    lines = [[_thumbnails(results.reference, folder, index) for index in range(count)] for folder, _ in chosen]
    width, height = lines[0][0][0].size
    sheet = Image.new("RGB", (MARGIN + count * 2 * (width + MARGIN), MARGIN + len(lines) * (height + TEXT)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for row, ((_, words), line) in enumerate(zip(chosen, lines, strict=True)):
        top = MARGIN + row * (height + TEXT)
        pen.text((MARGIN, top + 4), words, "black", font)
        for column, (image, difference) in enumerate(line):
            left = MARGIN + column * 2 * (width + MARGIN)
            sheet.paste(image, (left, top + TEXT - MARGIN))
            if row > 0:
                sheet.paste(difference, (left + width + MARGIN, top + TEXT - MARGIN))
    return sheet


def _thumbnails(reference: Path, folder: Path, index: int) -> tuple[Image.Image, Image.Image]:
    """Thumbnails of an image and of its difference from one device's; the difference is taken at full size."""
    expected, actual = (np.asarray(Image.open(place / f"{index:05}.png"), np.int16) for place in (reference, folder))
    difference = Image.fromarray(np.uint8(np.clip(np.abs(actual - expected) * GAIN, 0, 255)))
    images = Image.fromarray(np.uint8(actual)), difference
    for image in images:
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return images
