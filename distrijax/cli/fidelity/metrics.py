"""Distances between images: this module's PSNR and SSIM, torchmetrics' LPIPS, and clean-fid's FID as in the paper.

All are computed from 8-bit images, as in the paper. LPIPS and FID need networks that their packages download (extra `eval`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

NOT_AVAILABLE = "not available"

GROUP = 64  # images; the batch of the paper's script
AT_ONCE = 8  # images in memory

WINDOW, DEVIATION = 11, 1.5  # of SSIM's Gaussian, in pixels


def psnr(squared_errors: Sequence[float], peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB; infinite without an error.

    As in the paper's script, this is the mean over groups of 64 images in order, each with the PSNR of its mean squared
    error. Unlike there, the peak is given rather than measured, and groups without an error are not left out.

    Args:
        squared_errors: Mean squared error of each image.
        peak: The largest possible value of a pixel.
    """
    groups = [squared_errors[start : start + GROUP] for start in range(0, len(squared_errors), GROUP)]
    with np.errstate(divide="ignore"):
        values = [10 * np.log10(peak**2 / np.mean(group)) for group in groups]
    return float(np.average(values, weights=[len(group) for group in groups]))


def _squared_errors(images: UInt8[np.ndarray, "b h w c"], reference: UInt8[np.ndarray, "b h w c"]) -> list[float]:
    """Mean squared error of each image."""
    return np.square(images.astype(np.float64) - reference).mean((1, 2, 3)).tolist()


@jax.jit
def ssim(images: Float[Array, "b h w c"], reference: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """Structural similarity of each image: Wang et al. 2004, with mirrored edges as in torchmetrics.

    Args:
        images: Values from 0 to 1.
        reference: Images to compare with, in the same range.
    """
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-np.square(offsets / DEVIATION) / 2)
    weights = np.float32(weights / weights.sum())

    margin = WINDOW // 2
    margins = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    images, reference = (jnp.pad(x, margins, "reflect") for x in (images, reference))

    def blur(x: jax.Array) -> jax.Array:
        for axis in (1, 2):
            size = x.shape[axis] - 2 * margin
            x = sum(jax.lax.slice_in_dim(x, i, i + size, axis=axis) * weight for i, weight in enumerate(weights))
        return x

    mean, other = blur(images), blur(reference)
    variance, other_variance = (blur(x * x) - m * m for x, m in ((images, mean), (reference, other)))
    covariance = blur(images * reference) - mean * other
    small, smaller = 0.01**2, 0.03**2
    structure = (2 * covariance + smaller) / (variance + other_variance + smaller)
    return jnp.mean((2 * mean * other + small) / (mean**2 + other**2 + small) * structure, (1, 2, 3))


class Lpips:
    """Mean perceptual distance (AlexNet), as the paper's script calls torchmetrics."""

    name = "LPIPS"

    def __init__(self):
        from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

        self._network = LearnedPerceptualImagePatchSimilarity(normalize=True)

    def __call__(self, folder: Path, reference: Path) -> float:
        import torch

        values = []
        with torch.inference_mode():
            for pair in _image_pairs(folder, reference):
                images, others = (torch.from_numpy(part).permute(0, 3, 1, 2) / 255 for part in pair)
                values += [float(self._network(images, others))] * len(images)
        self._network.reset()
        return float(np.mean(values))


class Fid:
    """Fréchet distance between the Inception features of two folders of images, as clean-fid's `compute_fid`."""

    name = "FID"

    def __init__(self):
        import torch
        from cleanfid import features, fid

        self._fid, self._device = fid, torch.device("cpu")
        self._network = features.build_feature_extractor("clean", self._device, use_dataparallel=False)
        self._reference: dict[Path, np.ndarray] = {}

    def __call__(self, folder: Path, reference: Path) -> float:
        if reference not in self._reference:
            self._reference[reference] = self._features(reference)
        if len(self._reference[reference]) < 2:
            raise ValueError("one image has no covariance; generate at least 2")
        return float(self._fid.fid_from_feats(self._reference[reference], self._features(folder)))

    def _features(self, folder: Path) -> np.ndarray:
        # no worker processes: they would be forks of a process that runs JAX's threads
        return self._fid.get_folder_features(
            str(folder), self._network, num_workers=0, batch_size=AT_ONCE, device=self._device, verbose=False
        )


class OptionalMetric:
    """A metric whose packages or networks may be missing; then it prints why on stderr and returns `NOT_AVAILABLE`."""

    def __init__(self, metric: Callable[[], Any]):
        self.name = metric.name
        self._metric = self._attempt(metric, hint="; it needs the extra `eval` and a download of its network")

    @property
    def available(self) -> bool:
        return self._metric is not NOT_AVAILABLE

    def __call__(self, folder: Path, reference: Path) -> float | str:
        value = self._attempt(self._metric, folder, reference) if self.available else NOT_AVAILABLE
        if value is NOT_AVAILABLE:
            self._metric = NOT_AVAILABLE
        return value

    def _attempt(self, function: Callable, *arguments: Any, hint: str = "") -> Any:
        try:
            return function(*arguments)
        except Exception as error:  # packages, downloads and the network's own code raise anything
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            print(f"{self.name}: {NOT_AVAILABLE} ({reason}){hint}", file=sys.stderr)
            return NOT_AVAILABLE


def _image_pairs(folder: Path, reference: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields images `[b, h, w, 3]` of one folder and those of the same names in another, a few at a time."""
    names = sorted(path.name for path in folder.glob("*.png"))
    for start in range(0, len(names), AT_ONCE):
        yield tuple(
            np.stack([np.asarray(Image.open(place / name)) for name in names[start : start + AT_ONCE]])
            for place in (folder, reference)
        )


def compare(folder: Path, reference: Path) -> tuple[float, float]:
    """PSNR in dB and SSIM of one folder's images against those of the same names in another.

    Args:
        folder: Contains at least one PNG file.
        reference: Contains images of the same names and sizes.
    """
    errors, similarities = [], []
    for images, others in _image_pairs(folder, reference):
        errors += _squared_errors(images, others)
        similarities += ssim(*(np.float32(part) / np.float32(255) for part in (images, others))).tolist()
    return psnr(errors), float(np.mean(similarities))
