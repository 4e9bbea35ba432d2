"""The arguments of calls, their checks, and the output of a call."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import numpy as np
from PIL import Image

from distrijax.config import check_large
from distrijax.errors import InvalidArgument
from distrijax.pipelines.prompt import Embeddings, Prompt, Texts
from distrijax.sampling.begin import Begin, FromNoise
from distrijax.sampling.denoise import AfterUpdate, NoHook
from distrijax.sampling.predict import PREDICT_NOISE, Predictor
from distrijax.schedulers import Scheduler
from distrijax.validate import check_argument, check_choice, finite_number, host_array, positive, scalar

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
    """The arguments of a call that all pipelines share; a family's calls add theirs in a subclass.

    Names, meanings and defaults are diffusers', with these differences:

    - `seed` takes the place of `generator`, and a scheduler with options that of `timesteps`, `sigmas` and `eta`.
    - `callback_on_step_end` always gets the latents and nothing else, so there is no `callback_on_step_end_tensor_inputs`. An
      exception that it raises stops the call.
    - `denoising_end`, `cross_attention_kwargs`, `ip_adapter_image`, `ip_adapter_image_embeds` and `return_dict` are absent.
    - `chunk_size`, `large` and `scheduler` are not in diffusers.
    - Images get no watermark.

    With several processes every one makes the same call, and its callback returns the same latents; only process 0 shows
    progress. Several threads of one process may make calls at the same time, of the same pipeline or of several.

    Attributes:
        prompt: The prompt, or a list of them; None if `prompt_embeds` is given.
        height: Height of the images in pixels. Default: the size that the model was trained for.
        width: Width of the images in pixels. Default: the size that the model was trained for.
        num_inference_steps: Number of denoising steps.
        guidance_scale: Scale of classifier-free guidance; above 1 an unconditional branch runs, too. A UNet that is
            conditioned on the guidance scale (`UNetConfig.branches`; LCM) runs one branch; negative prompts and
            `guidance_rescale` have no effect on it.
        guidance_rescale: How much of the guided prediction is rescaled to the contrast of the conditional one, from 0 to 1
            (arXiv 2305.08891, section 3.4).
        negative_prompt: What images should not show; one for all prompts or one for each. Default: "", or embeddings of zeros
            for an SDXL checkpoint, unless its model_index.json sets `force_zeros_for_empty_prompt` to false.
        num_images_per_prompt: Images of each prompt.
        seed: Of the noise: one for all images (image i draws from its i-th stream), or one for each image; an integer, or a
            key of `jax.random`. The noise is the same on any mesh and, unlike that of diffusers' generator, in every call.
        latents: Starting noise [images, channels, height/f, width/f] in place of the seed's, normally distributed; f is
            the VAE's factor (8).
        prompt_embeds: Token embeddings [prompts, tokens, width] in place of `prompt`, as `encode_prompt` returns them.
        negative_prompt_embeds: The same for `negative_prompt`.
        clip_skip: How many of the text encoders' last layers are skipped for the prompt. Default: 0.
        output_type: "pil", "np" or "latent"; see `PipelineOutput`.
        callback_on_step_end: Called after each step as `callback(pipeline, step, timestep, {"latents": latents})`, with
            latents [images, channels, height/f, width/f]. It may return {"latents": ...} to continue from, and stop the
            call by an exception. A step is a call of the UNet; PNDM makes one more than `num_inference_steps`.
        chunk_size: Steps between two updates of the progress bar and two calls of the callback. None runs the loop as one
            program, or step by step with `DistriConfig.sync_steps` or a callback.
        large: How an image larger than the model was trained for is made, so that it still shows what was asked for. "auto":
            while the timestep is high, the deep part of the UNet runs on a map of about the trained size; only for images of
            more than 1.6 times the trained area. "off": never. Or pairs (timestep, factor), such as
            `[(350, 0.25), (200, 0.5)]`: by what height and width of the map shrink at timesteps above that.
        scheduler: A scheduler for this call, or a name from `distrijax.schedulers.SCHEDULERS`, which gets the options of
            the pipeline's. Default: the pipeline's.

    Raises:
        InvalidArgument: For arguments that cannot be used.
    """

    prompt: Prompt | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    negative_prompt: Prompt | None = None
    num_images_per_prompt: int = 1
    seed: int | jax.Array | Sequence[int | jax.Array] = 0
    latents: Any = None
    prompt_embeds: Any = None
    negative_prompt_embeds: Any = None
    clip_skip: int | None = None
    output_type: str = "pil"
    callback_on_step_end: Callback | None = None
    chunk_size: int | None = 1
    large: str | Sequence[tuple[float, float]] = "off"
    scheduler: str | Scheduler | None = None

    POSITIONAL: ClassVar[tuple[str, ...]] = ("prompt",)
    """Arguments that may be given without their names."""

    ARRAYS: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "negative_prompt_embeds")
    """Arguments that are arrays, of any library."""

    def __post_init__(self):
        check_choice(self.output_type, ("pil", "np", "latent"), "output_type")
        self._set("guidance_scale", finite_number(self.guidance_scale, "guidance_scale"))
        self._set("guidance_rescale", finite_number(self.guidance_rescale, "guidance_rescale", least=0))
        for name in ("num_inference_steps", "num_images_per_prompt"):
            self._set(name, positive(getattr(self, name), name))
        for name in ("height", "width", "chunk_size"):
            if getattr(self, name) is not None:
                self._set(name, positive(getattr(self, name), name))
        skipped = 0 if self.clip_skip is None else self.clip_skip
        self._set("clip_skip", positive(skipped, "clip_skip", least=0))
        self._set("large", check_large(self.large))
        if not isinstance(self.scheduler, str | Scheduler | None):
            raise InvalidArgument(
                f'scheduler is {self.scheduler!r:.60}; give a name, such as "euler", or a scheduler of distrijax.schedulers'
            )
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise InvalidArgument(f"callback_on_step_end is {self.callback_on_step_end!r:.60}; give a function")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, *positional: Any, **named: Any) -> Self:
        """The arguments of a call as it was written.

        Args:
            *positional: Of `POSITIONAL`; or the arguments as one object of this class, alone.
            **named: The others.

        Raises:
            InvalidArgument: For arguments that there are not, and for those that cannot be used.
        """
        if len(positional) == 1 and isinstance(positional[0], cls) and not named:
            return positional[0]
        names = [field.name for field in dataclasses.fields(cls)]
        if len(positional) > len(cls.POSITIONAL):
            raise InvalidArgument(
                f"{len(positional)} arguments have no name; give all but {' and '.join(cls.POSITIONAL)} by name"
            )
        given = dict(zip(cls.POSITIONAL, positional, strict=False))
        for name in named:
            if name in given:
                raise InvalidArgument(f"{name} is given twice; give it once")
            check_argument(name, names, "a call")
        return cls(**given, **named)


def call_method(kind: type[Call]) -> Callable[..., PipelineOutput]:
    """A pipeline's `__call__`, whose arguments are the fields of a class.

    Args:
        kind: The class.
    """

    def __call__(self, *prompts, **arguments) -> PipelineOutput:
        return self._generate(self._read(kind.of(*prompts, **arguments)))

    by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", by_position)]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    ordered = [*kind.POSITIONAL, *(name for name in fields if name not in kind.POSITIONAL)]
    for name in ordered:
        how = by_position if name in kind.POSITIONAL else inspect.Parameter.KEYWORD_ONLY
        field = fields[name]
        parameters.append(inspect.Parameter(name, how, default=field.default, annotation=field.type))
    __call__.__signature__ = inspect.Signature(parameters, return_annotation=PipelineOutput)
    described = "\n".join(_attributes(part) for part in kind.__mro__ if issubclass(part, Call))
    __call__.__doc__ = (
        "Generates images of prompts.\n\nNames, meanings and defaults are diffusers'; "
        f"`distrijax.pipelines.call.Call` lists the differences.\n\nArgs:\n{described}\n\n"
        "Returns:\n    The images.\n\nRaises:\n    InvalidArgument: For arguments that cannot be used.\n"
    )
    return __call__


def _attributes(kind: type[Call]) -> str:
    """The section "Attributes" of a class's docstring."""
    _, _, section = inspect.cleandoc(kind.__doc__).partition("Attributes:\n")
    return section.partition("\n\n")[0]


class Request(NamedTuple):
    """A call, read for a pipeline and checked.

    Attributes:
        call: Its arguments.
        size: Height and width of the images in pixels.
        branches: The prompts of each branch of guidance, as `PromptEncoder.read` returns them.
        time_ids: SDXL's micro-conditioning of each branch; None for models without.
        begin: Where the call begins.
        predictor: What steps predict with at the latents' size, where the UNet is divided into patches.
        after_update: What follows each update of the scheduler.
    """

    call: Call
    size: Size
    branches: Sequence[Texts | Embeddings | None]
    time_ids: Sequence[Sequence[float]] | None = None
    begin: Begin = FromNoise()
    predictor: Predictor = PREDICT_NOISE
    after_update: AfterUpdate = NoHook()

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.branches[-1][0]) * self.call.num_images_per_prompt


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Images [b, h, w, 3] from 0 to 1 as PIL images, rounded to 8 bits."""
    return [Image.fromarray(image) for image in np.round(images * 255).astype(np.uint8)]


def image_seeds(seed: Any, images: int) -> np.ndarray:
    """Seeds and streams for `noise.image_keys`, [images, 3]: stream i of the one seed, or stream 0 of each image's own seed.

    Args:
        seed: One seed, or one for each image: integers or JAX keys. `jax.random.key(3)` is the seed 3.
        images: Number of images.

    Raises:
        InvalidArgument: For a wrong number of seeds, and for one that is not an integer from 0 to 2**63 - 1.
    """
    if isinstance(seed, list | tuple) and seed and all(map(_is_key, seed)):
        keys = [_words_of(key) for key in seed]
        return _seed_parts([each for key in keys for each in key], [0] * images, images)
    if _is_key(seed):
        keys = _words_of(seed)
        alone = len(keys) == 1 and not _key_axes(seed)
        return _seed_parts(keys * images if alone else keys, range(images) if alone else [0] * images, images)
    several = isinstance(seed, list | tuple | range) or getattr(seed, "ndim", 0) > 0
    seeds, streams = (list(map(scalar, seed)), [0] * images) if several else ([scalar(seed)] * images, range(images))
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise InvalidArgument(f"seed is {value!r}; give an integer from 0 to 2**63 - 1, or a key of jax.random")
    return _seed_parts([(value >> 32, value & 0xFFFFFFFF) for value in seeds], streams, images)


def _seed_parts(words: Sequence[tuple[int, int]], streams: Sequence[int], images: int) -> np.ndarray:
    """The result of `image_seeds`, of the high and low half of each seed."""
    if len(words) != images:
        raise InvalidArgument(f"seed has {len(words)} entries for {images} images; give one, or one for each image")
    return np.array([(low, high, stream) for (high, low), stream in zip(words, streams, strict=True)], np.uint32)


def _is_key(seed: Any) -> bool:
    """Whether this is a key of jax.random, or an array of keys: typed, or as `jax.random.PRNGKey` makes them."""
    if not isinstance(seed, jax.Array):
        return False
    typed = jax.dtypes.issubdtype(seed.dtype, jax.dtypes.prng_key)
    return typed or (seed.dtype == np.uint32 and seed.ndim >= 1 and seed.shape[-1] == 2)


def _key_axes(key: jax.Array) -> int:
    """Axes of an array of keys; 0 of a single key."""
    return key.ndim if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) else key.ndim - 1


def _words_of(key: jax.Array) -> list[tuple[int, int]]:
    """High and low half of the seed of each key; other generators than Threefry have more words, which repeat these."""
    typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    data = np.asarray(jax.random.key_data(key) if typed else key)
    return [(int(high), int(low)) for high, low, *_ in data.reshape(-1, data.shape[-1])]


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
