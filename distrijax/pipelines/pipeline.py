"""What all pipelines share: devices, programs, the starting noise, the loop and decoding; a prompt is a subclass's affair."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from PIL import Image

from distrijax import denoise
from distrijax.config import (
    DistriConfig,
    DistriError,
    Parallelism,
    check_choice,
    finite_number,
    host_array,
    positive,
    scalar,
)
from distrijax.decode import Decoder, decode
from distrijax.denoise import Inputs, Layout, Loop, Steps, layout_of, loop_of
from distrijax.exchange import strategy_of
from distrijax.loading import (
    Components,
    Family,
    default_size,
    find_folder,
    outline_components,
    read_components,
    read_configs,
    resolve_dtype,
)
from distrijax.mesh import CFG, DATA, check_images, check_sizes, pick_devices, plan_mesh
from distrijax.processes import connect, fetch, is_first, put, warn
from distrijax.programs import Programs
from distrijax.progress import Progress
from distrijax.prompt import Embeddings, PromptEncoder, Prompts, Texts
from distrijax.schedulers import Scheduler
from distrijax.shapes import PROMPT_TOKENS, latents_of, prompt_of, steps_of
from distrijax.unet import UNetConfig
from distrijax.vae import VAEConfig

Size = tuple[int, int]
Callback = Callable[["Pipeline", int, float, dict[str, Any]], dict[str, Any] | None]


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


class Pipeline:
    """All of a pipeline but its conditioning: a subclass names its family, reads a call's arguments, and has the call itself."""

    family: ClassVar[Family]

    def __init__(
        self,
        components: Components,
        mesh: jax.sharding.Mesh,
        config: DistriConfig,
        dtype: jnp.dtype,
        compiler_options: Mapping[str, Any] | None = None,
    ):
        self.mesh, self.config, self.dtype = mesh, config, dtype
        self.scheduler = components.scheduler
        self.unet_config, self.vae_config = components.unet.config, components.vae.config
        self.programs = Programs(mesh.devices.flat[0].platform, compiler_options, shard_weights=config.shard_weights)
        self._everywhere = jax.sharding.NamedSharding(mesh, P())
        self._progress: dict[str, Any] = {}
        self._take(components)

    def _take(self, components: Components) -> None:
        self._prompts = PromptEncoder(
            components.tokenizers,
            components.text_encoders,
            pooled=self.family.pooled,
            zeros_for_empty=self.family.pooled and bool(components.index.get("force_zeros_for_empty_prompt", True)),
            everywhere=self._everywhere,
            programs=self.programs,
        )
        self._unet, self._vae = components.unet, components.vae

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        distri_config: DistriConfig | None = None,
        *,
        dtype: Any = None,
        variant: str | None = None,
        scheduler: str | None = None,
        scheduler_options: Mapping[str, Any] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        compiler_options: Mapping[str, Any] | None = None,
        compile_for: Mapping[str, Any] | None = None,
    ) -> Self:
        """Reads a folder in the diffusers layout, or a hub id, onto the devices.

        dtype: float32, bfloat16 or float16; None is bfloat16 on accelerators and float32 on CPUs. variant: of the weight
        files, e.g. "fp16". scheduler: a name out of `distrijax.schedulers.SCHEDULERS` instead of the checkpoint's.
        scheduler_options: options instead of the checkpoint's, such as timestep_spacing="trailing". revision, token,
        local_files_only: of the hub.
        compiler_options: XLA's for all programs, before `distrijax.programs.options_for`. compile_for: the arguments of the first
        call; its programs are compiled while the weights are read.
        Raises DistriError for a checkpoint that is not whole or of another family, and for devices that are not there.
        """
        config = DistriConfig() if distri_config is None else distri_config
        if not isinstance(config, DistriConfig):
            raise DistriError(f"distri_config is {config!r:.60}; give a DistriConfig, such as DistriConfig(devices=8)")
        devices = jax.devices()
        count = config.devices or len(devices)
        if count > len(devices):
            raise DistriError(
                f"devices is {count} and JAX shows {len(devices)} ({devices[0].platform}); ask for at most {len(devices)}"
            )
        dtype = resolve_dtype(dtype, devices[0].platform)
        folder = find_folder(
            pretrained_model_name_or_path,
            variant=variant,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
        )
        configs = read_configs(folder, scheduler, scheduler_options, needed=cls.family)
        mesh = plan_mesh(config, count, branches=configs.unet.branches).build(pick_devices(devices, count))
        connect(mesh)
        components = outline_components(
            folder,
            configs,
            dtype=dtype,
            mesh=mesh,
            parallelism=config.parallelism,
            shard_weights=config.shard_weights,
        )
        pipe = cls(components, mesh, config, dtype, compiler_options)
        try:
            if compile_for is not None:
                pipe._prepare(compile_for)
            pipe._take(read_components(components, folder, cls.family, variant=variant, mesh=mesh))
        except BaseException:
            pipe.programs.abandon()
            raise
        return pipe

    def _prepare(self, arguments: Mapping[str, Any]) -> None:
        """Begins to compile what a call with these arguments will run, step by step.

        Not what a `chunk_size` other than 1 changes; those programs compile in the call.
        """
        given = _bound(type(self).__call__, arguments)
        if given["prompt"] is None and given["prompt_embeds"] is None:
            given["prompt"] = ""
        request = self._read(given)
        call, images, unet = request.call, request.images, self.unet_config
        check_images(images, self.mesh.shape[DATA])
        _image_seeds(call.seed, images)
        steps, _ = self.scheduler.schedule(call.num_inference_steps)
        loop = self._loop(call, len(steps.timestep))
        text = request.branches[-1]
        tokens = text.tokens.shape[1] if isinstance(text, Embeddings) else PROMPT_TOKENS
        rescale = call.guided and call.guidance_rescale > 0
        for step in steps_of(loop, unet, images, tokens=tokens, rescale=rescale):
            self.programs.prepare(step.function, loop, *step.placed(), donate=step.donate)
        self._prompts.prepare(request.branches, clip_skip=call.clip_skip)
        prompt = prompt_of(loop, unet, images, tokens)
        self.programs.prepare(denoise.condition, (loop.layout, loop.unet), self._unet.params, *prompt)
        seeds = jax.ShapeDtypeStruct((images, 3), np.uint32, sharding=loop.layout.sharding(P(DATA)))
        sigma = jax.ShapeDtypeStruct((), np.float32, sharding=self._everywhere)
        latents = latents_of(loop, unet, images)
        noise = None
        if call.latents is not None:
            _given_latents(call.latents, (images, unet.in_channels, *loop.layout.latent))
            noise = latents
        self.programs.prepare(_begin, (loop, unet.in_channels), (), seeds, sigma, noise)
        if call.output_type != "latent":
            self.programs.prepare(decode, self._decoder(loop.layout), self._vae.params, latents)

    def _read(self, given: Mapping[str, Any]) -> Request:
        """All arguments of a call, by their names; raises DistriError for those that cannot be used."""
        raise NotImplementedError

    def decode(self, latents: Any, *, output_type: str = "pil") -> PipelineOutput:
        """Pictures of what a call with `output_type="latent"` gave, or of any latents [b, c, h, w]: `pil` or `np`."""
        check_choice(output_type, ("pil", "np"), "output_type")
        latents, channels = host_array(latents, "latents"), self.unet_config.in_channels
        if latents.ndim != 4 or latents.shape[1] != channels or not latents.size:
            raise DistriError(f"latents is {list(latents.shape)}; give [images, {channels}, rows, columns]")
        check_images(len(latents), self.mesh.shape[DATA])
        size = tuple(side * self.vae_config.scale for side in latents.shape[2:])
        layout = lay_out(self.config, self.mesh, self.unet_config, self.vae_config, size, guided=False)
        return self._pictures(layout, _to_canvas(layout, latents), output_type)

    def _encode(
        self, prompts: Prompts, negative_prompts: Prompts, clip_skip: int | None
    ) -> tuple[Embeddings, Embeddings]:
        """The embeddings of prompts, and of negative ones."""
        branches = self._prompts.read(prompts, negative_prompts, None, None, guided=True)
        skipped = positive(0 if clip_skip is None else clip_skip, "clip_skip", least=0)
        negative, text = self._prompts.encode(branches, clip_skip=skipped)
        return text, negative

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Settings of the tqdm progress bar, e.g. disable=True."""
        self._progress = settings

    def _paint(self, request: Request) -> PipelineOutput:
        """The pictures; all is checked before anything is compiled."""
        call, branches, time_ids = request
        if not isinstance(self.scheduler, Scheduler):
            raise DistriError(
                f"the pipeline's scheduler is {self.scheduler!r:.60}; give one of distrijax.schedulers, such as "
                'with_class(pipeline.scheduler, "euler")'
            )
        steps, init_noise_sigma = self.scheduler.schedule(call.num_inference_steps)
        loop = self._loop(call, len(steps.timestep))
        self._warn_of_idle_options(loop, len(steps.timestep))
        layout = loop.layout
        images = request.images
        check_images(images, self.mesh.shape[DATA])
        seeds = put(_image_seeds(call.seed, images), layout.sharding(P(DATA)))
        channels = self.unet_config.in_channels
        noise = None
        if call.latents is not None:
            noise = _to_canvas(layout, _given_latents(call.latents, (images, channels, *layout.latent)))
        embeddings = self._prompts.encode(branches, clip_skip=call.clip_skip)
        sigma = put(np.float32(init_noise_sigma), self._everywhere)
        keys, state = self.programs(_begin, (loop, channels), (), seeds, sigma, noise)
        inputs = self._inputs(loop, embeddings, time_ids, call, keys)
        state = self._denoise(loop, inputs, state, Steps.of(steps), call.chunk_size, call.callback_on_step_end)
        if call.output_type == "latent":
            return PipelineOutput(self._visible(layout, state.latents))
        return self._pictures(layout, state.latents, call.output_type)

    def _loop(self, call: Call, steps: int) -> Loop:
        """What the programs of a call depend on; raises DistriError for sizes that are no whole rows of the latent."""
        size = (call.height, call.width)
        layout = lay_out(
            self.config, self.mesh, self.unet_config, self.vae_config, size, guided=call.guidance_scale > 1
        )
        return loop_of(self.config, layout, self._unet.form, self.scheduler, self.dtype, steps)

    @property
    def default_size(self) -> Size:
        """Height and width in pixels that the model was trained for."""
        return default_size(self.family, self.unet_config, self.vae_config)

    def _call(self, given: Mapping[str, Any]) -> Call:
        """Of a call's arguments those that all pipelines have; a side that is None is the model's."""
        shared = {field.name: given[field.name] for field in dataclasses.fields(Call) if field.name in given}
        for side, usual in zip(("height", "width"), self.default_size, strict=True):
            shared[side] = usual if given[side] is None else given[side]
        return Call(**shared, branches=self.unet_config.branches)

    def _warn_of_single_branch(self, given: Mapping[str, Any], *others: str) -> None:
        """Tells which of the arguments that a UNet with a single branch of guidance ignores are given. others: their names."""
        names = ("negative_prompt", "negative_prompt_embeds", *others, "guidance_rescale")
        given = {**given, "guidance_rescale": given["guidance_rescale"] or None}
        idle = [name for name in names if given[name] is not None]
        if self.unet_config.branches == 1 and idle:
            warn(
                f"{', '.join(idle)} changes nothing: this UNet is told the guidance scale and runs a single branch; leave it out"
            )

    def _warn_of_idle_options(self, loop: Loop, total: int) -> None:
        """Tells which options of displaced steps are set for a call that has none, and of devices that do others' work again."""
        why, options = f"warmup_steps {self.config.warmup_steps}", ["extrapolate", "compress"]
        if total <= self.config.warmup_steps + 1:
            options.append("sync_steps")
        else:  # it is they that make the others exact
            why += f" and sync_steps {list(self.config.sync_steps)}"
        names = [name for name in options if getattr(self.config, name)]
        displaced = strategy_of(self.config, loop.layout.patches) is not None
        if names and displaced and loop.strategy is None:
            warn(
                f"{', '.join(names)} changes nothing: with {why} all {total} steps are synchronous; use fewer of them, or "
                "leave it out"
            )
        if self.config.parallelism is Parallelism.TENSOR and self.mesh.shape[CFG] > 1 and not loop.layout.guided:
            warn(
                "half of the devices do what the others do: tensor parallelism has no use for the axis cfg without guidance; "
                "give split_batch=False"
            )

    def _inputs(self, loop: Loop, branches: Sequence[Embeddings], time_ids, call: Call, keys: jax.Array) -> Inputs:
        repeats = call.num_images_per_prompt
        images = branches[0].tokens.shape[0] * repeats
        sharding = loop.layout.sharding(denoise.ALL_BRANCHES)

        def joined(*parts):
            return put(np.stack([part.repeat(repeats, 0) for part in parts]), sharding)

        tokens, pooled = jax.tree.map(joined, *branches)
        ids = None
        if time_ids is not None:
            ids = put(np.asarray(time_ids, np.float32)[:, None, :].repeat(images, 1), sharding)
        scales = None
        if self.unet_config.branches == 1:
            scales = put(np.full((1, images), call.guidance_scale, np.float32), sharding)
        static, prompt = (loop.layout, loop.unet), (tokens, pooled, ids, scales)
        conditioning = self.programs(denoise.condition, static, self._unet.params, *prompt)
        weights = np.asarray(denoise.guidance_weights(call.guidance_scale, guided=call.guided), np.float32)
        weights_sharding = loop.layout.sharding(P(CFG) if call.guided else P())
        factor = None
        if call.guided and call.guidance_rescale > 0:
            factor = put(np.float32(call.guidance_rescale), self._everywhere)
        return Inputs(conditioning, put(weights, weights_sharding), factor, keys)

    def _denoise(self, loop: Loop, inputs: Inputs, state, xs: Steps, chunk_size: int | None, callback: Callback | None):
        """All steps: as one program, or in chunks with the host between them.

        With synchronous steps after the warm-up a chunk of the whole loop is a step, so that two programs do for any order.
        """
        total = len(xs.number)
        synchronous = self.config.synchronous(total) if loop.strategy is not None else [True] * total
        at_once = chunk_size is None and callback is None

        def part(start: int, stop: int):
            return put(jax.tree.map(lambda column: column[start:stop], xs), self._everywhere)

        def run(function, *arguments, donate):
            return self.programs(function, loop, self._unet.params, inputs, *arguments, donate=donate)

        if at_once and loop.strategy is None:
            return run(denoise.stateless, state, part(0, total), donate=(1,))
        if at_once and not any(synchronous[(warm := synchronous.index(False)) :]):
            return run(denoise.whole, state, part(0, warm), part(warm, total), donate=(1,))

        stale = None
        settings = self._progress if is_first() else {"disable": True}
        with Progress(total, **settings) as progress:
            for start, stop in _pieces(synchronous, chunk_size or 1):
                piece = part(start, stop)
                if not synchronous[start]:
                    state, stale = run(denoise.displaced, state, stale, piece, donate=(1, 2))
                elif loop.strategy is not None:
                    stale = None  # the memory, before a new one is made
                    state, stale = run(denoise.warm_up, state, piece, donate=(1,))
                else:
                    state = run(denoise.stateless, state, piece, donate=(1,))
                progress.handed_over(stop - start, state.latents)
                if callback is not None:
                    state = self._call_back(
                        loop.layout, callback, stop - 1, float(xs.scheduler.timestep[stop - 1]), state
                    )
        return state

    def _call_back(self, layout: Layout, callback: Callback, step: int, timestep: float, state):
        before = self._visible(layout, state.latents)
        returned = callback(self, step, timestep, {"latents": before})
        if returned is None:
            return state
        if not isinstance(returned, Mapping):
            raise DistriError(f"callback_on_step_end returned {type(returned).__name__}; return a dict, or None")
        if unknown := returned.keys() - {"latents"}:
            raise DistriError(
                f"callback_on_step_end returned {', '.join(sorted(map(str, unknown)))}; it may change the latents alone"
            )
        after = returned.get("latents", before)
        if after is before:
            return state
        latents = host_array(after, "the callback's latents")
        if latents.shape != before.shape:
            raise DistriError(f"the callback's latents are {list(latents.shape)} and {list(before.shape)} is needed")
        return state._replace(latents=_to_canvas(layout, latents))

    def _visible(self, layout: Layout, latents: jax.Array) -> jax.Array:
        """Latents [b, c, h, w] without the canvas's padding; of several processes every one gets all of them."""
        alone = latents.is_fully_addressable
        if latents.shape[1:3] != layout.latent or not alone:
            latents = self.programs(_without_padding, (layout, P(DATA) if alone else P()), (), latents)
        return jnp.moveaxis(latents, -1, 1)

    def _pictures(self, layout: Layout, latents: jax.Array, output_type: str) -> PipelineOutput:
        """Of latents on the devices."""
        height, width = (side * self.vae_config.scale for side in layout.latent)
        pictures = fetch(self.programs(decode, self._decoder(layout), self._vae.params, latents))[:, :height, :width]
        if not np.isfinite(pictures).all():
            raise DistriError(
                f"the picture has values that are not finite in {self.dtype.name}; use another dtype, scheduler or guidance"
            )
        pictures = np.clip(pictures / 2 + 0.5, 0, 1)
        return PipelineOutput(pictures if output_type == "np" else to_pil(pictures))

    def _decoder(self, layout: Layout) -> Decoder:
        return Decoder(layout, self._vae.form, self._vae.dtype)


def lay_out(
    config: DistriConfig, mesh: Mesh | AbstractMesh, unet: UNetConfig, vae: VAEConfig, size: Size, *, guided: bool
) -> Layout:
    """How a picture of `size` pixels lies on a mesh; raises DistriError for sizes that are no whole rows of the latent.

    guided: whether the guidance scale is above 1.
    """
    check_sizes(height=size[0], width=size[1], vae_scale=vae.scale)
    latent = size[0] // vae.scale, size[1] // vae.scale
    return layout_of(config, mesh, unet, guided=guided, latent=latent)


def _bound(call: Callable, arguments: Any) -> dict[str, Any]:
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


def _pieces(synchronous: Sequence[bool], size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of runs of steps of one kind, of at most `size` steps each."""
    start = 0
    for _, alike in itertools.groupby(synchronous):
        end = start + len(list(alike))
        yield from ((first, min(first + size, end)) for first in range(start, end, size))
        start = end


def _image_seeds(seed: int | Sequence[int], images: int) -> np.ndarray:
    """What `denoise.image_keys` takes: for each image a stream of one seed, or the first stream of its own seed."""
    several = isinstance(seed, list | tuple | range) or getattr(seed, "ndim", 0) > 0
    seeds, streams = (list(map(scalar, seed)), [0] * images) if several else ([scalar(seed)] * images, range(images))
    if len(seeds) != images:
        raise DistriError(f"seed has {len(seeds)} entries for {images} images; give one, or one for each image")
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            raise DistriError(f"seed is {value!r}; give a whole number from 0 to 2**63 - 1")
    parts = [(s & 0xFFFFFFFF, s >> 32, stream) for s, stream in zip(seeds, streams, strict=True)]
    return np.array(parts, np.uint32)


def _given_latents(latents: Any, needed: tuple[int, int, int, int]) -> np.ndarray:
    """A caller's starting noise [b, c, h, w]."""
    latents = host_array(latents, "latents")
    if latents.shape != needed:
        raise DistriError(
            f"latents is {list(latents.shape)}; give [images, channels, rows, columns], here {list(needed)}"
        )
    return latents


def _to_canvas(layout: Layout, latents: np.ndarray) -> jax.Array:
    """Latents [b, c, h, w] in this project's layout on the devices; padding, which naive_patch paints, mirrors them."""
    missing = [whole - own for whole, own in zip(layout.canvas, latents.shape[2:], strict=True)]
    padded = np.pad(np.moveaxis(latents, 1, -1), ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)), "symmetric")
    return put(padded, layout.sharding(layout.latents))


def _begin(static, params, seeds, sigma, noise):
    """The images' random keys, and the state before the first step, from a caller's noise or from that of the keys."""
    loop, channels = static
    layout = loop.layout
    keys = denoise.image_keys(seeds)
    if noise is None:
        noise = denoise.draw_latents(layout, channels, keys)
    state = loop.scheduler.init(noise, sigma)
    return jax.lax.with_sharding_constraint((keys, state), (layout.sharding(P(DATA)), layout.sharding(layout.latents)))


def _without_padding(static, params, latents):
    layout, spec = static
    rows, columns = layout.latent
    return jax.lax.with_sharding_constraint(latents[:, :rows, :columns], layout.sharding(spec))
