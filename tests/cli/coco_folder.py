"""Folders as of COCO."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image


def coco(folder: Path, *, karpathy: bool, images: int = 3) -> Path:
    """A made-up COCO folder: images 70, 60, 50 with two captions each; Karpathy's file has one more, for training."""
    ids = [70 - 10 * index for index in range(3)]
    files = {ids[index]: f"COCO_val2014_{ids[index]:012}.jpg" for index in range(3)}
    captions = [{"id": 9 - 2 * n + k, "image_id": i, "caption": f"{i} {k}"} for n, i in enumerate(ids) for k in (1, 0)]
    official = {"images": [{"id": i, "file_name": file} for i, file in files.items()], "annotations": captions}
    split = [{"split": "restval", "filename": "other.jpg", "sentences": [{"raw": "no"}]}]
    split += [
        {"split": "val", "filename": file, "sentences": [{"raw": f"K {i} {k} "} for k in (0, 1)]}
        for i, file in files.items()
    ]
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(official))
    if karpathy:
        (folder / "annotations" / "dataset_coco.json").write_text(json.dumps({"images": split}))
    (folder / "val2014").mkdir()
    for file in list(files.values())[:images]:
        Image.new("RGB", (40, 30), "red").save(folder / "val2014" / file)
    return folder
