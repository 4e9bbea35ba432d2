"""Several calls at a time: of one pipeline, and of two on the two halves of the devices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from distrijax import DistriConfig, DistriSDXLPipeline

CALL = {"height": 64, "width": 64, "num_inference_steps": 4, "output_type": "latent"}
CALLS = [("a red circle", 0), ("two blue squares", 1), ("a green star", 2), ("a yellow triangle", 3)]


@pytest.fixture(scope="module")
def pipes(shallow_checkpoint) -> list[DistriSDXLPipeline]:
    made = []
    for devices in (jax.devices()[:4], jax.devices()[4:]):
        config = DistriConfig(devices=devices, warmup_steps=1)
        made.append(DistriSDXLPipeline.from_pretrained(shallow_checkpoint, config))
        made[-1].set_progress_bar_config(disable=True)
    return made


def generate(pipe: DistriSDXLPipeline, prompt: str, seed: int) -> np.ndarray:
    return np.asarray(pipe(prompt, seed=seed, **CALL).images)


def at_once(*jobs: Callable[[], np.ndarray]) -> list[np.ndarray]:
    """The results of jobs that begin together, each in a thread of its own."""
    barrier = threading.Barrier(len(jobs))

    def run(job):
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as threads:
        return list(threads.map(run, jobs))


def test_calls_at_once_give_what_they_give_alone_and_compile_as_much(pipes):
    """The first ones find nothing compiled, on any of the pipelines."""
    jobs = [(pipe, *call) for call in CALLS[:2] for pipe in pipes]
    counts = []
    found = []
    for _ in range(3):
        found.append(at_once(*[lambda job=job: generate(*job) for job in jobs]))
        counts.append([pipe.programs.count for pipe in pipes])
    alone = [generate(*job) for job in jobs]
    assert counts == [[pipe.programs.count for pipe in pipes]] * 3
    for results in found:
        for one, other in zip(results, alone, strict=True):
            np.testing.assert_array_equal(one, other)
    assert not np.array_equal(alone[0], alone[2])


def test_a_call_within_a_callback_of_another_is_as_good_as_any(pipes):
    pipe, seen = pipes[1], []

    def callback(pipe, step, timestep, tensors):
        if step == 1:
            seen.append(generate(pipe, *CALLS[2]))

    outer = np.asarray(pipe(CALLS[3][0], seed=CALLS[3][1], callback_on_step_end=callback, **CALL).images)
    np.testing.assert_array_equal(outer, generate(pipe, *CALLS[3]))
    np.testing.assert_array_equal(seen[0], generate(pipe, *CALLS[2]))
