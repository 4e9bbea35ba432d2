"""The steps of a call, described without devices, weights or prompts: enough to trace and compile them."""

from __future__ import annotations

from collections.abc import Hashable

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from distrijax.models.unet_config import UNetConfig
from distrijax.parallel.stages import Described, Dry, with_shardings
from distrijax.sampling.begin import FromNoise, run_begin
from distrijax.sampling.condition import PromptInputs, run_condition
from distrijax.sampling.denoise import STEPS, AfterUpdate, LoopSpec, NoHook, StepsSpec, call_inputs
from distrijax.sampling.steps import StepInputs, StepPlan

PROMPT_TOKENS = 77
"""Tokens of a prompt, as CLIP's tokenizers pad it."""

TIME_IDS = 6
"""SDXL's; a refiner has 5 and a wider pooled embedding, which leaves the shapes of the conditioning as they are."""


def describe_steps(
    loop: LoopSpec, plan: StepPlan, unet: UNetConfig, images: int = 1, after_update: AfterUpdate | None = None
) -> dict[Hashable, Described]:
    """A program of one step of each kind, by kind, in the order in which the kinds occur.

    Args:
        loop: What all steps depend on.
        plan: The kinds of steps.
        unet: The UNet's configuration.
        images: How many images.
        after_update: What follows each update; None for nothing.
    """
    on, layout, models = Dry(), loop.layout, loop.models
    shardings = jax.tree.map(layout.sharding, models.specs, is_leaf=lambda spec: isinstance(spec, P))
    params = with_shardings(models.abstract_params(layout.mesh.shape, loop.dtype), shardings)
    conditioning = run_condition(on, layout, models, params, _empty_prompt(loop, unet, images))
    table, sigma = loop.scheduler.schedule(2)
    seeds, channels = np.zeros((images, 3), np.uint32), unet.out_channels
    begin = FromNoise()
    keys, state = run_begin(on, layout, loop.scheduler, channels, begin, seeds, None, table, sigma)
    arrays = (after_update or NoHook()).arrays(on, layout, begin, table)
    inputs = call_inputs(on, layout, conditioning, keys, 1.0, 0.0, arrays)
    pieces = on.put((StepInputs.of(table).part(0, 1),), layout.sharding(P()))
    stale, before, described = {}, None, {}
    for kind in dict.fromkeys(plan.kinds):
        if before is not None:  # what the kind before leaves is what this one takes
            state, stale = on.run(STEPS, before, params, inputs, state, stale, pieces)
        before = StepsSpec(loop, (plan.rules[kind],))
        described[kind] = Described(STEPS, before, params, (inputs, state, stale, pieces))
    return described


def _empty_prompt(loop: LoopSpec, unet: UNetConfig, images: int) -> PromptInputs:
    """Zeros in place of a prompt. What the model is not conditioned on is None."""
    lead = (2 if loop.layout.guided else 1, images)

    def zeros(*shape: int, dtype: np.dtype = np.float32) -> np.ndarray:
        return np.broadcast_to(np.zeros((), dtype), (*lead, *shape))

    embeddings = zeros(PROMPT_TOKENS, unet.context(0), dtype=loop.dtype)
    guidance_scale = zeros() if unet.branches == 1 else None
    if not unet.addition_embed_type:
        return PromptInputs(embeddings, guidance_scale=guidance_scale)
    width = unet.projection_class_embeddings_input_dim - TIME_IDS * unet.addition_time_embed_dim
    return PromptInputs(embeddings, zeros(width, dtype=loop.dtype), zeros(TIME_IDS), guidance_scale)
