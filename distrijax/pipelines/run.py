"""Running a call on the devices: the starting noise, the conditioning, the loop in chunks, and decoding."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from distrijax import interrupts
from distrijax.config import DistriConfig, Parallelism
from distrijax.errors import InvalidArgument, NotFinite, warn
from distrijax.models.families import Family
from distrijax.parallel.displaced import strategy_of
from distrijax.parallel.layout import Layout, check_images
from distrijax.parallel.mesh import CFG, DATA
from distrijax.parallel.processes import check_agreement, is_main_process, to_devices, to_host
from distrijax.parallel.programs import MAX_PROGRAMS, Programs, check_eager
from distrijax.pipelines.call import (
    Call,
    Callback,
    PipelineOutput,
    Request,
    given_latents,
    image_seeds,
    to_pil,
)
from distrijax.pipelines.loading import Components
from distrijax.pipelines.progress import Progress
from distrijax.pipelines.prompt import Embeddings, PromptEncoder
from distrijax.sampling import denoise
from distrijax.sampling.decode import DecodeSpec, decode
from distrijax.sampling.denoise import CallInputs, LoopSpec, StepInputs, image_layout, loop_of
from distrijax.sampling.noise import draw_latents, image_keys
from distrijax.schedulers import Scheduler, with_class
from distrijax.validate import host_array

FIXED = ("config", "dtype", "mesh", "programs", "unet_config", "vae_config")
"""Attributes of a pipeline that its programs depend on."""

FIXED_CONFIG = ("devices", "data", "cfg", "patch", "split_batch", "parallelism", "shard_weights")
"""Fields of a config that decide the mesh, and where the weights are."""


class Runner:
    """What a pipeline has on the devices, and how it runs a call there; `distrijax.pipelines.build` adds how it is made."""

    family: ClassVar[Family]

    def __init__(
        self,
        components: Components,
        mesh: jax.sharding.Mesh,
        config: DistriConfig,
        dtype: jnp.dtype,
        compiler_options: Mapping[str, Any] | None = None,
        max_programs: int = MAX_PROGRAMS,
    ):
        self.mesh, self.config, self.dtype = mesh, config, dtype
        self.scheduler = components.scheduler
        self.unet_config, self.vae_config = components.unet.config, components.vae.config
        platform = mesh.devices.flat[0].platform
        self.programs = Programs(
            platform, compiler_options, shard_weights=config.shard_weights, max_programs=max_programs
        )
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

    @interrupts.not_lost()
    def _generate(self, request: Request) -> PipelineOutput:
        """Returns the images of a call; everything is checked before anything is compiled."""
        check_eager()
        call, branches, time_ids = request
        scheduler = self._scheduler_of(call)
        steps, init_noise_sigma = scheduler.schedule(call.num_inference_steps)
        loop = self._loop(call, scheduler, len(steps.timestep))
        self._warn_of_idle_options(loop, len(steps.timestep))
        layout = loop.layout
        images = request.images
        check_images(images, self.mesh.shape[DATA])
        self._check_agreement(request, scheduler)
        seeds = to_devices(image_seeds(call.seed, images), layout.sharding(P(DATA)))
        channels = self.unet_config.in_channels
        noise = None
        if call.latents is not None:
            noise = pad_latents(layout, given_latents(call.latents, (images, channels, *layout.latent)))
        embeddings = self._prompts.encode(branches, clip_skip=call.clip_skip)
        sigma = to_devices(np.float32(init_noise_sigma), self._everywhere)
        keys, state = self.programs(initial_state, (loop, channels), (), seeds, sigma, noise)
        inputs = self._inputs(loop, embeddings, time_ids, call, keys)
        state = self._denoise(loop, inputs, state, StepInputs.of(steps), call.chunk_size, call.callback_on_step_end)
        if call.output_type == "latent":
            return PipelineOutput(self._gather_latents(layout, state.latents))
        return self._decode_images(layout, state.latents, call.output_type)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIXED and hasattr(self, name):
            self._check_change(name, value)
        super().__setattr__(name, value)

    def _check_change(self, name: str, value: Any) -> None:
        """Refuses to replace what the programs and the placement of the weights depend on."""
        if name != "config":
            raise InvalidArgument(f"{name} of a pipeline is fixed when it is loaded; load another pipeline")
        if not isinstance(value, DistriConfig):
            raise InvalidArgument(f"config is {value!r:.60}; give a DistriConfig")
        changed = [field for field in FIXED_CONFIG if getattr(value, field) != getattr(self.config, field)]
        if changed:
            raise InvalidArgument(
                f"{', '.join(changed)} of the new config {'differs' if len(changed) == 1 else 'differ'} from what this "
                "pipeline was loaded with; load another pipeline with that config"
            )

    def _scheduler_of(self, call: Call) -> Scheduler:
        """Returns the scheduler of a call: the call's own, or the pipeline's."""
        if isinstance(call.scheduler, Scheduler):
            return call.scheduler
        if not isinstance(self.scheduler, Scheduler):
            raise InvalidArgument(
                f"the pipeline's scheduler is {self.scheduler!r:.60}; give one of distrijax.schedulers, such as "
                'with_class(pipeline.scheduler, "euler")'
            )
        return self.scheduler if call.scheduler is None else with_class(self.scheduler, call.scheduler)

    def _check_agreement(self, request: Request, scheduler: Scheduler) -> None:
        """Checks that all processes make the same call, with the scheduler of `_scheduler_of`."""
        call = request.call

        def facts() -> dict[str, Any]:
            return {field.name: repr(getattr(call, field.name)) for field in dataclasses.fields(call)} | {
                "prompt": request.branches,
                "latents": () if call.latents is None else host_array(call.latents, "latents"),
                "callback_on_step_end": call.callback_on_step_end is None,
                "sizes": request.time_ids,
                "config": self.config,
                "scheduler": scheduler,
            }

        check_agreement(self.mesh.devices.flat, facts)

    def _loop(self, call: Call, scheduler: Scheduler, steps: int) -> LoopSpec:
        """Returns what a call's programs depend on; raises InvalidArgument for sizes that the VAE does not divide."""
        size = (call.height, call.width)
        layout = image_layout(
            self.config, self.mesh, self.unet_config, self.vae_config, size, guided=call.guidance_scale > 1
        )
        return loop_of(self.config, layout, self._unet.form, scheduler, self.dtype, steps)

    def _warn_of_idle_options(self, loop: LoopSpec, total: int) -> None:
        """Warns of options for displaced steps where all steps are synchronous, and of devices that repeat others' work."""
        why, options = f"warmup_steps {self.config.warmup_steps}", ["extrapolate", "compress"]
        if total <= self.config.warmup_steps + 1:
            options.append("sync_steps")
        else:  # sync_steps make the other steps synchronous
            why += f" and sync_steps {list(self.config.sync_steps)}"
        names = [name for name in options if getattr(self.config, name)]
        displaced = strategy_of(self.config, loop.layout.patches) is not None
        if names and displaced and loop.strategy is None:
            warn(
                f"{', '.join(names)} has no effect: with {why} all {total} steps are synchronous; use fewer of them, or "
                "remove it"
            )
        if self.config.parallelism is Parallelism.TENSOR and self.mesh.shape[CFG] > 1 and not loop.layout.guided:
            warn(
                "half of the devices repeat the others' work: tensor parallelism does not use the axis cfg without guidance; "
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
        """Runs all steps, as one program or in chunks with the host between them.

        Where `sync_steps` interrupt the displaced steps, the loop without chunks runs step by step: two programs then serve any
        order.
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
                progress.dispatched(stop - start, state.latents)
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
            raise InvalidArgument(f"callback_on_step_end returned {type(returned).__name__}; return a dict, or None")
        if unknown := returned.keys() - {"latents"}:
            raise InvalidArgument(
                f"callback_on_step_end returned {', '.join(sorted(map(str, unknown)))}; it may change only the latents"
            )
        after = returned.get("latents", before)
        if after is before:
            return state
        latents = host_array(after, "the callback's latents")
        if latents.shape != before.shape:
            raise InvalidArgument(
                f"the callback's latents are {list(latents.shape)} and {list(before.shape)} is needed"
            )
        return state._replace(latents=pad_latents(layout, latents))

    def _gather_latents(self, layout: Layout, latents: jax.Array) -> jax.Array:
        """Returns latents [b, c, h, w] without padding; with several processes, each gets all of them."""
        alone = latents.is_fully_addressable
        if latents.shape[1:3] != layout.latent or not alone:
            latents = self.programs(_crop_latents, (layout, P(DATA) if alone else P()), (), latents)
        return jnp.moveaxis(latents, -1, 1)

    def _decode_images(self, layout: Layout, latents: jax.Array, output_type: str) -> PipelineOutput:
        """Decodes latents that are on the devices."""
        height, width = (side * self.vae_config.scale for side in layout.latent)
        pixels = to_host(self.programs(decode, self._decoder(layout), self._vae.params, latents))[:, :height, :width]
        if not np.isfinite(pixels).all():
            raise NotFinite(
                f"the decoded image contains NaN or Inf in {self.dtype.name}; use another dtype, scheduler or guidance scale"
            )
        pixels = np.clip(pixels / 2 + 0.5, 0, 1)
        return PipelineOutput(pixels if output_type == "np" else to_pil(pixels))

    def _decoder(self, layout: Layout) -> DecodeSpec:
        return DecodeSpec(layout, self._vae.form, self._vae.dtype)


def _pieces(synchronous: Sequence[bool], size: int) -> Iterator[tuple[int, int]]:
    """Yields start and stop of runs of steps of one kind, at most `size` steps each."""
    start = 0
    for _, alike in itertools.groupby(synchronous):
        end = start + len(list(alike))
        yield from ((first, min(first + size, end)) for first in range(start, end, size))
        start = end


def pad_latents(layout: Layout, latents: np.ndarray) -> jax.Array:
    """Puts latents [b, c, h, w] on the devices as [b, h, w, c]; padding mirrors them, since naive_patch generates it too.

    Args:
        layout: Layout of the call.
        latents: [b, c, h, w], on the host.
    """
    missing = [whole - own for whole, own in zip(layout.padded_shape, latents.shape[2:], strict=True)]
    padded = np.pad(np.moveaxis(latents, 1, -1), ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)), "symmetric")
    return to_devices(padded, layout.sharding(layout.latents))


def initial_state(static, params, seeds, sigma, noise, begin=None):
    """Returns the images' random keys, and the state before the first step, from the caller's noise or the keys' noise.

    `begin`: None for a call that begins with noise alone, scaled by `sigma`; otherwise the latents of the images that the noise
    is added to, and the constants of the first step.
    """
    loop, channels = static
    layout = loop.layout
    keys = image_keys(seeds)
    if noise is None:
        noise = draw_latents(layout, channels, keys)
    if begin is None:
        state = loop.scheduler.init(noise, sigma)
    else:
        image, step = begin
        state = loop.scheduler.init(loop.scheduler.add_noise(image, noise, step))
    return jax.lax.with_sharding_constraint((keys, state), (layout.sharding(P(DATA)), layout.sharding(layout.latents)))


def _crop_latents(static, params, latents):
    layout, spec = static
    rows, columns = layout.latent
    return jax.lax.with_sharding_constraint(latents[:, :rows, :columns], layout.sharding(spec))
