"""A coverage-guided fuzzer of what reads files that nobody vouches for; needs `pip install atheris`, and is no part of the tests.

    PYTHONPATH=tests python tests/fuzz/fuzz_convert.py zip /tmp/corpus-zip -max_total_time=300 -rss_limit_mb=2048 -timeout=10

The first argument is the format whose small real file is the seed: safetensors, zip, legacy, flax (bytes go to `open_tensors`
and, where tensors come out, on to `from_original`), `orbax` (bytes are changes to the files of a folder) or `original` (bytes are
changes to the names and shapes of a real model, which go to `from_original` and back by `to_original`). The second is the folder
in which inputs that reach something new are kept. What follows goes to libFuzzer. Any exception but DistriError, more memory or a
longer time than allowed is a finding: it is printed, and the input lies in `crash-*` of the working folder. To see one again, give
the file in the folder's place.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import atheris

os.environ.setdefault("JAX_PLATFORMS", "cpu")
with atheris.instrument_imports(include=["distrijax.convert", "pickletools", "json"]):
    from distrijax.convert import files
    from distrijax.convert.layouts.family import MARKERS
    from distrijax.convert.layouts.original import from_original, to_original
    from distrijax.convert.readers import orbax_guard
    from distrijax.convert.readers.orbax_files import open_model

import numpy as np
import orbax.checkpoint as ocp
from original_layouts import Shapes, clip, open_clip, prefixed, unet, vae
from tensor_files import small

from distrijax.convert.tensors import Tensor, Tensors
from distrijax.errors import DistriError

SPARE = 4 << 20
"""Bytes that may be taken beside twice the file, or beside what an orbax folder's arrays may become."""

CHANGES = 4
"""To the files of a folder."""

LENGTHS = (0, 1, 2, 3, 4, 5, 8, 9, 32, 64, 77, 128, 320, 768, 1024, 1280, 2048, 49408, 2**40)
HEADS = {"unet": {"attention_head_dim": 8}}
"""A config with what can't be told of models so narrow."""


def check_file(path: Path, content: bytes) -> None:
    """Opens and reads a file of these bytes, in bounded memory."""
    path.write_bytes(content)
    with watched(2 * len(content) + SPARE):
        tensors = files.open_tensors(path)
        check_arrays(tensors)
        check_original(tensors)


@contextmanager
def watched(most: int) -> Iterator[None]:
    """Lets a refusal pass, and raises MemoryError where more bytes than `most` were taken."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
    except DistriError as error:
        check_sentence(error)
    taken = tracemalloc.get_traced_memory()[1] - before
    if taken > most:
        raise MemoryError(f"{taken} bytes were taken, and {most} may be")


def check_arrays(tensors: Tensors) -> None:
    """Reads the tensors one by one."""
    for tensor in tensors.values():
        array = tensor.read()
        if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
            raise AssertionError(f"announced {tensor.shape} {tensor.dtype}, got {array.shape} {array.dtype}")


class Folders:
    """An orbax folder, and changes to its files out of a fuzzer's bytes."""

    def __init__(self, folder: Path):
        self.whole, self.path = folder / "whole", folder / "changed"
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(self.whole, {"a": {"b": np.arange(600.0)}, "c": np.ones((2, 3), np.float16)})
        self.files = sorted(path for path in self.whole.rglob("*") if path.is_file())

    def check(self, content: bytes) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.whole, self.path)
        data = atheris.FuzzedDataProvider(content)
        for _ in range(data.ConsumeIntInRange(0, CHANGES)):
            self.change(data)
        with watched(SPARE + orbax_guard.SPARE):
            check_arrays(open_model(self.path))

    def change(self, data: atheris.FuzzedDataProvider) -> None:
        path = self.path / data.PickValueInList(self.files).relative_to(self.whole)
        old = path.read_bytes() if path.is_file() else b""
        start, length = data.ConsumeIntInRange(0, len(old)), data.ConsumeIntInRange(0, 16)
        new = data.ConsumeBytes(data.ConsumeIntInRange(0, 64))
        if data.ConsumeIntInRange(0, 9) == 0:
            path.unlink(missing_ok=True)
        else:
            content = old[:start] + new + old[start + length :]
            path.write_bytes(sealed(content) if data.ConsumeBool() else content)


def sealed(content: bytes) -> bytes:
    """With the length and the CRC-32C that a manifest or a node needs to be looked at any further."""
    if content[:2] != b"\x0c\xdb" or len(content) < 18:
        return content
    body = content[:4] + len(content).to_bytes(8, "little") + content[12:-4]
    return body + crc32c(body).to_bytes(4, "little")


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def check_original(tensors: Tensors, config: dict | None = None) -> None:
    """From the original layout, and back where that works."""
    try:
        theirs = to_original(from_original(tensors, "file", config=config))
    except DistriError as error:
        check_sentence(error)
        return
    for name in (theirs.keys() & tensors.keys()) - set(MARKERS):
        if _without_ends(theirs[name].shape) != _without_ends(tensors[name].shape):
            raise AssertionError(f"{name} was {tensors[name].shape} and comes back as {theirs[name].shape}")


def _without_ends(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the ones at its end: a linear layer there may come back as a convolution of 1x1, which is the same."""
    return _without_ends(shape[:-1]) if shape[-1:] == (1,) else shape


def check_sentence(error: DistriError) -> None:
    text = str(error)
    if not text.isprintable() or len(text) > 6000:
        raise AssertionError(f"no sentence: {text[:500]!a}")


class Models:
    """Names and shapes of a narrow model of each family, and changes to them out of a fuzzer's bytes."""

    def __init__(self):
        texts = {
            (64, None): prefixed("cond_stage_model.transformer.", clip(64, 1)),
            (64, 0): prefixed("cond_stage_model.model.", open_clip(64, 2)),
            (64, 64 + 5 * 32): prefixed("conditioner.embedders.0.model.", open_clip(64, 2)),
            (128, 64 + 6 * 32): prefixed("conditioner.embedders.0.transformer.", clip(64, 1))
            | prefixed("conditioner.embedders.1.model.", open_clip(64, 2)),
        }
        self.models = [_model(context, label, text) for (context, label), text in texts.items()]

    def changed(self, content: bytes) -> Tensors:
        data = atheris.FuzzedDataProvider(content)
        shapes = dict(data.PickValueInList(self.models))
        names = list(shapes)
        for _ in range(data.ConsumeIntInRange(0, 6)):
            name = names[data.ConsumeIntInRange(0, len(names) - 1)]
            self.change(data, shapes, name, data.ConsumeIntInRange(0, 6))
        return {name: _of_shape(shape) for name, shape in shapes.items()}

    def change(self, data: atheris.FuzzedDataProvider, shapes: dict, name: str, how: int) -> None:
        shape = shapes.get(name, (1,))
        if how == 0:
            shapes.pop(name, None)
        elif how == 1 and shape:  # another length
            axis = data.ConsumeIntInRange(0, len(shape) - 1)
            shapes[name] = (*shape[:axis], data.PickValueInList(list(LENGTHS)), *shape[axis + 1 :])
        elif how == 2:  # another rank
            shapes[name] = shape[: data.ConsumeIntInRange(0, 4)]
        elif how == 3 and data.ConsumeBool():
            shapes[data.PickValueInList(["global_step", "v_pred", "ztsnr", "logvar", "model_ema.x"])] = shape
        elif how == 3:  # another name
            shapes[name[: data.ConsumeIntInRange(0, len(name))] + data.ConsumeUnicode(8)] = shapes.pop(name, (1,))
        elif how == 4:  # another number in the name
            digits = [index for index, letter in enumerate(name) if letter.isdigit()]
            if digits:
                at = digits[data.ConsumeIntInRange(0, len(digits) - 1)]
                shapes[f"{name[:at]}{data.ConsumeIntInRange(0, 10**12)}{name[at + 1 :]}"] = shape
        elif how == 5:  # all that begins so goes
            start = name[: data.ConsumeIntInRange(0, len(name))]
            for other in [other for other in shapes if other.startswith(start)]:
                del shapes[other]
        else:  # all of one length get another
            old, new = (data.PickValueInList(list(LENGTHS)) for _ in range(2))
            shapes.update({n: tuple(new if x == old else x for x in s) for n, s in shapes.items()})


def _model(context: int, label: int | None, text: Shapes) -> Shapes:
    sizes = {"context": context, "linear_projection": label is not None, "middle_depth": 1, "label": label or None}
    painter = prefixed("model.diffusion_model.", unet(32, (1, 2), (0, 1), **sizes))
    return painter | prefixed("first_stage_model.", vae(32, (1,))) | text


def _of_shape(shape: tuple[int, ...]) -> Tensor:
    return Tensor(shape, np.dtype(np.float16), lambda: np.full(shape, np.nan, np.float16))


def target(kind: str) -> Callable[[bytes], None]:
    """What is run with each input."""
    if kind == "original":
        models = Models()
        return lambda content: check_original(models.changed(content), HEADS)
    tracemalloc.start()
    folder = tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    if kind == "orbax":
        return Folders(Path(folder)).check
    path = Path(folder) / "file"
    return lambda content: check_file(path, content)


def main() -> None:
    kind, corpus, *options = sys.argv[1:]
    warnings.simplefilter("ignore")
    if not Path(corpus).is_file():
        Path(corpus).mkdir(parents=True, exist_ok=True)
        seeds = [small()[kind]] if kind in small() else [random.Random(n).randbytes(80) for n in range(60)]
        for number, seed in enumerate(seeds):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], corpus, "-max_len=8192", "-len_control=0", *options], target(kind))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
