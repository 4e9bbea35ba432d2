"""The change that an adapter makes to one weight, in float32: LoRA, LoCon, LoHa, LoKr and whole differences, and DoRA.

    LoRA    up down                                 LoCon   up * mid * down, convolutions (Tucker's decomposition) or two of them
    LoHa    (a1 b1) o (a2 b2), element by element   LoKr    w1 (x) w2, the Kronecker product; each may be a product itself
    DoRA    m (W + change) / |W + change|           full    the change itself

Every change but the last is scaled by alpha / rank, if there is an alpha, and by the adapter's weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from distrijax.errors import CheckpointError
from distrijax.weights.tensors import EIGHT_BITS, Shape, Tensor, Tensors

Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, Shape]

COMMON = frozenset({"alpha", "dora_scale", "magnitude"})
"""Roles of tensors other than factors. dora_scale: LyCORIS' name of DoRA's magnitudes; magnitude: PEFT's."""


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """One way to write a change of a weight.

    roles: the sets of factors, any of which makes one. ranked: factors whose number of rows is the rank; the first present
    counts. shape: of the change, from those of the factors; None where they do not fit together. change: made of the factors;
    a convolution's kernel may be flat in its last dimension.
    """

    roles: tuple[frozenset[str], ...]
    ranked: tuple[str, ...]
    shape: Callable[[Shapes], Shape | None]
    change: Callable[[Arrays], np.ndarray]

    def absent(self, roles: frozenset[str]) -> frozenset[str]:
        """The factors that a change lacks."""
        return min((needed - roles for needed in self.roles if roles <= needed), key=len, default=frozenset())

    def rank(self, factors: Tensors) -> int | None:
        return next((factors[role].shape[0] for role in self.ranked if role in factors), None)


def _lora_shape(shapes: Shapes) -> Shape | None:
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    if min(len(down), len(up)) < 2 or math.prod(up[2:]) != 1:
        return None
    if mid is None:
        return (up[0], *down[1:]) if up[1] == down[0] else None
    fits = len(mid) > 2 and mid[:2] == (up[1], down[0]) and math.prod(down[2:]) == 1
    return (up[0], down[1], *mid[2:]) if fits else None


def _lora_change(factors: Arrays) -> np.ndarray:
    down, up = factors["down"], _matrix(factors["up"])
    if "mid" in factors:
        return _tucker(factors["mid"], up.T, _matrix(down))
    return (up @ _matrix(down)).reshape(len(up), *down.shape[1:])


def _loha_shape(shapes: Shapes) -> Shape | None:
    first, second = (_product_shape(shapes, f"w{n}", f"t{n}") for n in (1, 2))
    return first if first == second else None


def _loha_change(factors: Arrays) -> np.ndarray:
    return _product(factors, "w1", "t1") * _product(factors, "w2", "t2")


def _lokr_shape(shapes: Shapes) -> Shape | None:
    first, second = (_product_shape(shapes, f"w{n}", f"t{n}") for n in (1, 2))
    if first is None or second is None or len(first) != 2 or len(second) < 2:
        return None
    return first[0] * second[0], first[1] * second[1], *second[2:]


def _lokr_change(factors: Arrays) -> np.ndarray:
    first, second = _product(factors, "w1", "t1"), _product(factors, "w2", "t2")
    return np.kron(first.reshape(*first.shape, *(1,) * (second.ndim - 2)), second)


def _product_shape(shapes: Shapes, name: str, core: str) -> Shape | None:
    """The shape of `_product`."""
    if name in shapes:
        return shapes[name]
    left, right = shapes[f"{name}_a"], shapes[f"{name}_b"]
    if len(left) != 2 or len(right) != 2:
        return None
    if core not in shapes:
        return (left[0], right[1]) if left[1] == right[0] else None
    middle = shapes[core]
    return (left[1], right[1], *middle[2:]) if len(middle) > 2 and middle[:2] == (left[0], right[0]) else None


def _product(factors: Arrays, name: str, core: str) -> np.ndarray:
    """A factor: itself, a product of two matrices, or Tucker's decomposition around a core."""
    if name in factors:
        return factors[name]
    left, right = factors[f"{name}_a"], factors[f"{name}_b"]
    return _tucker(factors[core], left, right) if core in factors else left @ right


def _tucker(core: np.ndarray, outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """core: [p, q, *kernel]. outer: [p, out]. inner: [q, in]. Returns [out, in, *kernel]."""
    return np.einsum("pq...,po,qi->oi...", core, outer, inner, optimize=True)


def _matrix(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)


def _roles(*names: str) -> frozenset[str]:
    return frozenset(names)


LOHA_ROLES = _roles("w1_a", "w1_b", "w2_a", "w2_b")
LOKR_ROLES = tuple(
    _roles(*one, *two)
    for one in (("w1",), ("w1_a", "w1_b"))
    for two in (("w2",), ("w2_a", "w2_b"), ("w2_a", "w2_b", "t2"))
)

LORA = Method((_roles("down", "up"), _roles("down", "mid", "up")), ("down",), _lora_shape, _lora_change)
LOHA = Method((LOHA_ROLES, LOHA_ROLES | {"t1", "t2"}), ("w1_b",), _loha_shape, _loha_change)
LOKR = Method(LOKR_ROLES, ("w2_b", "w1_b"), _lokr_shape, _lokr_change)
FULL = Method((_roles("diff"),), (), lambda shapes: shapes["diff"], lambda factors: factors["diff"])


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """What one adapter does to one weight.

    factors: by role, including alpha and DoRA's magnitudes. weight: of the adapter. alpha: if no tensor holds it. what: the
    adapter, for errors.
    """

    method: Method
    factors: Tensors
    weight: float
    alpha: float | None = None
    rank_stabilised: bool = False
    what: str = "the LoRA"

    def of(self, base: np.ndarray) -> np.ndarray:
        """What is added to a weight, both in float32."""
        factors = {role: tensor.read().astype(np.float32) for role, tensor in self.factors.items()}
        change = self.method.change(factors).reshape(base.shape) * np.float32(self._scale(factors))
        lengths = next((factors[role] for role in ("dora_scale", "magnitude") if role in factors), None)
        return change if lengths is None else _with_lengths(base + change, lengths) - base

    def _scale(self, factors: Arrays) -> float:
        rank = self.method.rank(self.factors)
        alpha = float(factors["alpha"].reshape(())) if "alpha" in factors else self.alpha
        if rank is None or alpha is None:
            return self.weight
        return self.weight * alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _with_lengths(merged: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A weight whose columns or rows are scaled to new magnitudes (Liu et al., "DoRA", 2024).

    As in PEFT and, for an adapter's weight of 1, LyCORIS: the old magnitude is that of the changed weight.
    """
    if per_input(lengths.shape, merged.shape):
        axes, shape = (0, *range(2, merged.ndim)), (1, -1, *(1,) * (merged.ndim - 2))
    else:
        axes, shape = tuple(range(1, merged.ndim)), (-1, *(1,) * (merged.ndim - 1))
    norms = np.sqrt(np.square(merged).sum(axes, keepdims=True))
    return merged * (lengths.reshape(shape) / np.maximum(norms, np.finfo(np.float32).tiny))


def per_input(lengths: Shape, weight: Shape) -> bool:
    """Whether DoRA's magnitudes are those of a weight's inputs, as LyCORIS has them by default: [1, in] or [1, in, 1, 1].

    PEFT has [out], for convolutions [1, out, 1, 1], which looks the same for a square one; these arrive here as [out].
    """
    return len(lengths) > 1 and lengths[0] == 1 and lengths[1] == weight[1] and math.prod(lengths) == weight[1]


def lengths_fit(role: str, lengths: Shape, weight: Shape) -> bool:
    """Whether DoRA's magnitudes are one for each output of a weight, or one for each input if the role allows it."""
    if len(weight) < 2:
        return False
    return math.prod(lengths) == weight[0] or (role == "dora_scale" and per_input(lengths, weight))


def fits(change: Shape, weight: Shape) -> bool:
    """Whether a change can be added to a weight; 1x1 convolutions count as linear layers, and kernels may be flat."""
    if len(change) < 2 or len(weight) < 2:
        return change == weight
    return change[0] == weight[0] and (
        _without_ones(change) == _without_ones(weight)
        or (len(change) == 2 and change[1] == math.prod(weight[1:]))
    )  # fmt: skip


def _without_ones(shape: Shape) -> Shape:
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape


def merged(base: Tensor, changes: Sequence[Change]) -> Tensor:
    """A weight with all changes, each computed from the original weight; computed when it is read.

    In its own dtype, or in float16 in place of 8 bits, to which most changes are too small.

    Reading it raises CheckpointError, which names the adapter, where the result overflows that dtype.
    """

    dtype = np.dtype(np.float16) if base.dtype in EIGHT_BITS else base.dtype

    def add(array: np.ndarray) -> np.ndarray:
        weight = array.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            total = sum((change.of(weight) for change in changes), np.zeros_like(weight))
            result = (weight + total).astype(dtype)
            if not np.isfinite(result).all() and np.isfinite(weight).all():
                largest = max(changes, key=lambda change: np.nan_to_num(np.abs(change.of(weight)), nan=np.inf).max())
                raise CheckpointError(
                    f"{largest.what} with the weight {largest.weight:g} makes numbers that {dtype} does not hold; "
                    "give a smaller weight, or another LoRA"
                )
        return result

    return base.then(add, dtype=dtype)
