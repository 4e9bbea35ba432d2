"""Calls of small pipelines: of one prompt, one size and four steps unless a test says otherwise, so that programs are shared."""

from __future__ import annotations

from typing import Any

import numpy as np

from distrijax.pipelines.build import Pipeline

PROMPT = "a red circle on the left"
OTHER = "two blue squares on a green background"
SIZE = {"height": 256, "width": 64}
LATENT = (4, 32, 8)


def generated(pipe: Pipeline, *arguments: Any, kind: str = "latent", **changes: Any) -> np.ndarray:
    """Latents [b, c, h, w], or images where `kind` says so."""
    settings = SIZE | {"num_inference_steps": 4} | changes
    return np.asarray(pipe(*(arguments or (PROMPT,)), **settings, output_type=kind).images)


def trajectory(pipe: Pipeline, **changes: Any) -> list[np.ndarray]:
    """The latents after each step."""
    seen = []
    generated(pipe, callback_on_step_end=lambda *call: seen.append(np.asarray(call[3]["latents"])), **changes)
    return seen
