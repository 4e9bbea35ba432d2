"""What all pipelines share: devices, programs, the starting noise, the loop and decoding; a prompt is a subclass's affair."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from distrijax import interrupts
from distrijax.config import DistriConfig, Parallelism
from distrijax.errors import DistriError, warn
from distrijax.models.families import Family, default_size
from distrijax.parallel.displaced import strategy_of
from distrijax.parallel.layout import Layout, check_images
from distrijax.parallel.mesh import CFG, DATA, pick_devices, plan_mesh
from distrijax.parallel.processes import is_main_process, to_devices, to_host, warm_up_collectives
from distrijax.parallel.programs import MOST, Programs
from distrijax.pipelines.call import (
    Call,
    Callback,
    PipelineOutput,
    Request,
    Size,
    bound_arguments,
    given_latents,
    image_seeds,
    to_pil,
)
from distrijax.pipelines.loading import Components, abstract_components, find_folder, read_components, read_configs
from distrijax.pipelines.progress import Progress
from distrijax.pipelines.prompt import Embeddings, PromptEncoder, Prompts
from distrijax.sampling import denoise
from distrijax.sampling.decode import DecodeSpec, decode
from distrijax.sampling.denoise import CallInputs, LoopSpec, StepInputs, image_layout, loop_of
from distrijax.sampling.noise import draw_latents, image_keys
from distrijax.sampling.shapes import PROMPT_TOKENS, latents_of, prompt_of, step_programs
from distrijax.schedulers import Scheduler
from distrijax.validate import check_choice, host_array, positive
from distrijax.weights.dtypes import resolve_dtype


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
        max_programs: int = MOST,
    ):
        self.mesh, self.config, self.dtype = mesh, config, dtype
        self.scheduler = components.scheduler
        self.unet_config, self.vae_config = components.unet.config, components.vae.config
        platform = mesh.devices.flat[0].platform
        self.programs = Programs(platform, compiler_options, shard_weights=config.shard_weights, most=max_programs)
        self._everywhere = jax.sharding.NamedSharding(mesh, P())
        self._progress: dict[str, Any] = {}
        self._set_components(components)

    def _set_components(self, components: Components) -> None:
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
    @interrupts.not_lost()
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
        max_programs: int = MOST,
    ) -> Self:
        """Reads a folder in the diffusers layout, or a hub id, onto the devices.

        dtype: float32, bfloat16 or float16; None is bfloat16 on accelerators and float32 on CPUs. variant: of the weight
        files, e.g. "fp16". scheduler: a name out of `distrijax.schedulers.SCHEDULERS` instead of the checkpoint's.
        scheduler_options: options instead of the checkpoint's, such as timestep_spacing="trailing". revision, token,
        local_files_only: of the hub.
        compiler_options: XLA's for all programs, before `distrijax.parallel.programs.options_for`. compile_for: the arguments of
        the first call; its programs are compiled while the weights are read. max_programs: how many compiled programs are kept; a
        call runs about 7, and another size needs 5 new ones, for which those not used for longest give way.
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
        warm_up_collectives(mesh)
        components = abstract_components(
            folder,
            configs,
            dtype=dtype,
            mesh=mesh,
            parallelism=config.parallelism,
            shard_weights=config.shard_weights,
        )
        pipe = cls(components, mesh, config, dtype, compiler_options, max_programs)
        try:
            if compile_for is not None:
                pipe._prepare(compile_for)
            pipe._set_components(read_components(components, folder, cls.family, variant=variant, mesh=mesh))
        except BaseException:
            pipe.programs.abandon()
            raise
        return pipe

    def _prepare(self, arguments: Mapping[str, Any]) -> None:
        """Begins to compile what a call with these arguments will run, step by step.

        Not what a `chunk_size` other than 1 changes; those programs compile in the call.
        """
        given = bound_arguments(type(self).__call__, arguments)
        if given["prompt"] is None and given["prompt_embeds"] is None:
            given["prompt"] = ""
        request = self._parse_call(given)
        call, images, unet = request.call, request.images, self.unet_config
        check_images(images, self.mesh.shape[DATA])
        image_seeds(call.seed, images)
        steps, _ = self.scheduler.schedule(call.num_inference_steps)
        loop = self._loop(call, len(steps.timestep))
        text = request.branches[-1]
        tokens = text.tokens.shape[1] if isinstance(text, Embeddings) else PROMPT_TOKENS
        rescale = call.guided and call.guidance_rescale > 0
        for step in step_programs(loop, unet, images, tokens=tokens, rescale=rescale):
            self.programs.prepare(step.function, loop, *step.placed(), donate=step.donate, traced=step.traced)
        self._prompts.prepare(request.branches, clip_skip=call.clip_skip)
        prompt = prompt_of(loop, unet, images, tokens)
        self.programs.prepare(denoise.condition, (loop.layout, loop.unet), self._unet.params, *prompt)
        seeds = jax.ShapeDtypeStruct((images, 3), np.uint32, sharding=loop.layout.sharding(P(DATA)))
        sigma = jax.ShapeDtypeStruct((), np.float32, sharding=self._everywhere)
        latents = latents_of(loop, unet, images)
        noise = None
        if call.latents is not None:
            given_latents(call.latents, (images, unet.in_channels, *loop.layout.latent))
            noise = latents
        self.programs.prepare(_begin, (loop, unet.in_channels), (), seeds, sigma, noise)
        if call.output_type != "latent":
            self.programs.prepare(decode, self._decoder(loop.layout), self._vae.params, latents)

    def _parse_call(self, given: Mapping[str, Any]) -> Request:
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
        layout = image_layout(self.config, self.mesh, self.unet_config, self.vae_config, size, guided=False)
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

    @interrupts.not_lost()
    def _generate(self, request: Request) -> PipelineOutput:
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
        seeds = to_devices(image_seeds(call.seed, images), layout.sharding(P(DATA)))
        channels = self.unet_config.in_channels
        noise = None
        if call.latents is not None:
            noise = _to_canvas(layout, given_latents(call.latents, (images, channels, *layout.latent)))
        embeddings = self._prompts.encode(branches, clip_skip=call.clip_skip)
        sigma = to_devices(np.float32(init_noise_sigma), self._everywhere)
        keys, state = self.programs(_begin, (loop, channels), (), seeds, sigma, noise)
        inputs = self._inputs(loop, embeddings, time_ids, call, keys)
        state = self._denoise(loop, inputs, state, StepInputs.of(steps), call.chunk_size, call.callback_on_step_end)
        if call.output_type == "latent":
            return PipelineOutput(self._gather_latents(layout, state.latents))
        return self._pictures(layout, state.latents, call.output_type)

    def _loop(self, call: Call, steps: int) -> LoopSpec:
        """What the programs of a call depend on; raises DistriError for sizes that are no whole rows of the latent."""
        size = (call.height, call.width)
        layout = image_layout(
            self.config, self.mesh, self.unet_config, self.vae_config, size, guided=call.guidance_scale > 1
        )
        return loop_of(self.config, layout, self._unet.form, self.scheduler, self.dtype, steps)

    @property
    def default_size(self) -> Size:
        """Height and width in pixels that the model was trained for."""
        return default_size(self.family, self.unet_config, self.vae_config)

    def _common_args(self, given: Mapping[str, Any]) -> Call:
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

    def _warn_of_idle_options(self, loop: LoopSpec, total: int) -> None:
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

    def _inputs(
        self, loop: LoopSpec, branches: Sequence[Embeddings], time_ids, call: Call, keys: jax.Array
    ) -> CallInputs:
        repeats = call.num_images_per_prompt
        images = branches[0].tokens.shape[0] * repeats
        sharding = loop.layout.sharding(denoise.ALL_BRANCHES)

        def joined(*parts):
            return to_devices(np.stack([part.repeat(repeats, 0) for part in parts]), sharding)

        tokens, pooled = jax.tree.map(joined, *branches)
        ids = None
        if time_ids is not None:
            ids = to_devices(np.asarray(time_ids, np.float32)[:, None, :].repeat(images, 1), sharding)
        scales = None
        if self.unet_config.branches == 1:
            scales = to_devices(np.full((1, images), call.guidance_scale, np.float32), sharding)
        static, prompt = (loop.layout, loop.unet), (tokens, pooled, ids, scales)
        conditioning = self.programs(denoise.condition, static, self._unet.params, *prompt)
        weights = np.asarray(denoise.guidance_weights(call.guidance_scale, guided=call.guided), np.float32)
        weights_sharding = loop.layout.sharding(P(CFG) if call.guided else P())
        factor = None
        if call.guided and call.guidance_rescale > 0:
            factor = to_devices(np.float32(call.guidance_rescale), self._everywhere)
        return CallInputs(conditioning, to_devices(weights, weights_sharding), factor, keys)

    def _denoise(
        self,
        loop: LoopSpec,
        inputs: CallInputs,
        state,
        xs: StepInputs,
        chunk_size: int | None,
        callback: Callback | None,
    ):
        """All steps: as one program, or in chunks with the host between them.

        With synchronous steps after the warm-up a chunk of the whole loop is a step, so that two programs do for any order.
        """
        total = len(xs.number)
        synchronous = self.config.synchronous(total) if loop.strategy is not None else [True] * total
        at_once = chunk_size is None and callback is None

        def part(start: int, stop: int):
            return to_devices(jax.tree.map(lambda column: column[start:stop], xs), self._everywhere)

        def run(function, *arguments, donate):
            return self.programs(function, loop, self._unet.params, inputs, *arguments, donate=donate)

        if at_once and loop.strategy is None:
            return run(denoise.synchronous_steps, state, part(0, total), donate=(1,))
        if at_once and not any(synchronous[(warm := synchronous.index(False)) :]):
            return run(denoise.whole, state, part(0, warm), part(warm, total), donate=(1,))

        stale = None
        settings = self._progress if is_main_process() else {"disable": True}
        with Progress(total, **settings) as progress:
            for start, stop in _pieces(synchronous, chunk_size or 1):
                piece = part(start, stop)
                if not synchronous[start]:
                    state, stale = run(denoise.displaced, state, stale, piece, donate=(1, 2))
                elif loop.strategy is not None:
                    stale = None  # the memory, before a new one is made
                    state, stale = run(denoise.warm_up, state, piece, donate=(1,))
                else:
                    state = run(denoise.synchronous_steps, state, piece, donate=(1,))
                progress.handed_over(stop - start, state.latents)
                if callback is not None:
                    state = self._run_callback(
                        loop.layout, callback, stop - 1, float(xs.scheduler.timestep[stop - 1]), state
                    )
        return state

    def _run_callback(self, layout: Layout, callback: Callback, step: int, timestep: float, state):
        before = self._gather_latents(layout, state.latents)
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

    def _gather_latents(self, layout: Layout, latents: jax.Array) -> jax.Array:
        """Latents [b, c, h, w] without the canvas's padding; of several processes every one gets all of them."""
        alone = latents.is_fully_addressable
        if latents.shape[1:3] != layout.latent or not alone:
            latents = self.programs(_without_padding, (layout, P(DATA) if alone else P()), (), latents)
        return jnp.moveaxis(latents, -1, 1)

    def _pictures(self, layout: Layout, latents: jax.Array, output_type: str) -> PipelineOutput:
        """Of latents on the devices."""
        height, width = (side * self.vae_config.scale for side in layout.latent)
        pictures = to_host(self.programs(decode, self._decoder(layout), self._vae.params, latents))[:, :height, :width]
        if not np.isfinite(pictures).all():
            raise DistriError(
                f"the picture has values that are not finite in {self.dtype.name}; use another dtype, scheduler or guidance"
            )
        pictures = np.clip(pictures / 2 + 0.5, 0, 1)
        return PipelineOutput(pictures if output_type == "np" else to_pil(pictures))

    def _decoder(self, layout: Layout) -> DecodeSpec:
        return DecodeSpec(layout, self._vae.form, self._vae.dtype)


def _pieces(synchronous: Sequence[bool], size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of runs of steps of one kind, of at most `size` steps each."""
    start = 0
    for _, alike in itertools.groupby(synchronous):
        end = start + len(list(alike))
        yield from ((first, min(first + size, end)) for first in range(start, end, size))
        start = end


def _to_canvas(layout: Layout, latents: np.ndarray) -> jax.Array:
    """Latents [b, c, h, w] in this project's layout on the devices; padding, which naive_patch paints, mirrors them."""
    missing = [whole - own for whole, own in zip(layout.padded_shape, latents.shape[2:], strict=True)]
    padded = np.pad(np.moveaxis(latents, 1, -1), ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)), "symmetric")
    return to_devices(padded, layout.sharding(layout.latents))


def _begin(static, params, seeds, sigma, noise):
    """The images' random keys, and the state before the first step, from a caller's noise or from that of the keys."""
    loop, channels = static
    layout = loop.layout
    keys = image_keys(seeds)
    if noise is None:
        noise = draw_latents(layout, channels, keys)
    state = loop.scheduler.init(noise, sigma)
    return jax.lax.with_sharding_constraint((keys, state), (layout.sharding(P(DATA)), layout.sharding(layout.latents)))


def _without_padding(static, params, latents):
    layout, spec = static
    rows, columns = layout.latent
    return jax.lax.with_sharding_constraint(latents[:, :rows, :columns], layout.sharding(spec))
