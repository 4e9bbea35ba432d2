"""How the parameters of a model are placed on the device mesh.

Each parameter has a `ParamLayout`: replicated, sharded flat (`DistriConfig.shard_weights`), or sharded by channels (tensor
parallelism, arXiv 1909.08053, section 3; layers state how they may be divided in `distrijax.models.layers.TPSpec`). A
`ModelLayout` has those of a whole model, without its values:

    ModelLayout.of(module)   a layout for every parameter
    .make_placer(mesh)       checkpoint -> devices, one parameter at a time; a device's block is all that is read for it
    .fuse_params(module)     placed parameters -> the arrays that compiled programs take
    .module(params)          inside a program: what one device holds -> the module that computes
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
from distrijax.parallel.stages import with_shardings
from distrijax.weights.load import Place, Values
from distrijax.weights.names import ParamPath

MIN_SHARDED_SIZE = 2**16
"""Elements of the smallest parameter that is sharded flat; smaller ones are replicated."""

UNGROUPED = TPSpec(TPKind.COLUMN)
"""For layers whose output is gathered at once: no channels have to stay together."""

Shape = tuple[int, ...]
AxisSizes = Mapping[str, int]  # of the mesh


class ParamLayout(Protocol):
    """How one parameter is placed on the mesh: as one global array, of which each device holds a block."""

    def spec(self) -> P:
        """How the global array is sharded."""

    def global_shape(self, shape: Shape, sizes: AxisSizes) -> Shape:
        """Shape of the global array of a parameter of this shape."""

    def block(self, value: Values, sizes: AxisSizes, index: tuple[slice, ...]) -> Float[np.ndarray, "..."]:
        """The global array's values at `index`, one device's; no other part of the parameter is read."""

    def for_layer(self, local: Array) -> Array:
        """The parameter as its layer takes it, of the block that this device holds; runs inside the program."""


@dataclasses.dataclass(frozen=True)
class Replicated:
    """The whole parameter on every device."""

    def spec(self) -> P:
        return P()

    def global_shape(self, shape, sizes):
        return shape

    def block(self, value, sizes, index):
        return value[index]

    def for_layer(self, local):
        return local


@dataclasses.dataclass(frozen=True)
class FlatSharded:
    """Flattened, padded with zeros, and in equal pieces on all devices; an all-gather restores it.

    Attributes:
        param_shape: The parameter's shape.
    """

    param_shape: Shape

    def spec(self) -> P:
        return P(EVERY_AXIS)

    def global_shape(self, shape, sizes):
        devices = math.prod(sizes.values())
        return (math.ceil(math.prod(shape) / devices) * devices,)

    def block(self, value, sizes, index):
        start, stop, _ = index[0].indices(*self.global_shape(self.param_shape, sizes))
        rows, *others = self.param_shape
        row = math.prod(others)
        first, last = min(start // row, rows), min(-(-stop // row), rows)
        held = value[slice(first, last), *[slice(None)] * len(others)].reshape(-1)
        held = held[start - first * row : stop - first * row]
        return np.pad(held, (0, stop - start - held.size))

    def for_layer(self, local):
        return all_gather_flat(local)[: math.prod(self.param_shape)].reshape(self.param_shape)


@dataclasses.dataclass(frozen=True)
class OutputMajor:
    """A kernel with its output channels first (convolutions: OHWI), placed as `inner` says.

    cuDNN reads kernels of convolutions so, and otherwise they would be transposed in every step. Files have all kernels so:
    a flat shard is contiguous in the file. For XLA the transpose back is a matter of layout, which on GPUs moves nothing.

    Attributes:
        inner: The layout of the transposed kernel.
    """

    inner: Replicated | FlatSharded

    def spec(self) -> P:
        return self.inner.spec()

    def global_shape(self, shape, sizes):
        return self.inner.global_shape(_output_major(shape), sizes)

    def block(self, value, sizes, index):
        return self.inner.block(_OutputMajorValues(value), sizes, index)

    def for_layer(self, local):
        return jnp.moveaxis(self.inner.for_layer(local), 0, -1)


class _OutputMajorValues:
    """`Values` of a kernel with its output channels first."""

    def __init__(self, value: Values):
        self._value, self.shape = value, _output_major(value.shape)

    def __getitem__(self, block: tuple[slice, ...]) -> np.ndarray:
        outputs, *others = block
        return np.moveaxis(self._value[*others, outputs], -1, 0)


def _output_major(shape: Shape) -> Shape:
    return (shape[-1], *shape[:-1])


class ChannelSharded(NamedTuple):
    """One axis, of channels, divided among devices as `tp` says; each layer computes with the channels of its device.

    The axis is padded with zeros to a multiple of the devices, which changes no sum, and its channels are put in the devices'
    order, so that equal pieces give each device its own.

    Attributes:
        axis: The axis that is divided.
        tp: Which channels stay together, and how many chunks there are.
        length: Channels along the axis.
        mesh_axes: The axes of the mesh along which the devices share the channels.
    """

    axis: int
    tp: TPSpec
    length: int
    mesh_axes: tuple[str, ...] = (PATCH,)

    def spec(self) -> P:
        return P(*[None] * self.axis, self.mesh_axes)

    def global_shape(self, shape: Shape, sizes: AxisSizes) -> Shape:
        devices = self._devices(sizes)
        return (*shape[: self.axis], devices * self._per_device(devices), *shape[self.axis + 1 :])

    def block(self, value: Values, sizes: AxisSizes, index: tuple[slice, ...]) -> Float[np.ndarray, "..."]:
        devices, chunks = self._devices(sizes), self.tp.chunks
        if self.length % (self.tp.multiple_of * chunks):
            raise ValueError(f"{self.length} channels are not {chunks} chunks of multiples of {self.tp.multiple_of}")
        share, length = self._per_device(devices) // chunks, self.length // chunks
        first = (index[self.axis].start or 0) // chunks

        def part(chunk: int) -> np.ndarray:
            start, stop = (chunk * length + min(end, length) for end in (first, first + share))
            held = value[*index[: self.axis], slice(start, stop), *index[self.axis + 1 :]]
            widths = [(0, 0)] * held.ndim
            widths[self.axis] = (0, share - (stop - start))
            return np.pad(held, widths)

        return np.concatenate([part(chunk) for chunk in range(chunks)], self.axis)

    def for_layer(self, local: Array) -> Array:
        return local

    def _devices(self, sizes: AxisSizes) -> int:
        return math.prod(sizes[axis] for axis in self.mesh_axes)

    def _per_device(self, devices: int) -> int:
        """Channels of each device, padding included."""
        group = self.tp.multiple_of * self.tp.chunks
        return math.ceil(self.length // group / devices) * group


def channel_sharded(module: nnx.Module) -> dict[ParamPath, ChannelSharded]:
    """Layouts of the parameters whose channels may be divided (`TPSpec`), by path."""
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


@dataclasses.dataclass(frozen=True, eq=False)
class ModelLayout:
    """A model without its values: its structure, and how each parameter is placed.

    Attributes:
        structure: The module's tree.
        paths: The path of each parameter, in the order of the tree's leaves; so are the next two.
        shapes: The shape of each parameter.
        layouts: The layout of each parameter.
        arrays: The indices of the parameters that each array of a program holds: several where kernels that multiply the same
            input are concatenated. XLA makes one matmul of such layers, and else would concatenate their kernels in every step.
    """

    structure: jax.tree_util.PyTreeDef
    paths: tuple[ParamPath, ...]
    shapes: tuple[Shape, ...]
    layouts: tuple[ParamLayout, ...]
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
        """The layout of a module, of values or of shapes.

        Args:
            module: The module.
            parallelism: With `TENSOR`, all parameters that may be divided are sharded by channels; else those that are used
                once per call are (`TPSpec.precomputed`).
            shard: Whether large parameters are sharded flat.
            platform: JAX's name for the devices' platform; GPUs read kernels in an order of their own.
        """
        divided = channel_sharded(module)
        if parallelism is not Parallelism.TENSOR:
            divided = {
                path: ChannelSharded(each.axis, UNGROUPED, each.length, (PATCH, CFG))
                for path, each in divided.items()
                if each.tp.precomputed
            }

        def layout(path: ParamPath, shape: Shape) -> ParamLayout:
            if path in divided:
                return divided[path]
            flat = shard and math.prod(shape) >= MIN_SHARDED_SIZE
            transposed = path[-1] == "kernel" and (flat or (platform == "gpu" and len(shape) == 4))
            inner = FlatSharded(_output_major(shape) if transposed else shape) if flat else Replicated()
            return OutputMajor(inner) if transposed else inner

        leaves = [(path, tuple(leaf.shape)) for path, leaf in nnx.to_flat_state(nnx.state(module))]
        paths, shapes = zip(*leaves, strict=True)
        layouts = tuple(layout(*leaf) for leaf in leaves)
        fused = _fused_kernels(module, paths, layouts) if platform == "gpu" else {}
        arrays = tuple(dict.fromkeys(fused.get(index, (index,)) for index in range(len(paths))))
        return cls(jax.tree.structure(module), paths, shapes, layouts, arrays)

    @functools.cached_property
    def specs(self) -> tuple[P, ...]:
        """How the arrays of `fuse_params` are sharded."""
        return tuple(self.layouts[first].spec() for first, *_ in self.arrays)

    def abstract_params(self, sizes: AxisSizes, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Global shapes of the arrays of `fuse_params`, on a mesh of these axis sizes."""

        def shape(indices: tuple[int, ...]) -> Shape:
            *rest, last = self.layouts[indices[0]].global_shape(self.shapes[indices[0]], sizes)
            return (*rest, last * len(indices))

        return tuple(jax.ShapeDtypeStruct(shape(indices), dtype) for indices in self.arrays)

    def abstract(self) -> nnx.Module:
        """The module, of shapes without values."""
        return jax.tree.unflatten(self.structure, [jax.ShapeDtypeStruct(shape, np.float32) for shape in self.shapes])

    def make_placer(self, mesh: Mesh) -> Place:
        """A function that puts one parameter on the devices of a mesh."""
        layouts = dict(zip(self.paths, self.layouts, strict=True))

        def place(path: ParamPath, value: Values) -> jax.Array:
            layout = layouts[path]
            shape, sharding = layout.global_shape(value.shape, mesh.shape), NamedSharding(mesh, layout.spec())
            return blocks_to_devices(shape, sharding, lambda index: layout.block(value, mesh.shape, index))

        return place

    def fuse_params(self, module: nnx.Module) -> Params:
        """The arrays that programs take, of a module whose parameters are placed; concatenated parameters are deleted."""
        leaves = jax.tree.leaves(module)

        def array(indices: tuple[int, ...]) -> jax.Array:
            first, *others = (leaves[index] for index in indices)
            if not others:
                return first
            fused = _concatenate(first.sharding)(first, *others)
            for leaf in (first, *others):  # at once, so that the next ones find room
                leaf.delete()
            return fused

        return tuple(map(array, self.arrays))

    def module(self, params: Params) -> nnx.Module:
        """The module that computes, inside a `shard_map` (`specs`), of what one device holds of the arrays."""
        leaves: dict[int, Array] = {}
        for indices, array in zip(self.arrays, params, strict=True):
            pieces = jnp.split(array, len(indices), -1) if len(indices) > 1 else [array]
            for index, local in zip(indices, pieces, strict=True):
                leaves[index] = self.layouts[index].for_layer(local)
        return jax.tree.unflatten(self.structure, [leaves[index] for index in range(len(self.layouts))])


def _fused_kernels(
    module: nnx.Module, paths: tuple[ParamPath, ...], layouts: tuple[ParamLayout, ...]
) -> dict[int, tuple[int, ...]]:
    """The replicated kernels that multiply the same input: for each one's index, the indices of all of them."""
    index = {path: number for number, path in enumerate(paths)}
    fused: dict[int, tuple[int, ...]] = {}
    for path, layer in walk(module):
        kernels = tuple(index[*path, name, "kernel"] for name in getattr(layer, "same_input", ()))
        if kernels and all(isinstance(layouts[kernel], Replicated) for kernel in kernels):
            fused |= dict.fromkeys(kernels, kernels)
    return fused


@functools.cache
def _concatenate(sharding: NamedSharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda *arrays: jnp.concatenate(arrays, -1), out_shardings=sharding)


class Model(NamedTuple):
    """A model on the devices.

    Attributes:
        config: Its configuration.
        form: How its parameters are placed.
        params: The arrays that programs take, or their shapes with shardings as long as no weight has been read.
    """

    config: Any
    form: ModelLayout
    params: Params

    @classmethod
    def of(cls, config: Any, form: ModelLayout, mesh: Mesh, dtype: Any) -> Model:
        """A model of which no weight has been read."""
        shardings = tuple(NamedSharding(mesh, spec) for spec in form.specs)
        return cls(config, form, with_shardings(form.abstract_params(mesh.shape, dtype), shardings))

    @property
    def dtype(self) -> np.dtype:
        return self.params[0].dtype
