"""What a call says to its models: embeddings of the prompts and what describes the images, before the loop."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Shaped

from distrijax.config import Parallelism
from distrijax.models.unet import Conditioning
from distrijax.parallel.collectives import local_branches
from distrijax.parallel.layout import Layout
from distrijax.parallel.mesh import DATA, PATCH
from distrijax.parallel.programs import Stage
from distrijax.parallel.stages import On
from distrijax.weights.models import Models, NamedParams

ALL_BRANCHES = P(None, DATA)
"""The sharding of what describes the prompts: all guidance branches on all devices of an image."""


class PromptInputs(NamedTuple):
    """What `UNet.condition` takes, `[branches, images, ...]` each, the unconditional branch first.

    Attributes:
        encoder_hidden_states: Prompt embeddings, `[branches, images, tokens, e]`.
        text_embeds: Pooled prompt embeddings, `[branches, images, p]`; SDXL's.
        time_ids: Micro-conditioning in pixels, `[branches, images, i]`; SDXL's.
        guidance_scale: `[branches, images]`, for models that are conditioned on it.
    """

    encoder_hidden_states: Shaped[Any, "branches images t e"]
    text_embeds: Shaped[Any, "branches images p"] | None = None
    time_ids: Shaped[Any, "branches images i"] | None = None
    guidance_scale: Shaped[Any, "branches images"] | None = None


def condition(static: tuple[Layout, Models], params: NamedParams, prompt: PromptInputs) -> dict[str, Conditioning]:
    """Runs `condition` of each model for all branches and images, and leaves the result on the devices that will use it.

    The devices of an image share the work: each computes a part of the channels of keys and values, for all branches.

    Args:
        static: The layout of the call, and the models.
        params: The models' parameters.
        prompt: What the call says.
    """
    layout, models = static

    def local(params, prompt):
        lead = prompt.encoder_hidden_states.shape[:2]
        merged = merge_lead_axes(prompt)
        result = {
            name: module.condition(*merged, exchange=layout.exact()) for name, module in models.modules(params).items()
        }
        result = jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), result)
        return jax.tree.map(local_branches, result) if layout.guided else result

    mapped = jax.shard_map(
        local, mesh=layout.mesh, in_specs=(models.specs, ALL_BRANCHES), out_specs=conditioning_specs(layout, models)
    )
    return mapped(params, prompt)


def conditioning_specs(layout: Layout, models: Models) -> dict[str, Conditioning]:
    """How conditionings are sharded: as `Layout.branches`; with tensor parallelism, keys and values by heads.

    Args:
        layout: The layout of the call.
        models: The models.
    """
    heads = PATCH if layout.parallelism is Parallelism.TENSOR else None
    each = Conditioning(P(*layout.branches, None, heads), layout.branches, layout.branches)
    return {name: each for name, _ in models.layouts}


def _conditioned(static: tuple[Layout, Models]) -> dict[str, Conditioning]:
    layout, models = static
    return jax.tree.map(layout.sharding, conditioning_specs(layout, models), is_leaf=lambda spec: isinstance(spec, P))


CONDITION = Stage(condition, _conditioned)


def run_condition(on: On, layout: Layout, models: Models, params: NamedParams, prompt: PromptInputs) -> Any:
    """The conditioning of each model, on the devices.

    Args:
        on: Where the call runs.
        layout: The layout of the call.
        models: The models.
        params: The models' parameters.
        prompt: What the call says, on the host.
    """
    return on.run(CONDITION, (layout, models), params, on.put(prompt, layout.sharding(ALL_BRANCHES)))


def merge_lead_axes(branches_and_images: Any) -> Any:
    """Merges the first two axes of every leaf, branches and images.

    Args:
        branches_and_images: A tree of arrays `[branches, images, ...]`.
    """
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), branches_and_images)


def guidance_weights(scale: float, *, guided: bool) -> Float[np.ndarray, "branches 2"]:
    """`CallInputs.weights` of classifier-free guidance, uncond + scale * (text - uncond).

    Args:
        scale: The guidance scale.
        guided: Whether there is an unconditional branch.

    References:
        arXiv 2207.12598.
    """
    return np.array([[1.0 - scale, 0.0], [scale, 1.0]] if guided else [[1.0, 1.0]], np.float32)
