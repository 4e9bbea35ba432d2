"""Prompts of `distrijax evaluate`: held-out captions of the embedded model's scenes, lines of a file, or COCO 2014."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distrijax.cli.fidelity.scenes import held_out_example
from distrijax.errors import InvalidArgument

KARPATHY, OFFICIAL = "dataset_coco.json", "captions_val2014.json"


class Prompts(NamedTuple):
    """Prompts and their real images.

    Attributes:
        texts: Prompts in the order of their seeds.
        images: Real images that the prompts caption; None where there are none.
    """

    texts: list[str]
    images: list[Path] | None = None


def scene_prompts(count: int) -> Prompts:
    """Captions of scenes held out of the embedded model's training.

    Args:
        count: How many, from the first one on.
    """
    return Prompts([held_out_example(0, index, 64, 64)[1] for index in range(count)])


def file_prompts(path: Path, count: int | None) -> Prompts:
    """The lines of a file, without empty ones.

    Args:
        path: Text in UTF-8.
        count: How many lines to take, from the first one on; None takes all.

    Raises:
        InvalidArgument: For a file that cannot be read or has too few lines.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            f"--prompts {path} cannot be read ({error}); give a text file with a prompt on each line"
        ) from None
    texts = list(filter(None, lines))
    if not texts or len(texts) < (count or 0):
        raise InvalidArgument(
            f"--prompts {path} has {len(texts)} prompts; give at least {count or 1}, or lower --captions"
        )
    return Prompts(texts[:count])


def coco_prompts(folder: Path, count: int) -> Prompts:
    """One caption for each of the first `count` validation images of COCO 2014: of image i, caption i modulo their number.

    The paper's script chooses so among the 5,000 images that Karpathy's split (dataset_coco.json) calls "val", in its order.
    Without that file, the images are the first of the official captions_val2014.json, which are different ones. Both files
    may be in FOLDER/annotations or in FOLDER; the real images are in FOLDER/val2014.

    Args:
        folder: The data set, or its annotations.
        count: Number of images.

    Raises:
        InvalidArgument: For a folder without the files, with too few captions, or with files of another format.
    """
    found = [path for name in (KARPATHY, OFFICIAL) for path in (folder / "annotations" / name, folder / name)]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise InvalidArgument(
            f"--coco {folder} has neither annotations/{KARPATHY} nor annotations/{OFFICIAL}; "
            "unpack COCO 2014's annotations there"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = list(_karpathy(content) if path.name == KARPATHY else _official(content))
        texts = [captions[index % len(captions)].strip() for index, (_, captions) in enumerate(entries[:count])]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InvalidArgument(f"{path} is not a COCO captions file ({error!r}); download it again") from None
    if len(texts) < count:
        raise InvalidArgument(f"{path} has captions of {len(texts)} images; lower --captions to that")
    images = folder / "val2014"
    if not images.is_dir():
        return Prompts(texts)
    files = [images / name for name, _ in entries[:count]]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InvalidArgument(f"{len(missing)} images are missing, {missing[0]} the first; unpack all of val2014")
    return Prompts(texts, files)


def _karpathy(content: Any) -> Iterator[tuple[str, list[str]]]:
    """File and captions of each image in the split "val"."""
    for image in content["images"]:
        if image["split"] == "val":
            yield image["filename"], [sentence["raw"] for sentence in image["sentences"]]


def _official(content: Any) -> Iterator[tuple[str, list[str]]]:
    """File and captions of each image, ordered by the captions' ids."""
    captions: dict[int, list[str]] = {}
    for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    for image in content["images"]:
        yield image["file_name"], captions[image["id"]]
