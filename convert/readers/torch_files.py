"""Torch's files (.ckpt, .bin, .pt, .pth), zip archives and the format before torch 1.6, read without torch.

A pickle may name any function, to be called by whoever opens it. The unpickler here resolves no name to a real one except
`collections.OrderedDict`: torch's functions that rebuild tensors become functions that describe them, and classes of packages
that trainers leave in checkpoints become `Ignored`. Any other name is refused. Data of tensors stays in the file until it is read.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from distrijax.errors import CheckpointError
from distrijax.weights.source import Source, add, checked_shape, cut_rows
from distrijax.weights.tensors import Shape, Tensor, Tensors

LEGACY = b"\x80\x02\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
"""First bytes of a file in the format before torch 1.6: a pickle of a magic number."""

KINDS = "Double f8, Float f4, Half f2, ComplexFloat c8, ComplexDouble c16, Long i8, Int i4, Short i2, Char i1, Byte u1, Bool ?"
STORAGES = {f"{name}Storage": np.dtype(kind) for name, kind in map(str.split, f"{KINDS}, Untyped u1".split(", "))}
STORAGES["BFloat16Storage"] = np.dtype(ml_dtypes.bfloat16)
"""NumPy's types of torch's storages."""

TYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name)) for name in "float8_e4m3fn float8_e5m2 uint16 uint32 uint64".split()
}
"""Types that lie in untyped storages."""

PACKAGES = frozenset(
    "argparse _codecs collections datetime diffusers ldm lightning lightning_fabric lightning_utilities numpy omegaconf pathlib "
    "pytorch_lightning sgm torch torchmetrics transformers typing".split()
)
"""Packages whose classes occur in trainers' checkpoints. They are not imported."""

BUILTINS = frozenset(
    "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple".split()
)


class Storage(NamedTuple):
    """A run of elements that tensors are views of."""

    key: str
    dtype: np.dtype
    count: int


class View(NamedTuple):
    """A tensor as torch describes it: elements of a storage from `start` on, `strides` apart."""

    storage: Storage
    start: int
    shape: Shape
    strides: tuple[int, ...]
    dtype: np.dtype

    def tensor(self, offset: int, read: Callable[[int, Shape, np.dtype], np.ndarray]) -> Tensor:
        """The tensor, of a storage that begins at `offset`; read: as `Source.array`. Raises ValueError for a view beyond it."""
        strides_fit = isinstance(self.strides, tuple) and len(self.strides) == len(self.shape)
        if not strides_fit or not all(type(n) is int and n >= 0 for n in (self.start, *self.strides)):
            raise ValueError("the strides of a tensor do not fit its shape")
        if 0 in self.shape:
            return Tensor(self.shape, self.dtype, lambda: np.empty(self.shape, self.dtype))
        item = self.dtype.itemsize
        span = 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        if (self.start + max(span, math.prod(self.shape))) * item > self.storage.count * self.storage.dtype.itemsize:
            raise ValueError("a tensor has more elements than its storage")
        steps = tuple(stride * item for stride in self.strides)

        def gather(shape: Shape, start: int, span: int) -> np.ndarray:
            elements = read(offset + start * item, (span,), self.dtype)
            return np.asarray(np.ndarray(shape, self.dtype, elements, strides=steps), order="C")

        def rows(start: int, stop: int) -> np.ndarray:
            if start == stop:
                return np.empty((0, *self.shape[1:]), self.dtype)
            others = span - (self.shape[0] - stop + start) * self.strides[0]
            return gather((stop - start, *self.shape[1:]), self.start + start * self.strides[0], others)

        cut = partial(cut_rows, self.shape, rows) if self.shape else None
        return Tensor(self.shape, self.dtype, partial(gather, self.shape, self.start, span), cut)


class Ignored:
    """An object of a class that no tensor needs. It accepts whatever a pickle does to an object."""

    def __init__(self, *_: Any, **__: Any): ...

    def _accept(self, *_: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = _accept


class ParameterDict(dict):
    """torch.nn.ParameterDict, whose parameters are an attribute of it."""

    def __setstate__(self, state: dict) -> None:
        self.update(state["_parameters"])


class Unpickler(pickle.Unpickler):
    """Yields dictionaries of `View`s; runs nothing that a file names."""

    def __init__(self, source: Source, file: BinaryIO):
        super().__init__(file, encoding="latin1")
        self.source = source
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        package = module.partition(".")[0]
        if module == "torch._utils":
            if name not in REBUILD:
                raise ValueError(f"it holds a tensor made by {name}, which cannot be converted")
            return REBUILD[name]
        if package == "torch" and name in (*STORAGES, *TYPES):
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if name == "ParameterDict" and package == "torch":
            return ParameterDict
        if name in BUILTINS if module in ("builtins", "__builtin__") else package in PACKAGES:
            return Ignored
        raise CheckpointError(
            f"{self.source.path} is a pickle that would run {f'{module}.{name}'[:120]!a} when opened, which weights do not "
            "need; do not trust it, and look for a safetensors file instead"
        )

    def persistent_load(self, pid: Any) -> Any:
        """A storage, ("storage", type, key, device, elements); or a class with its source text, ("module", class, ...)."""
        if pid[0] == "module":
            return pid[1]
        _, kind, key, _, count = pid[:5]
        if kind not in STORAGES:
            raise ValueError("it holds tensors of a type that cannot be converted")
        if any(pid[5:]):
            raise ValueError("it holds a view of a storage as written by torch before 0.4")
        return self.storages.setdefault(key, Storage(key, STORAGES[kind], count))


def _rebuild_tensor(storage: Storage, start: int, shape: Any, strides: Any, *_: Any) -> View:
    return View(storage, start, checked_shape(shape), strides, storage.dtype)


def _rebuild_tensor_v3(storage: Storage, start: int, shape: Any, strides: Any, *rest: Any) -> View:
    """rest: requires_grad, backward hooks, data type, metadata."""
    if (dtype := TYPES.get(rest[2])) is None:
        raise ValueError("it holds tensors of a type that cannot be converted")
    return View(storage, start, checked_shape(shape), strides, dtype)


REBUILD = {
    **dict.fromkeys(("_rebuild_tensor", "_rebuild_tensor_v2"), _rebuild_tensor),
    "_rebuild_tensor_v3": _rebuild_tensor_v3,
    **dict.fromkeys(("_rebuild_parameter", "_rebuild_parameter_with_state"), lambda view, *_: view),
}
"""What torch's functions for tensors are replaced by."""


def open_torch_zip(source: Source) -> Tensors:
    """The tensors of a zip archive such as torch writes. Raises CheckpointError for any other."""
    with source.parsed_as("torch file"), zipfile.ZipFile(source.path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or any("/code/" in name for name in names):
            raise CheckpointError(
                f"{source.path} is a zip archive, but not one of weights that torch.save wrote; give one of a state_dict"
            )
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and Entry(source, archive.getinfo(f"{folder}byteorder")).all() != b"little":
            raise ValueError("its bytes are in big-endian order")
        tree = Unpickler(source, io.BytesIO(Entry(source, archive.getinfo(pickles[0])).all())).load()
        found: Tensors = {}
        for name, view in _flattened(tree).items():
            entry = Entry(source, archive.getinfo(f"{folder}data/{view.storage.key}"))
            if entry.size < view.storage.count * view.storage.dtype.itemsize:
                raise ValueError(f"its storage {view.storage.key} is cut off")
            found[name] = view.tensor(entry.offset, entry.array)
        return found


class Entry:
    """An uncompressed entry of a zip archive, and where its bytes begin. Raises ValueError for a compressed one."""

    def __init__(self, source: Source, info: zipfile.ZipInfo):
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"{info.filename!a} is compressed or encrypted, which torch does not do")
        self.source, self.info, self.size = source, info, info.file_size
        name_and_extra = struct.unpack("<HH", source.read(info.header_offset + 26, 4))
        self.offset = info.header_offset + 30 + sum(name_and_extra)

    def all(self) -> bytes:
        return self.array(self.offset, (self.size,), np.dtype(np.uint8)).tobytes()

    def array(self, offset: int, shape: Shape, dtype: np.dtype) -> np.ndarray:
        """As `Source.array`; of a whole entry the CRC-32 is checked, unless torch left it out (0)."""
        array = self.source.array(offset, shape, dtype)
        if array.nbytes == self.size and self.info.CRC not in (0, zlib.crc32(array.reshape(-1).view(np.uint8))):
            raise self.source.broken("torch file", f"the CRC-32 of {self.info.filename!a} is not that of its bytes")
        return array


def open_torch_legacy(source: Source) -> Tensors:
    """The tensors of a file of torch before 1.6: five pickles, then each storage after its number of elements."""
    with source.parsed_as("torch file"), source.open() as file:
        _, version, system = (Unpickler(source, file).load() for _ in range(3))
        if version != 1001 or system["little_endian"] is not True:
            raise ValueError("it is of another version, or in big-endian order")
        unpickler = Unpickler(source, file)
        content = unpickler.load()
        keys = Unpickler(source, file).load()
        offsets, position = {}, file.tell()
        for key in keys:
            storage = unpickler.storages[key]
            count = int.from_bytes(source.read(position, 8), "little")
            if count != storage.count:
                raise ValueError(f"its storage {key} has {count} elements and not {storage.count}")
            offsets[key] = position + 8
            position += 8 + count * storage.dtype.itemsize
        if position > source.size:
            raise ValueError(f"it ends at byte {source.size}, and {position} were promised")
        views = _flattened(content).items()
        return {name: view.tensor(offsets[view.storage.key], source.array) for name, view in views}


def _flattened(content: Any) -> dict[str, View]:
    """The tensors of nested dictionaries, names joined by dots; of a `state_dict` within, if there is one.

    Whatever is not a tensor (an epoch, a learning rate, settings) is left out.
    """
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if isinstance(content, View):
        return {"tensor": content}
    if not isinstance(content, dict):
        raise ValueError("it holds no named tensors")
    found: dict[str, View] = {}
    _collect(content, "", found)
    return found


def _collect(content: dict, prefix: str, found: dict[str, View]) -> None:
    for key, value in content.items():
        if isinstance(value, dict):
            _collect(value, f"{prefix}{key}.", found)
        elif isinstance(value, View) and isinstance(key, str | int):
            add(found, f"{prefix}{key}", value)
