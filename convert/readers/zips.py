"""The directory of a zip archive, for archives whose entries lie there as they are; torch's do.

Python's zipfile would do, and would take memory for whatever a file says before its caller could ask how much.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from distrijax.convert.source import Source

DIRECTORY = 16 << 20
"""Bytes of a directory: those of a whole SDXL with an optimiser are 0.6 MB."""

PIECE = 1 << 20
"""Bytes that are read at a time."""

END, END64, LOCATOR, ENTRY, LOCAL = (b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4")


class Entry(NamedTuple):
    """Where an entry's bytes begin in the file, how many there are, whether they are compressed or encrypted, and their CRC-32.

    crc: 0 where none was written, as torch leaves them out where it is told to.
    """

    offset: int
    size: int
    packed: bool
    crc: int

    def check(self, crc: int) -> None:
        """Raises ValueError where its bytes have another CRC-32 than was written."""
        if self.crc not in (0, crc):
            raise ValueError("the CRC-32 of an entry is not that of its bytes")


def stored(entries: dict[str, Entry], name: str) -> Entry:
    """The entry of that name. Raises ValueError where there is none, and for one that would have to be unpacked."""
    if name not in entries:
        raise ValueError(f"{name!r} is missing")
    if entries[name].packed:
        raise ValueError(f"{name!r} is compressed or encrypted, as torch never does it")
    return entries[name]


def check(source: Source, entry: Entry) -> None:
    """Reads an entry for its CRC-32. Raises ValueError where it isn't the one that was written."""
    crc = 0
    for start in range(0, entry.size, PIECE):
        crc = zlib.crc32(source.read(entry.offset + start, min(PIECE, entry.size - start)), crc)
    entry.check(crc)


def entries(source: Source) -> dict[str, Entry]:
    """The entries by name. Raises ValueError for an archive that isn't whole or that has a name twice."""
    start, size = _directory(source)
    if size > DIRECTORY:
        raise ValueError(f"its directory would be {size} bytes")
    source.spend(size)
    directory = source.read(start, size)
    found: dict[str, Entry] = {}
    position = 0
    while directory[position : position + 4] == ENTRY:
        name, entry, position = _entry(source, directory, position)
        source.add(found, name, entry)
    if position != size:
        raise ValueError("its directory is cut off")
    return found


def _directory(source: Source) -> tuple[int, int]:
    """Offset and size of the central directory, by the record at the end."""
    start = max(0, source.size - 22 - 0xFFFF)  # a comment may follow
    tail = source.read(start, source.size - start)
    if (at := tail.rfind(END)) < 0 or len(tail) - at < 22:
        raise ValueError("it has no directory")
    size, offset = struct.unpack_from("<II", tail, at + 12)
    if at >= 20 and tail[at - 20 : at - 16] == LOCATOR:  # more than 4 GB, or a writer that always says so
        (where,) = struct.unpack_from("<Q", tail, at - 12)
        record = source.read(where, 56)
        if record[:4] != END64:
            raise ValueError("its directory is not where it says")
        size, offset = struct.unpack_from("<QQ", record, 40)
    return offset, size


def _entry(source: Source, directory: bytes, position: int) -> tuple[str, Entry, int]:
    """One entry of the directory, and the position after it."""
    try:
        flags, method = struct.unpack_from("<HH", directory, position + 8)
        crc, packed, size, name_length, extra_length, comment_length = struct.unpack_from(
            "<IIIHHH", directory, position + 16
        )
        (local,) = struct.unpack_from("<I", directory, position + 42)
    except struct.error:
        raise ValueError("its directory is cut off") from None
    middle = position + 46 + name_length
    name = directory[position + 46 : middle].decode("utf-8")
    size, packed, local = _wide(directory[middle : middle + extra_length], [size, packed, local])
    header = source.read(local, 30)
    if header[:4] != LOCAL:
        raise ValueError(f"{name!r} is not where it says")
    offset = local + 30 + sum(struct.unpack_from("<HH", header, 26))
    if offset + packed > source.size:
        raise ValueError(f"{name!r} ends beyond the file")
    return (
        name,
        Entry(offset, packed, bool(method or flags & 1 or packed != size), crc),
        middle + extra_length + comment_length,
    )


def _wide(extra: bytes, numbers: list[int]) -> list[int]:
    """Numbers of which those that are 2^32 - 1 stand, in order and with 64 bits, in the field 1 of `extra`."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        field = extra[position + 4 : position + 4 + length]
        position += 4 + length
        if kind == 1:
            values = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            numbers = [next(values, number) if number == 0xFFFFFFFF else number for number in numbers]
    return numbers
