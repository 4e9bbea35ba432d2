"""One of the two processes of test_processes.py: generates in several ways, and saves what this process gets.

python process_worker.py CHECKPOINT FOLDER COORDINATOR PROCESS_ID
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from distrijax import DistriConfig, load_pipeline
from distrijax.parallel import processes
from distrijax.weights import load as weights
from distrijax.weights import sharding as placement

DEVICES = 4
CALL = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "np"}
WAYS = {
    "a branch in each process": ({}, {}),
    "rows in both": ({"split_batch": False}, {"height": 72, "chunk_size": None}),
    "images in each, sharded weights": (
        {"data": 2, "split_batch": False, "parallelism": "tensor"},
        {"num_images_per_prompt": 2, "output_type": "latent", "num_inference_steps": 2},
    ),
    "sharded weights": ({"shard_weights": True}, {"num_inference_steps": 2}),
}
LEAST = 512
"""Of the elements of sharded parameters, here: the model is small."""


def generate(checkpoint: Path, way: str) -> tuple[dict[str, np.ndarray], int]:
    """The image of a way, and what a callback saw, which doubled the latents of a step; how many numbers were read of files."""
    settings, call = WAYS[way]
    read = 0

    class Counted(weights.Stored):
        def __getitem__(self, block):
            nonlocal read
            content = super().__getitem__(block)
            read += content.size
            return content

    with mock.patch.object(placement, "MIN_SHARDED_SIZE", LEAST), mock.patch.object(weights, "Stored", Counted):
        pipe = load_pipeline(checkpoint, DistriConfig(devices=DEVICES, warmup_steps=1, **settings))
    seen = []

    def callback(_, step, timestep, tensors):
        seen.append(np.asarray(tensors["latents"]))
        return {"latents": 2 * tensors["latents"]} if step == 1 else None

    call = {**CALL, **call, "callback_on_step_end": None if "chunk_size" in call else callback}
    pipe.set_progress_bar_config(disable=True)
    image = np.asarray(pipe("a red circle", **call).images)
    return {"image": image, **{f"step {step}": latents for step, latents in enumerate(seen)}}, read


if __name__ == "__main__":
    checkpoint, folder, coordinator, process_id = sys.argv[1:]
    processes.initialize(coordinator, 2, int(process_id), devices=DEVICES)
    assert (jax.process_count(), jax.local_device_count()) == (2, DEVICES // 2)
    for number, way in enumerate(WAYS):
        arrays, read = generate(Path(checkpoint), way)
        np.savez(Path(folder, f"{number}-{process_id}.npz"), read=read, **arrays)
