"""Tensor parallelism's weights: which part of a layer's channels each device holds (arXiv 1909.08053, section 3).

Layers say how they may be divided (`distrijax.models.layers.TPSpec`): attention by heads, the feed-forward network and what lies
between the two convolutions of a resnet by channels, convolutions that change the size by input channels. Here their
parameters are laid out for that: along the divided axis the channels are padded with zeros to a multiple of the devices,
which changes no sum, and put in the devices' order, so that an even cut gives each its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from distrijax.config import Parallelism
from distrijax.models.layers import TPKind, TPSpec, walk
from distrijax.parallel.collectives import all_gather_flat
from distrijax.parallel.mesh import CFG, EVERY_AXIS, PATCH
from distrijax.parallel.processes import blocks_to_devices
from distrijax.parallel.programs import Params
from distrijax.weights.load import Place, Values
from distrijax.weights.names import ParamPath


class ChannelSharded(NamedTuple):
    """A parameter whose `axis` has `length` channels, divided as `tp` says among the devices along some axes of the mesh."""

    axis: int
    tp: TPSpec
    length: int
    among: tuple[str, ...] = (PATCH,)

    def spec(self) -> P:
        """How the laid out parameter lies on the mesh."""
        return P(*[None] * self.axis, self.among)

    def shape(self, shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of a parameter that is laid out. sizes: of the mesh's axes."""
        devices = self._devices(sizes)
        return (*shape[: self.axis], devices * self._each(devices), *shape[self.axis + 1 :])

    def block(self, value: Values, sizes: Mapping[str, int], at: tuple[slice, ...]) -> Float[np.ndarray, "..."]:
        """What the parameter in the order of the devices, padded with zeros, has at the place of one of them."""
        devices, parts = self._devices(sizes), self.tp.chunks
        if self.length % (self.tp.multiple_of * parts):
            raise ValueError(f"{self.length} channels are not {parts} parts of units of {self.tp.multiple_of}")
        share, length = self._each(devices) // parts, self.length // parts
        first = (at[self.axis].start or 0) // parts

        def part(number: int) -> np.ndarray:
            start, stop = (number * length + min(end, length) for end in (first, first + share))
            held = value[*at[: self.axis], slice(start, stop), *at[self.axis + 1 :]]
            widths = [(0, 0)] * held.ndim
            widths[self.axis] = (0, share - (stop - start))
            return np.pad(held, widths)

        return np.concatenate([part(number) for number in range(parts)], self.axis)

    def restored(self, value: Array) -> Array:
        """A layer takes what its device holds."""
        return value

    def _devices(self, sizes: Mapping[str, int]) -> int:
        return math.prod(sizes[axis] for axis in self.among)

    def _each(self, devices: int) -> int:
        group = self.tp.multiple_of * self.tp.chunks
        return math.ceil(self.length // group / devices) * group


def channel_sharded(module: nnx.Module) -> dict[ParamPath, ChannelSharded]:
    """The parameters of a module that may be divided, by their path."""
    found = {}
    for path, layer in walk(module):
        if (tp := getattr(layer, "tp", None)) is None:
            continue
        for name in ("kernel", "bias", "scale"):
            value = getattr(layer, name, None)
            if value is None or (tp.kind is TPKind.ROW and name != "kernel"):
                continue
            axis = len(value.shape) - (2 if tp.kind is TPKind.ROW else 1)
            found[(*path, name)] = ChannelSharded(axis, tp, value.shape[axis])
    return found


MIN_SHARDED_SIZE = 2**16
"""Elements of the smallest parameter that is shared out; smaller ones lie whole on every device."""

CHANNELS = TPSpec(TPKind.COLUMN)
"""Of layers whose result is put together again at once: no channels have to stay together."""

Shape = tuple[int, ...]
Sizes = Mapping[str, int]  # of the mesh's axes


class ParamLayout(Protocol):
    """How one parameter lies on the mesh; `ChannelSharded` is one, and the others are below."""

    def spec(self) -> P: ...

    def shape(self, shape: Shape, sizes: Sizes) -> Shape:
        """Of the array that all devices together hold, for a parameter of so many elements along each axis."""

    def block(self, value: Values, sizes: Sizes, at: tuple[slice, ...]) -> Float[np.ndarray, "..."]:
        """What one device holds, which that array has `at` its place; reads nothing else of the parameter."""

    def restored(self, value: Array) -> Array:
        """The parameter as its layer takes it, inside the program, of what one device holds."""


@dataclasses.dataclass(frozen=True)
class Replicated:
    """On every device."""

    def spec(self) -> P:
        return P()

    def shape(self, shape, sizes):
        return shape

    def block(self, value, sizes, at):
        return value[at]

    def restored(self, value):
        return value


@dataclasses.dataclass(frozen=True)
class FlatSharded:
    """Flat, filled up with zeros, and in equal pieces on all devices. whole: the parameter's shape."""

    whole: Shape

    def spec(self) -> P:
        return P(EVERY_AXIS)

    def shape(self, shape, sizes):
        devices = math.prod(sizes.values())
        return (math.ceil(math.prod(shape) / devices) * devices,)

    def block(self, value, sizes, at):
        start, stop, _ = at[0].indices(*self.shape(self.whole, sizes))
        rows, *others = self.whole
        row = math.prod(others)
        first, last = min(start // row, rows), min(-(-stop // row), rows)
        held = value[slice(first, last), *[slice(None)] * len(others)].reshape(-1)
        held = held[start - first * row : stop - first * row]
        return np.pad(held, (0, stop - start - held.size))

    def restored(self, value):
        return all_gather_flat(value)[: math.prod(self.whole)].reshape(self.whole)


@dataclasses.dataclass(frozen=True)
class OutputMajor:
    """A kernel with its output channels first. Turning it back is a matter of the layout to XLA, which for GPUs moves nothing.

    part: of the turned kernel. cuDNN reads those of convolutions so (OHWI), which otherwise would be made in every step, and
    files have all of them so: a share of one is a run of the file.
    """

    part: Replicated | FlatSharded

    def spec(self) -> P:
        return self.part.spec()

    def shape(self, shape, sizes):
        return self.part.shape(_turned(shape), sizes)

    def block(self, value, sizes, at):
        return self.part.block(_TurnedValues(value), sizes, at)

    def restored(self, value):
        return jnp.moveaxis(self.part.restored(value), 0, -1)


class _TurnedValues:
    """The blocks of a kernel with its output channels first."""

    def __init__(self, value: Values):
        self._value, self.shape = value, _turned(value.shape)

    def __getitem__(self, block: tuple[slice, ...]) -> np.ndarray:
        outputs, *others = block
        return np.moveaxis(self._value[*others, outputs], -1, 0)


def _turned(shape: Shape) -> Shape:
    return (shape[-1], *shape[:-1])


@dataclasses.dataclass(frozen=True, eq=False)
class ModelLayout:
    """A model without its parameters: its structure, and each parameter's path, shape and part, in the order of the leaves.

    arrays: the leaves of each array that the programs take, several where kernels of the same input lie side by side. XLA
    makes one product of such layers, and for that would put their kernels together in every step.
    """

    structure: jax.tree_util.PyTreeDef
    paths: tuple[ParamPath, ...]
    shapes: tuple[Shape, ...]
    parts: tuple[ParamLayout, ...]
    arrays: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        module: nnx.Module,
        parallelism: Parallelism = Parallelism.PATCH,
        *,
        shard: bool = False,
        platform: str = "cpu",
    ) -> ModelLayout:
        """The form of a module of values or of shapes.

        shard: whether large parameters are shared out. platform: JAX's name for the devices', which read kernels in their way.
        """
        divided = channel_sharded(module)
        if parallelism is not Parallelism.TENSOR:
            once = {path: piece for path, piece in divided.items() if piece.tp.precomputed}
            divided = {
                path: ChannelSharded(piece.axis, CHANNELS, piece.length, (PATCH, CFG)) for path, piece in once.items()
            }

        def part(path: ParamPath, shape: Shape) -> ParamLayout:
            if path in divided:
                return divided[path]
            share = shard and math.prod(shape) >= MIN_SHARDED_SIZE
            turn = path[-1] == "kernel" and (share or (platform == "gpu" and len(shape) == 4))
            part = FlatSharded(_turned(shape) if turn else shape) if share else Replicated()
            return OutputMajor(part) if turn else part

        leaves = [(path, tuple(leaf.shape)) for path, leaf in nnx.to_flat_state(nnx.state(module))]
        paths, shapes = zip(*leaves, strict=True)
        parts = tuple(part(*leaf) for leaf in leaves)
        arrays = _side_by_side(module, paths, parts) if platform == "gpu" else tuple((i,) for i in range(len(parts)))
        return cls(jax.tree.structure(module), paths, shapes, parts, arrays)

    @functools.cached_property
    def specs(self) -> tuple[P, ...]:
        """How the arrays lie on the mesh."""
        return tuple(self.parts[first].spec() for first, *_ in self.arrays)

    def abstract_params(self, sizes: Sizes, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of the arrays that all devices of a mesh together hold."""

        def shape(leaves: tuple[int, ...]) -> Shape:
            *rest, last = self.parts[leaves[0]].shape(self.shapes[leaves[0]], sizes)
            return (*rest, last * len(leaves))

        return tuple(jax.ShapeDtypeStruct(shape(leaves), dtype) for leaves in self.arrays)

    def abstract(self) -> nnx.Module:
        """The model, of shapes alone."""
        return jax.tree.unflatten(self.structure, [jax.ShapeDtypeStruct(shape, np.float32) for shape in self.shapes])

    def make_placer(self, mesh: Mesh) -> Place:
        """Puts parameters on the devices of a mesh."""
        parts = dict(zip(self.paths, self.parts, strict=True))

        def place(path: ParamPath, value: Values) -> jax.Array:
            part = parts[path]
            shape, sharding = part.shape(value.shape, mesh.shape), NamedSharding(mesh, part.spec())
            return blocks_to_devices(shape, sharding, lambda at: part.block(value, mesh.shape, at))

        return place

    def fuse_params(self, module: nnx.Module) -> Params:
        """The programs' arrays of a model whose parameters are placed. Those that are put together are deleted one by one."""
        leaves = jax.tree.leaves(module)

        def array(indices: tuple[int, ...]) -> jax.Array:
            first, *others = (leaves[index] for index in indices)
            if not others:
                return first
            whole = _concatenated(first.sharding)(first, *others)
            for leaf in (first, *others):
                leaf.delete()
            return whole

        return tuple(map(array, self.arrays))

    def module(self, params: Params) -> nnx.Module:
        """The model, inside a shard_map, of what one device holds of its parameters (`specs`)."""
        restored: dict[int, Array] = {}
        for indices, value in zip(self.arrays, params, strict=True):
            channel_sharded = jnp.split(value, len(indices), -1) if len(indices) > 1 else [value]
            restored |= {
                index: self.parts[index].restored(piece) for index, piece in zip(indices, channel_sharded, strict=True)
            }
        return jax.tree.unflatten(self.structure, [restored[index] for index in range(len(self.parts))])


def _side_by_side(
    module: nnx.Module, paths: tuple[ParamPath, ...], parts: tuple[ParamLayout, ...]
) -> tuple[tuple[int, ...], ...]:
    """`ModelLayout.arrays` where kernels that are whole on every device, and multiply the same input, are put together."""
    index = {path: number for number, path in enumerate(paths)}
    together: dict[int, tuple[int, ...]] = {}
    for path, layer in walk(module):
        kernels = tuple(index[*path, name, "kernel"] for name in getattr(layer, "same_input", ()))
        if kernels and all(isinstance(parts[kernel], Replicated) for kernel in kernels):
            together |= dict.fromkeys(kernels, kernels)
    return tuple(dict.fromkeys(together.get(number, (number,)) for number in range(len(parts))))


@functools.cache
def _concatenated(sharding: NamedSharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda *arrays: jnp.concatenate(arrays, -1), out_shardings=sharding)


class Model(NamedTuple):
    """A model on the devices: its config, its form, and its parameters as they lie there, or their shapes before."""

    config: Any
    form: ModelLayout
    params: Params

    @classmethod
    def of(cls, config: Any, form: ModelLayout, mesh: Mesh, dtype: Any) -> Model:
        """A model of which no parameter has been read."""
        return cls(config, form, placed(mesh, form.specs, form.abstract_params(mesh.shape, dtype)))

    @property
    def dtype(self) -> np.dtype:
        return self.params[0].dtype


def placed(mesh: Mesh, specs: Any, arguments: Any) -> Any:
    """Shapes with how they lie on a mesh; a spec stands for all leaves of an argument."""

    def place(spec: P, part: Any) -> Any:
        sharding = NamedSharding(mesh, spec)

        def leaf(value: Any) -> jax.ShapeDtypeStruct:
            dtype = jax.dtypes.canonicalize_dtype(value.dtype, allow_extended_dtype=True)
            return jax.ShapeDtypeStruct(value.shape, dtype, sharding=sharding)

        return jax.tree.map(leaf, part)

    return jax.tree.map(place, specs, arguments, is_leaf=lambda spec: isinstance(spec, P))
