"""A training loop that ends by the clock and goes on where it stopped.

    fit(model, loss, batches, minutes=30, file=work / "vae.npz", ...)  ->  the model of averaged parameters

The learning rate warms up and then stays: what may be stopped at any time has no end to decay towards, and the exponential
average of the parameters does a decay's work. A checkpoint (parameters, their average, the optimizer's state, the step) is
one file, replaced whole. Where there is none, training starts from the model as it is handed in, weights shipped before included.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from embedded.ahead import ahead

WARM_UP = 100  # steps until the learning rate is full


def fit(
    module: nnx.Module,
    loss: Callable,
    batches: Callable[[int], tuple],
    *,
    minutes: float,
    learning_rate: float,
    average: float,
    file: Path,
    workers: int = 0,
    keep_every: float = 5.0,
    after_keeping: Callable[[nnx.Module], None] | None = None,
) -> nnx.Module:
    """Minimises `loss(module, key, *batches(step))` for some minutes; returns the module of averaged parameters.

    average: the decay of that average. file: the checkpoint; its losses are appended to `file`.log. workers: processes that
    make batches ahead. keep_every: minutes between checkpoints. after_keeping: is handed the averaged module after each.
    """
    graph, abstract = nnx.split(module)
    params = nnx.to_pure_dict(abstract)
    rate = optax.linear_schedule(learning_rate / WARM_UP, learning_rate, WARM_UP)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-4))
    state = {"params": params, "average": jax.tree.map(jnp.copy, params), "optimizer": optimizer.init(params)}
    state, start = restore(file, state)
    mesh = Mesh(np.array(jax.devices()), "data", axis_types=(AxisType.Auto,))
    split, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(state, everywhere)

    def rebuild(params):
        nnx.replace_by_pure_dict(abstract, params)
        return nnx.merge(graph, abstract)

    def update(state, step, batch):
        value, gradient = jax.value_and_grad(lambda p: loss(rebuild(p), jax.random.key(step), *batch))(state["params"])
        change, optimizer_state = optimizer.update(gradient, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], change)
        weight = jnp.maximum(1 - average, 1 / (step + 1))  # a plain mean at first
        averaged = jax.tree.map(lambda a, p: a + weight * (p - a), state["average"], params)
        return {"params": params, "average": averaged, "optimizer": optimizer_state}, value

    update = jax.jit(update, donate_argnums=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    end = kept = time.monotonic()
    end += 60 * minutes
    values, step = [], start
    for batch in ahead(batches, itertools.count(start), workers):
        state, value = update(state, step, jax.device_put(batch, split))
        values.append(value)
        step += 1
        if step % 50 == 0:
            _log(file, step, values)
            values = []
        if time.monotonic() - kept > 60 * keep_every:
            keep(file, state, step)
            if after_keeping:
                after_keeping(rebuild(state["average"]))
            kept = time.monotonic()
        if time.monotonic() >= end:
            break
    keep(file, state, step)
    return rebuild(state["average"])


def _log(file: Path, step: int, values: list[jax.Array]) -> None:
    mean = math.fsum(map(float, values)) / len(values)
    with file.with_suffix(".log").open("a", encoding="utf-8") as log:
        log.write(f"{time.strftime('%H:%M:%S')} step {step} loss {mean:.5f} cpu {time.process_time():.0f} s\n")


def keep(file: Path, state, step: int) -> None:
    """Writes a checkpoint in the place of the one before."""
    arrays = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    beside = file.with_suffix(".part.npz")
    np.savez(beside, step=step, **arrays)
    os.replace(beside, file)


def restore(file: Path, state) -> tuple[object, int]:
    """The checkpoint's state and step, or `state` and 0 where there is none."""
    if not file.exists():
        return state, 0
    leaves, tree = jax.tree.flatten(state)
    with np.load(file) as kept:
        return jax.tree.unflatten(tree, [kept[f"leaf{i}"] for i in range(len(leaves))]), int(kept["step"])
