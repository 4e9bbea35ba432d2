"""What an orbax folder may hold, checked before a library sees any of it: its files, and how large what is packed would become.

    _METADATA                  the names of the arrays, and what they are
    manifest.ocdbt, d/*        a B-tree from `name/.zarray` to an array's description, and from `name/0.1` to a chunk of it
    ocdbt.process_0/...        the same of each process that wrote; the folder's own tree points into these

Chunks and the tree's nodes are packed by zstd, of which four bytes may become 128 KB.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from distrijax.convert.source import Source

METADATA = "_METADATA"

ALLOWED = re.compile(
    r"(_METADATA|_CHECKPOINT_METADATA|_sharding|commit_success\.txt|array_metadatas(/process_\d+)?"
    r"|(ocdbt\.process_\d+/)?(manifest\.ocdbt|d|d/[0-9a-f]{32})|ocdbt\.process_\d+)"
)
"""Files and folders of a model that orbax wrote."""

FILES = 20_000
"""In a folder: orbax writes one for 2 GB, and a few for each process."""

SMALL = 16 << 20
"""Bytes of a description: a whole SDXL's is 0.4 MB."""

SHARE, SPARE = 4, 32 << 20
"""What a folder's arrays may become: so many times its bytes, and so many more."""

NODE = 16 << 20
"""What a node of the tree may become; those of tensorstore are split at 8 MB."""

BLOCK, SPLIT = 128 << 10, 32 << 10
"""What a block of zstd becomes at most, and at least where orbax wrote it, but for the last one: where the statistics change, zstd
cuts what would be a block in up to four. Only blocks of one byte, and those that are not packed, tell what they become."""

WINDOW = 4 << 20
"""Bytes of a file in which nodes are looked for at a time."""

MAGICS = (b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x20\xde", b"\x0c\xdb\x12\x34")
"""How manifests, nodes and nodes of versions begin: this, a length of 8 bytes, a version, and 1 where zstd follows."""

ZSTD = b"\x28\xb5\x2f\xfd"


def check_folder(folder: Path) -> int:
    """How many bytes a model's arrays may become. Raises ValueError for a folder that no library should open."""
    if folder.is_symlink():
        raise ValueError("it is a link")
    files = list(_files(folder))
    if METADATA not in (path.name for path in files) or not (folder / "manifest.ocdbt").is_file():
        raise ValueError(f"it has no {METADATA} or no manifest.ocdbt")
    sources = [Source(path) for path in files]
    for source in sources:
        if source.path.parent.name == "d" or source.path.name == "manifest.ocdbt":
            _check_nodes(source)
        elif source.size > SMALL:
            raise ValueError(f"its {source.path.name} has {source.size} bytes")
    return SHARE * sum(source.size for source in sources) + SPARE


def _files(folder: Path) -> Iterator[Path]:
    """The regular files. No link is followed, and nothing that may block is opened."""
    pending, left = [folder], FILES
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                path, left = Path(entry.path), left - 1
                name = path.relative_to(folder).as_posix()
                mode = entry.stat(follow_symlinks=False).st_mode
                if left < 0 or not ALLOWED.fullmatch(name) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise ValueError(f"it holds {name[:100]!a}, which orbax doesn't write, or too much")
                if stat.S_ISDIR(mode):
                    pending.append(path)
                else:
                    yield path


def _check_nodes(source: Source) -> None:
    """Raises ValueError where a node of the tree lies in a file that would become too large."""
    before = b""
    for start in range(0, source.size, WINDOW):
        data = before + source.read(start, min(WINDOW, source.size - start))
        for magic in MAGICS:
            at = data.find(magic)
            while at >= 0:
                _check_node(source, start - len(before) + at)
                at = data.find(magic, at + 1)
        before = data[-3:]


def _check_node(source: Source, at: int) -> None:
    head = source.read(at, min(18, source.size - at))
    length = int.from_bytes(head[4:12], "little")
    if head[12:14] == b"\0\1" and head[14:18] == ZSTD and length <= source.size - at:
        if length > NODE:
            raise ValueError(f"a node of its tree has {length} bytes")
        check_unpacked(source.read(at + 14, max(length - 18, 0)), NODE)


def check_unpacked(data: bytes, most: int) -> None:
    """Raises ValueError for what isn't zstd throughout, and what can't be `most` bytes: it has more of what tells its size, or too
    many blocks. What passes becomes at most four times as much and a few blocks.
    """
    if _least(data, most + BLOCK) > most + BLOCK:
        raise ValueError(f"{len(data)} bytes of it would become more than {most}")


def _least(data: bytes, most: int) -> int:
    """What the blocks of all frames (RFC 8878, 3.1.1) become where zstd wrote them, added until it is more than `most`."""
    at = least = 0
    while at < len(data):
        if data[at : at + 4] != ZSTD or at + 5 > len(data):
            raise ValueError("what should be packed by zstd isn't")
        flags = data[at + 4]
        single = flags >> 5 & 1
        at += 5 + (not single) + (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6]
        last = 0
        while not last:
            block = int.from_bytes(data[at : at + 3], "little")
            last, kind, size = block & 1, block >> 1 & 3, block >> 3
            at += 3 + (1 if kind == 1 else size)
            least += SPLIT if kind == 2 else size  # what is not packed, or one byte again and again, tells its size
            if at > len(data) or size > BLOCK or kind == 3:
                raise ValueError("what is packed in it is cut off")
            if least > most:
                return least
        at += 4 * (flags >> 2 & 1)
    return least
