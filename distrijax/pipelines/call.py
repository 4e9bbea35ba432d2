"""The arguments that calls of all pipelines share, their checks, and the output of a call."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from distrijax.errors import InvalidArgument
from distrijax.pipelines.prompt import Embeddings, Texts
from distrijax.schedulers import Scheduler
from distrijax.validate import check_choice, finite_number, host_array, positive, scalar

Size = tuple[int, int]
Callback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None]
"""`callback_on_step_end`: of pipeline, step, timestep and {"latents": ...}."""


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """Output of a pipeline.

    Attributes:
        images: The images of all prompts, `num_images_per_prompt` for each, in the form that `output_type` asks for: a list of
            PIL images ("pil"), a float32 array [images, height, width, 3] from 0 to 1 ("np"), or latents
            [images, channels, height/f, width/f] on the devices ("latent"). Every process has all of them.
    """

    images: list[Image.Image] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """The arguments that calls of all pipelines share; the pipelines' `__call__` describe them.

    Names, meanings and defaults are diffusers', with these differences:

    - `seed` takes the place of `generator`, and a scheduler with options that of `timesteps`, `sigmas` and `eta`.
    - `callback_on_step_end` always gets the latents and nothing else, so there is no `callback_on_step_end_tensor_inputs`. An
      exception that it raises stops the call.
    - `denoising_end`, `cross_attention_kwargs`, `ip_adapter_image`, `ip_adapter_image_embeds` and `return_dict` are absent.
    - `chunk_size` and `scheduler` are not in diffusers.
    - Images get no watermark.

    With several processes every one makes the same call, and its callback returns the same latents; only process 0 shows
    progress. Several threads of one process may make calls at the same time, of the same pipeline or of several.

    Attributes:
        branches: Branches of guidance that the UNet has (`UNetConfig.branches`).

    Raises:
        InvalidArgument: For arguments that cannot be used.
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
    scheduler: str | Scheduler | None = None

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
        if not isinstance(self.scheduler, str | Scheduler | None):
            raise InvalidArgument(
                f'scheduler is {self.scheduler!r:.60}; give a name, such as "euler", or a scheduler of distrijax.schedulers'
            )
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise InvalidArgument(f"callback_on_step_end is {self.callback_on_step_end!r:.60}; give a function")

    @property
    def guided(self) -> bool:
        """Whether an unconditional branch runs beside the conditional one."""
        return self.guidance_scale > 1 and self.branches == 2


class Request(NamedTuple):
    """All arguments of a call, checked.

    Attributes:
        call: Those that all pipelines share.
        branches: The prompts of each branch of guidance, as `PromptEncoder.read` returns them.
        time_ids: SDXL's micro-conditioning of each branch; None for models without.
    """

    call: Call
    branches: Sequence[Texts | Embeddings | None]
    time_ids: Sequence[Sequence[float]] | None = None

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.branches[-1][0]) * self.call.num_images_per_prompt


def bound_arguments(call: Callable, arguments: Any) -> dict[str, Any]:
    """All arguments of a pipeline's call, defaults included, from those of `compile_for`."""
    try:
        bound = inspect.signature(call).bind(None, **dict(arguments))
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"compile_for: {error}; give a dict of arguments of the pipeline's call") from None
    bound.apply_defaults()
    return bound.arguments


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Images [b, h, w, 3] from 0 to 1 as PIL images, rounded to 8 bits."""
    return [Image.fromarray(image) for image in np.round(images * 255).astype(np.uint8)]


def image_seeds(seed: int | Sequence[int], images: int) -> np.ndarray:
    """Seeds and streams for `noise.image_keys`, [images, 3]: stream i of the one seed, or stream 0 of each image's own seed.

    Args:
        seed: One seed, or one for each image.
        images: Number of images.

    Raises:
        InvalidArgument: For a wrong number of seeds, and for one that is not an integer from 0 to 2**63 - 1.
    """
    several = isinstance(seed, list | tuple | range) or getattr(seed, "ndim", 0) > 0
    seeds, streams = (list(map(scalar, seed)), [0] * images) if several else ([scalar(seed)] * images, range(images))
    if len(seeds) != images:
        raise InvalidArgument(f"seed has {len(seeds)} entries for {images} images; give one, or one for each image")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise InvalidArgument(f"seed is {value!r}; give an integer from 0 to 2**63 - 1")
    parts = [(s & 0xFFFFFFFF, s >> 32, stream) for s, stream in zip(seeds, streams, strict=True)]
    return np.array(parts, np.uint32)


def given_latents(latents: Any, needed: tuple[int, int, int, int]) -> np.ndarray:
    """A caller's starting noise, [b, c, h, w].

    Args:
        latents: The caller's array, of any library.
        needed: The shape that it must have.

    Raises:
        InvalidArgument: For another shape.
    """
    latents = host_array(latents, "latents")
    if latents.shape != needed:
        raise InvalidArgument(
            f"latents is {list(latents.shape)}; give [images, channels, rows, columns], here {list(needed)}"
        )
    return latents
