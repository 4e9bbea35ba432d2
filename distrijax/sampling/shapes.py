"""Shapes and shardings of what the programs of a call take: enough to trace and compile them without values."""

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
"""Tokens of a prompt, as CLIP's tokenizers pad it."""


class StepProgram(NamedTuple):
    """The program of one step and the shapes of its arguments, `function(loop, params, *arguments)`.

    Attributes:
        function: A function of `denoise`.
        loop: Its static argument.
        params: The UNet's parameters.
        arguments: What it takes besides.
        stale: The stale state in `arguments`; empty if there is none.
        donate: Indices of `arguments` whose memory it may overwrite.
        traced: The traced program, if finding the shapes of the next program's arguments has traced it; otherwise None.
    """

    function: Callable
    loop: LoopSpec
    params: Params
    arguments: tuple
    stale: Stale
    donate: tuple[int, ...]
    traced: jax.stages.Traced | None = None

    def placed(self) -> tuple:
        """`params` and `arguments`, with their shardings."""
        specs = denoise.specs_of(self.loop, stale=bool(self.stale))
        return placed(self.loop.layout.mesh, specs, (self.params, *self.arguments))


def step_programs(
    loop: LoopSpec, unet: UNetConfig, images: int, *, tokens: int = PROMPT_TOKENS, rescale: bool = False
) -> list[StepProgram]:
    """The kinds of steps that a call has. The last one is the kind of most of its steps.

    Args:
        loop: The loop of the call.
        unet: The UNet's configuration.
        images: How many images.
        tokens: Tokens of a prompt.
        rescale: Whether the call uses `guidance_rescale`.
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
    """What `denoise.condition` takes besides parameters, with shardings (`_prompt`)."""
    return placed(loop.layout.mesh, denoise.ALL_BRANCHES, _prompt(loop, unet, images, tokens))


def latents_of(loop: LoopSpec, unet: UNetConfig, images: int) -> jax.ShapeDtypeStruct:
    """The latents of a call, with their sharding."""
    layout = loop.layout
    return placed(layout.mesh, layout.latents, _abstract(images, *layout.padded_shape, unet.in_channels))


def _abstract(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An array's shape and dtype."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _prompt(loop: LoopSpec, unet: UNetConfig, images: int, tokens: int) -> tuple:
    """Embeddings; SDXL's pooled embeddings and time_ids; the guidance scale. What the model is not conditioned on is None."""
    branches = 2 if loop.layout.guided else 1
    embeddings = _abstract(branches, images, tokens, unet.context(0), dtype=loop.dtype)
    guidance_scale = _abstract(branches, images) if unet.branches == 1 else None
    if not unet.addition_embed_type:
        return embeddings, None, None, guidance_scale
    time_ids = (
        6  # SDXL's; a refiner has 5 and a wider pooled embedding, which leaves the shapes of the result as they are
    )
    width = unet.projection_class_embeddings_input_dim - time_ids * unet.addition_time_embed_dim
    pooled = _abstract(branches, images, width, dtype=loop.dtype)
    return embeddings, pooled, _abstract(branches, images, time_ids), guidance_scale


def _arguments(loop: LoopSpec, unet: UNetConfig, params: Params, images: int, tokens: int, rescale: bool) -> tuple:
    """A step's arguments: inputs, scheduler state, and the constants of one step."""
    prompt = _prompt(loop, unet, images, tokens)
    conditioning = jax.eval_shape(partial(denoise.condition, (loop.layout, loop.unet)), params, *prompt)
    keys = jax.eval_shape(image_keys, _abstract(images, 3, dtype=jnp.uint32))
    inputs = CallInputs(conditioning, _abstract(prompt[0].shape[0], 2), _abstract() if rescale else None, keys)
    state = jax.eval_shape(loop.scheduler.init, latents_of(loop, unet, images), _abstract())
    xs = jax.tree.map(lambda column: column[:1], StepInputs.of(loop.scheduler.schedule(2)[0]))
    return inputs, state, xs
