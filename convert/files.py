"""Files of tensors, known by their content and never by their suffix."""

from __future__ import annotations

from pathlib import Path

from distrijax.convert.readers import flax_files, safetensors_files, torch_files
from distrijax.convert.source import Source
from distrijax.convert.tensors import Tensors
from distrijax.errors import DistriError

HEAD = 512

SUPPORTED = "a safetensors file, a file of torch.save (.ckpt, .bin, .pt), or a Flax file (.msgpack)"

FOREIGN = {
    b"GGUF": "a GGUF file, whose weights are quantised",
    b"ustar": "a tar archive",
    b"\x1f\x8b": "a gzip archive, to be unpacked first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive, to be unpacked first",
    b"Rar!": "a RAR archive, to be unpacked first",
    b"\x28\xb5\x2f\xfd": "a zstd archive, to be unpacked first",
    b"BZh": "a bzip2 archive, to be unpacked first",
    b"\xfd7zXZ": "an xz archive, to be unpacked first",
    b"\x89HDF": "an HDF5 file, such as Keras writes",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"RIFF": "a picture or a sound",
    b"version https://git-lfs": "a pointer of git-lfs, in whose place `git lfs pull` puts the file itself",
    b"\x08\x03\x12": "an ONNX model",
    b"\x08\x04\x12": "an ONNX model",
    b"\x08\x05\x12": "an ONNX model",
    b"\x08\x06\x12": "an ONNX model",
    b"\x08\x07\x12": "an ONNX model",
    b"\x08\x08\x12": "an ONNX model",
    b"\x08\x09\x12": "an ONNX model",
    b"\x08\x0a\x12": "an ONNX model",
}
"""Beginnings of files that are often taken for others."""

SHARE = 4
"""How many times a file's size its tensors may have; weights that are tied are there once and count twice."""


def open_tensors(path: Path) -> Tensors:
    """The tensors of a file, found and not read; none of it is executed, and no more memory is taken than twice what it has bytes
    and 32 MB (`Source.spend` is the account of what describes the tensors).

    path: safetensors, torch's zip archives and older files (a trainer's `state_dict` in them is found), Flax's msgpack (names
    joined by dots). Raises DistriError, which names what the file is where it is something else, for one that is not whole
    and for one whose tensors no memory could hold.
    """
    source = Source(Path(path))
    head = source.head(HEAD)
    tensors = _open(source, head)
    if not tensors:
        raise DistriError(f"{path} holds no tensors; give {SUPPORTED}")
    if sum(tensor.nbytes for tensor in tensors.values()) > SHARE * source.size:
        raise source.broken("file of weights", f"its {source.size} bytes would become more than {SHARE} times as many")
    return tensors


def _open(source: Source, head: bytes) -> Tensors:
    if safetensors_files.is_safetensors(head, source.size):
        return safetensors_files.open_safetensors(source)
    if head.startswith(b"PK\3\4"):
        return torch_files.open_torch_zip(source)
    if head.startswith(torch_files.LEGACY):
        return torch_files.open_torch_legacy(source)
    foreign = _foreign(head)
    if foreign is None and flax_files.is_flax(head):
        return flax_files.open_flax(source)
    raise DistriError(f"{source.path} is {foreign or 'of a kind that is not known'}; give {SUPPORTED}")


def _foreign(head: bytes) -> str | None:
    """What a file is that holds no tensors that could be read, if it is known."""
    if not head:
        return "empty"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, perhaps one that asks to log in"
    if text.startswith((b"{", b"[")):
        return "a text, perhaps JSON"
    if head[257:262] == b"ustar":
        return FOREIGN[b"ustar"]
    if head.startswith(b"\x80") and len(head) > 1 and head[1] <= 5:
        return "a pickle, but none that torch.save wrote"
    if len(head) > 8 and head[8:9] == b"{":
        return "a safetensors file that is cut off"
    return next((what for start, what in FOREIGN.items() if head.startswith(start)), None)


def metadata_of(path: Path) -> dict[str, str]:
    """What a file says of itself; nothing where its format can't."""
    source = Source(Path(path))
    if not safetensors_files.is_safetensors(source.head(HEAD), source.size):
        return {}
    return safetensors_files.read_metadata(path)
