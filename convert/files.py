"""Files of tensors, recognised by their content and never by their suffix."""

from __future__ import annotations

from pathlib import Path

from distrijax.convert.readers import flax_files, safetensors_files, torch_files
from distrijax.errors import CheckpointError
from distrijax.weights.source import Source
from distrijax.weights.tensors import Tensors

HEAD = 512

SUPPORTED = "a safetensors file, a file of torch.save (.ckpt, .bin, .pt), or a Flax file (.msgpack)"

FOREIGN = {
    b"GGUF": "a GGUF file, whose weights are quantised",
    b"\x1f\x8b": "a gzip archive, to be unpacked first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive, to be unpacked first",
    b"Rar!": "a RAR archive, to be unpacked first",
    b"\x28\xb5\x2f\xfd": "a zstd archive, to be unpacked first",
    b"\x89HDF": "an HDF5 file, such as Keras writes",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"RIFF": "an image or a sound",
    b"version https://git-lfs": "a pointer of git-lfs, which `git lfs pull` replaces with the file itself",
}
"""First bytes of files that are often mistaken for weights."""

SHARE = 4
"""How many times a file's size its tensors may have: tied weights are stored once and count twice."""


def open_tensors(path: Path) -> Tensors:
    """The tensors of a file, located and not read. Nothing of it is executed.

    path: safetensors, torch's zip archives and older files (a trainer's `state_dict` in them is found), Flax's msgpack (names
    joined by dots). Raises CheckpointError for a file that is something else, which it names, or not whole.
    """
    source = Source(Path(path))
    head = source.head(HEAD)
    tensors = _open(source, head)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; give {SUPPORTED}")
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
    raise CheckpointError(f"{source.path} is {foreign or 'of an unknown kind'}; give {SUPPORTED}")


def _foreign(head: bytes) -> str | None:
    """What a file without readable tensors is, if its kind is known."""
    if not head:
        return "empty"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, perhaps one that asks to log in"
    if text.startswith((b"{", b"[")):
        return "a text, perhaps JSON"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[:1] == b"\x08" and head[2:3] == b"\x12":
        return "an ONNX model"
    if head.startswith(b"\x80") and len(head) > 1 and head[1] <= 5:
        return "a pickle, but none that torch.save wrote"
    if len(head) > 8 and head[8:9] == b"{":
        return "a safetensors file that is cut off"
    return next((what for start, what in FOREIGN.items() if head.startswith(start)), None)


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; nothing for other formats."""
    source = Source(Path(path))
    is_one = safetensors_files.is_safetensors(source.head(HEAD), source.size)
    return safetensors_files.read_metadata(source) if is_one else {}
