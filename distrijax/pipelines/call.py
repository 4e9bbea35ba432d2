"""The arguments that the calls of all pipelines share, checked, and what a call returns."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from distrijax.errors import DistriError
from distrijax.pipelines.prompt import Embeddings, Texts
from distrijax.validate import check_choice, finite_number, host_array, positive, scalar

Size = tuple[int, int]
Callback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """What a call returns.

    images: PIL pictures; or float32 [b, h, w, 3] in 0 to 1 (`np`); or latents [b, c, h, w] (`latent`). Of several processes
        each has all of them.
    """

    images: list[Image.Image] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """The arguments that the calls of all pipelines have; as in diffusers, except those below and those that are not there.

    Not there: generator (give `seed`); timesteps, sigmas and eta (give a scheduler, with its options); denoising_end;
    cross_attention_kwargs and ip_adapter_image; callback_on_step_end_tensor_inputs (it is given the latents); return_dict.
    To stop a call, raise an exception in `callback_on_step_end`.

    height, width: pixels. guidance_scale: above 1 both branches run; a UNet that is told the scale (`UNetConfig.branches`)
    has one, and negative prompts and guidance_rescale say nothing to it. seed: one for all images (image i draws from the
    i-th stream of it), or one for each image; the same on any mesh, and, unlike diffusers' generator, in every call. latents:
    starting noise [images, c, height/f, width/f], instead of `seed`'s; `output_type="latent"` gives the same layout.
    callback_on_step_end(pipeline, step, timestep, {"latents": ...}) may return {"latents": ...} to go on from; a step is a call
    of the UNet, of which PNDM makes one more than `num_inference_steps`. chunk_size: steps for each visit of the host, for
    progress and callback; None runs the whole loop as one program, or step by step where `DistriConfig.sync_steps` interrupt it.
    No watermark is put into pictures. Of several processes all make the same call, the callback's latents included; process 0
    alone shows progress.
    Raises DistriError for arguments that cannot be used.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    num_images_per_prompt: int
    clip_skip: int | None  # None is 0
    branches: int
    seed: int | Sequence[int] = 0
    latents: Any = None
    output_type: str = "pil"
    callback_on_step_end: Callback | None = None
    chunk_size: int | None = 1

    def __post_init__(self):
        check_choice(self.output_type, ("pil", "np", "latent"), "output_type")
        object.__setattr__(self, "guidance_scale", finite_number(self.guidance_scale, "guidance_scale"))
        rescale = finite_number(self.guidance_rescale, "guidance_rescale", least=0)
        object.__setattr__(self, "guidance_rescale", rescale)
        for name in ("height", "width", "num_inference_steps", "num_images_per_prompt"):
            object.__setattr__(self, name, positive(getattr(self, name), name))
        if self.chunk_size is not None:
            object.__setattr__(self, "chunk_size", positive(self.chunk_size, "chunk_size"))
        skipped = 0 if self.clip_skip is None else self.clip_skip
        object.__setattr__(self, "clip_skip", positive(skipped, "clip_skip", least=0))
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise DistriError(f"callback_on_step_end is {self.callback_on_step_end!r:.60}; give a function")

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1 and self.branches == 2


class Request(NamedTuple):
    """What a call is asked for.

    branches: of guidance, as `PromptEncoder.read` returns them. time_ids: SDXL's micro-conditioning of each.
    """

    call: Call
    branches: Sequence[Texts | Embeddings | None]
    time_ids: Sequence[Sequence[float]] | None = None

    @property
    def images(self) -> int:
        return len(self.branches[-1][0]) * self.call.num_images_per_prompt


def bound_arguments(call: Callable, arguments: Any) -> dict[str, Any]:
    """All arguments of a pipeline's call, of those given for its first one."""
    try:
        bound = inspect.signature(call).bind(None, **dict(arguments))
    except (TypeError, ValueError) as error:
        raise DistriError(f"compile_for: {error}; give a dict of arguments of the pipeline's call") from None
    bound.apply_defaults()
    return bound.arguments


def to_pil(pictures: np.ndarray) -> list[Image.Image]:
    """Pictures [b, h, w, 3] in 0 to 1 as PIL images, rounded to 8 bit."""
    return [Image.fromarray(picture) for picture in np.round(pictures * 255).astype(np.uint8)]


def image_seeds(seed: int | Sequence[int], images: int) -> np.ndarray:
    """What `noise.image_keys` takes: for each image a stream of one seed, or the first stream of its own seed."""
    several = isinstance(seed, list | tuple | range) or getattr(seed, "ndim", 0) > 0
    seeds, streams = (list(map(scalar, seed)), [0] * images) if several else ([scalar(seed)] * images, range(images))
    if len(seeds) != images:
        raise DistriError(f"seed has {len(seeds)} entries for {images} images; give one, or one for each image")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise DistriError(f"seed is {value!r}; give a whole number from 0 to 2**63 - 1")
    parts = [(s & 0xFFFFFFFF, s >> 32, stream) for s, stream in zip(seeds, streams, strict=True)]
    return np.array(parts, np.uint32)


def given_latents(latents: Any, needed: tuple[int, int, int, int]) -> np.ndarray:
    """A caller's starting noise [b, c, h, w]."""
    latents = host_array(latents, "latents")
    if latents.shape != needed:
        raise DistriError(
            f"latents is {list(latents.shape)}; give [images, channels, rows, columns], here {list(needed)}"
        )
    return latents
