"""How near pictures are to others: PSNR and SSIM of our own, LPIPS by torchmetrics and FID by clean-fid as in the paper.

All are of 8-bit pictures, as the paper's are. The last two need networks that their packages download (extra `eval`).
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

GROUP = 64  # pictures; the batch of the paper's script
AT_ONCE = 8  # pictures in memory

WINDOW, DEVIATION = 11, 1.5  # of SSIM's Gaussian, in pixels


def psnr(squared_errors: Sequence[float], peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB, from each picture's mean squared error; infinite where there is none.

    As in the paper's script: of the mean squared error over each 64 pictures in order, and of those figures the mean. Unlike
    there, the peak is not measured but given, and groups without an error are not left out.
    """
    groups = [squared_errors[start : start + GROUP] for start in range(0, len(squared_errors), GROUP)]
    with np.errstate(divide="ignore"):
        values = [10 * np.log10(peak**2 / np.mean(group)) for group in groups]
    return float(np.average(values, weights=[len(group) for group in groups]))


def squared_errors(pictures: UInt8[np.ndarray, "b h w c"], reference: UInt8[np.ndarray, "b h w c"]) -> list[float]:
    """Each picture's mean squared error."""
    return np.square(pictures.astype(np.float64) - reference).mean((1, 2, 3)).tolist()


@jax.jit
def ssim(pictures: Float[Array, "b h w c"], reference: Float[Array, "b h w c"]) -> Float[Array, "b"]:
    """Each picture's structural similarity, of values in 0 to 1: Wang et al. 2004, and, like torchmetrics, mirrored edges."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-np.square(offsets / DEVIATION) / 2)
    weights = np.float32(weights / weights.sum())

    margin = WINDOW // 2
    margins = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    pictures, reference = (jnp.pad(x, margins, "reflect") for x in (pictures, reference))

    def blur(x: jax.Array) -> jax.Array:
        for axis in (1, 2):
            size = x.shape[axis] - 2 * margin
            x = sum(jax.lax.slice_in_dim(x, i, i + size, axis=axis) * weight for i, weight in enumerate(weights))
        return x

    mean, other = blur(pictures), blur(reference)
    variance, other_variance = (blur(x * x) - m * m for x, m in ((pictures, mean), (reference, other)))
    covariance = blur(pictures * reference) - mean * other
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
            for pair in image_pairs(folder, reference):
                ours, theirs = (torch.from_numpy(part).permute(0, 3, 1, 2) / 255 for part in pair)
                values += [float(self._network(ours, theirs))] * len(ours)
        self._network.reset()
        return float(np.mean(values))


class Fid:
    """Fréchet distance between the Inception features of two folders of pictures, as clean-fid's `compute_fid` has it."""

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
            raise ValueError("one picture has no spread; paint at least 2")
        return float(self._fid.fid_from_feats(self._reference[reference], self._features(folder)))

    def _features(self, folder: Path) -> np.ndarray:
        # no worker processes: they would be forks of one that runs JAX's threads
        return self._fid.get_folder_features(
            str(folder), self._network, num_workers=0, batch_size=AT_ONCE, device=self._device, verbose=False
        )


class OptionalMetric:
    """A metric that may not be had: then it says why, in one line on stderr, and its figures say so too."""

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
        except Exception as error:  # whatever packages, downloads and the network's own code may raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            print(f"{self.name}: {NOT_AVAILABLE} ({reason}){hint}", file=sys.stderr)
            return NOT_AVAILABLE


def image_pairs(folder: Path, reference: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pictures [b, h, w, 3] of one folder and those of the same names in another, a few at a time."""
    names = sorted(path.name for path in folder.glob("*.png"))
    for start in range(0, len(names), AT_ONCE):
        yield tuple(
            np.stack([np.asarray(Image.open(place / name)) for name in names[start : start + AT_ONCE]])
            for place in (folder, reference)
        )


def compare(folder: Path, reference: Path) -> tuple[float, float]:
    """PSNR in dB and SSIM of one folder's pictures against those of the same names in another."""
    errors, similarities = [], []
    for pictures, others in image_pairs(folder, reference):
        errors += squared_errors(pictures, others)
        similarities += ssim(*(np.float32(part) / np.float32(255) for part in (pictures, others))).tolist()
    return psnr(errors), float(np.mean(similarities))
