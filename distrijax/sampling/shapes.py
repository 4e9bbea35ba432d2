"""Shapes of what the programs of a call take, and how they lie on the mesh: enough to trace and to compile them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distrijax.models.unet_config import UNetConfig
from distrijax.parallel.exchange import Stale
from distrijax.parallel.programs import Params, trace
from distrijax.sampling import denoise
from distrijax.sampling.denoise import CallInputs, LoopSpec, StepInputs
from distrijax.sampling.noise import image_keys
from distrijax.weights.sharding import placed

PROMPT_TOKENS = 77


class StepProgram(NamedTuple):
    """A program of one step, and the shapes of what it takes: `function(loop, params, *arguments)`.

    stale: of `arguments`; empty where it takes none. donate: those of `arguments` that it may overwrite. traced: the program,
    where the shapes of another one's arguments took to trace it.
    """

    function: Callable
    loop: LoopSpec
    params: Params
    arguments: tuple
    stale: Stale
    donate: tuple[int, ...]
    traced: jax.stages.Traced | None = None

    def placed(self) -> tuple:
        """`params` and `arguments` with how they lie on the mesh."""
        specs = denoise.specs_of(self.loop, stale=bool(self.stale))
        return placed(self.loop.layout.mesh, specs, (self.params, *self.arguments))


def step_programs(
    loop: LoopSpec, unet: UNetConfig, images: int, *, tokens: int = PROMPT_TOKENS, rescale: bool = False
) -> list[StepProgram]:
    """The kinds of steps that a call has, the one that most of its steps are last.

    tokens: of a prompt. rescale: whether guidance is rescaled.
    """
    params = loop.unet.abstract_params(loop.layout.mesh.shape, loop.dtype)
    inputs, state, xs = _arguments(loop, unet, params, images, tokens, rescale)
    if loop.strategy is None:
        return [StepProgram(denoise.synchronous_steps, loop, params, (inputs, state, xs), {}, (1,))]
    first = StepProgram(denoise.warm_up, loop, params, (inputs, state, xs), {}, (1,))
    traced = trace(first.function, loop, *first.placed(), donate=first.donate)
    state, stale = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), traced.out_info)
    second = StepProgram(denoise.displaced, loop, params, (inputs, state, stale, xs), stale, (1, 2))
    return [first._replace(traced=traced), second]


def prompt_of(loop: LoopSpec, unet: UNetConfig, images: int, tokens: int) -> tuple:
    """What `denoise.condition` takes besides parameters, placed: see `_prompt`."""
    return placed(loop.layout.mesh, denoise.ALL_BRANCHES, _prompt(loop, unet, images, tokens))


def latents_of(loop: LoopSpec, unet: UNetConfig, images: int) -> jax.ShapeDtypeStruct:
    """The latents of a call, placed."""
    layout = loop.layout
    return placed(layout.mesh, layout.latents, _array(images, *layout.padded_shape, unet.in_channels))


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _prompt(loop: LoopSpec, unet: UNetConfig, images: int, tokens: int) -> tuple:
    """Embeddings; SDXL's pooled embedding and sizes, or None twice; the guidance scale, where the model is told it, or None."""
    branches = 2 if loop.layout.guided else 1
    embeddings = _array(branches, images, tokens, unet.context(0), dtype=loop.dtype)
    guidance_scale = _array(branches, images) if unet.branches == 1 else None
    if not unet.addition_embed_type:
        return embeddings, None, None, guidance_scale
    sizes = 6  # of SDXL's micro-conditioning; a refiner has 5, which changes nothing here
    width = unet.projection_class_embeddings_input_dim - sizes * unet.addition_time_embed_dim
    pooled = _array(branches, images, width, dtype=loop.dtype)
    return embeddings, pooled, _array(branches, images, sizes), guidance_scale


def _arguments(loop: LoopSpec, unet: UNetConfig, params: Params, images: int, tokens: int, rescale: bool) -> tuple:
    """Inputs, state, and the constants of one step."""
    prompt = _prompt(loop, unet, images, tokens)
    conditioning = jax.eval_shape(partial(denoise.condition, (loop.layout, loop.unet)), params, *prompt)
    keys = jax.eval_shape(image_keys, _array(images, 3, dtype=jnp.uint32))
    inputs = CallInputs(conditioning, _array(prompt[0].shape[0], 2), _array() if rescale else None, keys)
    state = jax.eval_shape(loop.scheduler.init, latents_of(loop, unet, images), _array())
    xs = jax.tree.map(lambda column: column[:1], StepInputs.of(loop.scheduler.schedule(2)[0]))
    return inputs, state, xs
