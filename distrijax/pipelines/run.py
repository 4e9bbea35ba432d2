"""Running a call: the conditioning, where it begins, the loop in chunks, and decoding. Each program is a stage."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from distrijax import interrupts
from distrijax.config import DistriConfig, Parallelism
from distrijax.errors import InvalidArgument, NotFinite, warn
from distrijax.models.families import Family, default_size
from distrijax.parallel.displaced import strategy_of
from distrijax.parallel.layout import Layout, check_images
from distrijax.parallel.mesh import CFG, DATA
from distrijax.parallel.processes import check_agreement, is_main_process, to_host
from distrijax.parallel.programs import MAX_PROGRAMS, Programs, Stage, check_eager
from distrijax.parallel.stages import On, OnDevices
from distrijax.pipelines.call import Call, PipelineOutput, Request, Size, given_latents, image_seeds, to_pil
from distrijax.pipelines.loading import Components
from distrijax.pipelines.progress import NO_MESH, Progress
from distrijax.pipelines.prompt import Embeddings, PromptEncoder
from distrijax.sampling.begin import put_latents, run_begin
from distrijax.sampling.condition import PromptInputs, run_condition
from distrijax.sampling.decode import DECODE, DecodeSpec
from distrijax.sampling.denoise import CallInputs, LoopSpec, StepsSpec, call_inputs, run_steps
from distrijax.sampling.large import deep_sizes, is_large, read_large
from distrijax.sampling.layouts import image_layout
from distrijax.sampling.steps import StepInputs, StepPlan, plan_steps
from distrijax.schedulers import Scheduler, State, with_class
from distrijax.validate import host_array
from distrijax.weights.models import UNET, Models

FIXED = ("config", "dtype", "mesh", "programs", "unet_config", "vae_config")
"""Attributes of a pipeline that its programs depend on."""

FIXED_CONFIG = ("devices", "data", "cfg", "patch", "split_batch", "parallelism", "shard_weights")
"""Fields of a config that decide the mesh, and where the weights are."""


class Planned(NamedTuple):
    """What a call will do, before anything is compiled or computed.

    Attributes:
        loop: What all steps depend on.
        plan: The kinds of steps.
        steps: The scheduler's constants of the steps to make.
        sigma: The standard deviation of the noise that a call without an image begins with.
        seeds: Of the images.
        latents: A caller's noise, on the host; None for that of the seeds.
    """

    loop: LoopSpec
    plan: StepPlan
    steps: Any
    sigma: float
    seeds: np.ndarray
    latents: np.ndarray | None


After = Callable[[int, int, State], State]
"""What the host does after steps from `start` to before `stop`: returns the state to go on with."""


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
        self._warned_of_size = False
        self._set_components(components)

    def _set_components(self, components: Components) -> None:
        self._prompts = PromptEncoder(
            components.tokenizers,
            components.text_encoders,
            pooled=self.family.pooled,
            zeros_for_empty=self.family.pooled and bool(components.index.get("force_zeros_for_empty_prompt", True)),
            everywhere=self._everywhere,
        )
        self._unet, self._vae = components.unet, components.vae
        self._models = Models.of(**{UNET: components.unet.form})

    @property
    def _params(self) -> dict[str, Any]:
        """The parameters of `_models`."""
        return {UNET: self._unet.params}

    @property
    def default_size(self) -> Size:
        """The height and width in pixels that the model was trained for."""
        return default_size(self.family, self.unet_config, self.vae_config)

    @interrupts.not_lost()
    def _generate(self, request: Request) -> PipelineOutput:
        """Returns the images of a call; everything is checked before anything is compiled."""
        check_eager()
        planned, call = self._plan(request), request.call
        result = self._run(OnDevices(self.programs), request, planned, self._watched)
        if call.output_type == "latent":
            return PipelineOutput(_channels_first(result))
        return self._images(planned.loop.layout, result, call.output_type)

    def _plan(self, request: Request) -> Planned:
        """Checks what a call asks for against what this pipeline has."""
        call, begin = request.call, request.begin
        scheduler = self._scheduler_of(call)
        steps, sigma = scheduler.schedule(call.num_inference_steps, begin.start)
        layout = image_layout(
            self.config,
            self.mesh,
            self.unet_config,
            self.vae_config,
            request.size,
            guided=call.guidance_scale > 1,
        )
        loop = LoopSpec(layout, self._models, scheduler, self.dtype, type(request.after_update))
        sizes = self._deep_sizes(call, layout, steps.timestep)
        plan = plan_steps(self.config, layout, len(steps.timestep), sizes, request.predictor)
        self._warn_of_idle_options(layout, plan)
        check_images(request.images, self.mesh.shape[DATA])
        self._check_agreement(request, scheduler)
        latents = call.latents
        if latents is not None:
            latents = given_latents(latents, (request.images, self.vae_config.latent_channels, *layout.latent))
        return Planned(loop, plan, steps, sigma, image_seeds(call.seed, request.images), latents)

    def _deep_sizes(self, call: Call, layout: Layout, timesteps: Sequence[float]) -> list[tuple[int, int] | None]:
        """The size of the deep part at each step, as the call's `large` asks; warns of large images without it."""
        trained = tuple(side // self.vae_config.scale for side in self.default_size)
        if call.large == "off" and not self._warned_of_size and is_large(layout.latent, trained):
            self._warned_of_size = True
            height, width = self.default_size
            warn(
                f"the image has {math.prod(layout.latent) / math.prod(trained):.1f} times the pixels that the model was "
                f"trained for ({height}x{width}), and is likely to repeat objects; give large='auto'"
            )
        shrinking = read_large(call.large, layout, trained)
        return deep_sizes(shrinking, timesteps)

    def _run(
        self,
        on: On,
        request: Request,
        planned: Planned,
        watched: Callable[..., contextlib.AbstractContextManager[After]],
    ) -> jax.Array:
        """Runs a call, on devices or dry.

        Args:
            on: Where the call runs.
            request: The call.
            planned: What it will do.
            watched: The context in which the loop runs; gives what the host does after each chunk.

        Returns:
            Latents [b, h, w, c] without padding, or pixels with it.
        """
        call, (loop, plan, steps, sigma, seeds, latents) = request.call, planned
        layout, begin = loop.layout, request.begin
        embeddings = self._prompts.encode(on, request.branches, clip_skip=call.clip_skip)
        channels = self.vae_config.latent_channels
        keys, state = run_begin(on, layout, loop.scheduler, channels, begin, seeds, latents, steps, sigma)
        prompt = self._prompt_inputs(request, embeddings)
        conditioning = run_condition(on, layout, loop.models, self._params, prompt)
        arrays = request.after_update.arrays(on, layout, begin, steps)
        inputs = call_inputs(on, layout, conditioning, keys, call.guidance_scale, call.guidance_rescale, arrays)
        xs = StepInputs.of(steps, begin.start, begin.stream)
        with watched(on, layout, call, xs) as after:
            state = self._denoise(on, loop, plan, inputs, state, xs, call, after)
        if call.output_type == "latent":
            return self._crop(on, layout, state.latents)
        return on.run(DECODE, self._decoder(layout), self._vae.params, state.latents)

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
            names = [field.name for field in dataclasses.fields(call) if field.name not in call.ARRAYS]
            return {name: repr(getattr(call, name)) for name in names} | {
                "prompt": request.branches,
                "latents": () if call.latents is None else host_array(call.latents, "latents"),
                "begin": (type(request.begin).__name__, request.begin.facts()),
                "after_update": (type(request.after_update).__name__, request.after_update.facts()),
                "height": request.size[0],
                "width": request.size[1],
                "callback_on_step_end": call.callback_on_step_end is None,
                "sizes": request.time_ids,
                "config": self.config,
                "scheduler": scheduler,
            }

        check_agreement(self.mesh.devices.flat, facts)

    def _warn_of_idle_options(self, layout: Layout, plan: StepPlan) -> None:
        """Warns of options for displaced steps where all steps are synchronous, and of devices that repeat others' work."""
        total = len(plan.kinds)
        why, options = f"warmup_steps {self.config.warmup_steps}", ["extrapolate", "compress"]
        if total <= self.config.warmup_steps + 1:
            options.append("sync_steps")
        else:  # sync_steps make the other steps synchronous
            why += f" and sync_steps {list(self.config.sync_steps)}"
        names = [name for name in options if getattr(self.config, name)]
        displaced = strategy_of(self.config, layout.patches) is not None
        if names and displaced and not plan.displaced:
            warn(
                f"{', '.join(names)} has no effect: with {why} all {total} steps are synchronous; use fewer of them, or "
                "remove it"
            )
        if self.config.parallelism is Parallelism.TENSOR and self.mesh.shape[CFG] > 1 and not layout.guided:
            warn(
                "half of the devices repeat the others' work: tensor parallelism does not use the axis cfg without guidance; "
                "give split_batch=False"
            )

    def _prompt_inputs(self, request: Request, embeddings: Sequence[Embeddings]) -> PromptInputs:
        """What the call says to the models, repeated for the images of each prompt."""
        repeats, images = request.call.num_images_per_prompt, request.images

        def joined(*parts):
            return np.stack([part.repeat(repeats, 0) for part in parts])

        tokens, pooled = jax.tree.map(joined, *embeddings)
        ids = scales = None
        if request.time_ids is not None:
            ids = np.asarray(request.time_ids, np.float32)[:, None, :].repeat(images, 1)
        if self.unet_config.branches == 1:
            scales = np.full((1, images), request.call.guidance_scale, np.float32)
        return PromptInputs(tokens, pooled, ids, scales)

    def _denoise(
        self,
        on: On,
        loop: LoopSpec,
        plan: StepPlan,
        inputs: CallInputs,
        state: State,
        xs: StepInputs,
        call: Call,
        after: After,
    ) -> State:
        """Runs all steps, as one program or in chunks with the host between them.

        Where the kinds of steps alternate, the loop without chunks runs step by step: few programs then serve any order.
        """

        def run(spec, state, stale, *pieces):
            return run_steps(on, spec, self._params, inputs, state, stale, pieces)

        total, stale = len(plan.kinds), {}
        if call.chunk_size is None and call.callback_on_step_end is None:
            runs = list(plan.pieces(total))
            if len(runs) == len(plan.rules):
                rules = tuple(plan.rules[plan.kinds[start]] for start, _ in runs)
                return run(StepsSpec(loop, rules, keep=False), state, stale, *(xs.part(*each) for each in runs))[0]
        for start, stop in plan.pieces(call.chunk_size or 1):
            rule = plan.rules[plan.kinds[start]]
            # what is not read is freed before more is made
            stale = stale if rule.reads else {}
            state, stale = run(StepsSpec(loop, (rule,)), state, stale, xs.part(start, stop))
            state = after(start, stop, state)
        return state

    @contextlib.contextmanager
    def _watched(self, on: On, layout: Layout, call: Call, xs: StepInputs) -> Iterator[After]:
        """Shows progress and calls the callback."""
        settings = self._progress if is_main_process() else {"disable": True}
        callback, total = call.callback_on_step_end, len(xs.number)
        with contextlib.ExitStack() as stack:
            shown: list[Progress] = []

            def progress() -> Progress:
                if not shown:
                    shown.append(stack.enter_context(Progress(total, **settings)))
                return shown[0]

            def after(start: int, stop: int, state: State) -> State:
                progress().dispatched(stop - start, state.latents)
                if callback is None:
                    return state
                return self._run_callback(on, layout, call, stop - 1, float(xs.scheduler.timestep[stop - 1]), state)

            if (
                call.chunk_size is not None or callback is not None
            ):  # otherwise the loop may be one program, without progress
                progress()
            yield after

    def _run_callback(self, on: On, layout: Layout, call: Call, step: int, timestep: float, state: State) -> State:
        """Hands the latents to the callback, and returns the state to go on with."""
        before = _channels_first(self._crop(on, layout, state.latents))
        returned = call.callback_on_step_end(self, step, timestep, {"latents": before})
        if returned is None:
            return state
        if not isinstance(returned, Mapping):
            raise InvalidArgument(f"callback_on_step_end returned {type(returned).__name__}; return a dict, or None")
        if unknown := returned.keys() - {"latents"}:
            raise InvalidArgument(
                f"callback_on_step_end returned {', '.join(sorted(map(str, unknown)))}; it may change only the latents"
            )
        changed = returned.get("latents", before)
        if changed is before:
            return state
        latents = host_array(changed, "the callback's latents")
        if latents.shape != before.shape:
            raise InvalidArgument(
                f"the callback's latents are {list(latents.shape)} and {list(before.shape)} is needed"
            )
        return state._replace(latents=put_latents(on, layout, latents))

    def _crop(self, on: On, layout: Layout, latents: jax.Array) -> jax.Array:
        """Latents [b, h, w, c] without padding; with several processes, each gets all of them."""
        alone = latents.sharding.is_fully_addressable
        if latents.shape[1:3] == layout.latent and alone:
            return latents
        return on.run(CROP, (layout, P(DATA) if alone else P()), (), latents)

    def _images(self, layout: Layout, pixels: jax.Array, output_type: str) -> PipelineOutput:
        """Images of decoded pixels that are on the devices."""
        height, width = (side * self.vae_config.scale for side in layout.latent)
        pixels = to_host(pixels)[:, :height, :width]
        if not np.isfinite(pixels).all():
            raise NotFinite(
                f"the decoded image contains NaN or Inf in {self.dtype.name}; use another dtype, scheduler or guidance scale"
            )
        pixels = np.clip(pixels / 2 + 0.5, 0, 1)
        return PipelineOutput(pixels if output_type == "np" else to_pil(pixels))

    def _decoder(self, layout: Layout) -> DecodeSpec:
        return DecodeSpec(layout, self._vae.form, self._vae.dtype)


def _channels_first(latents: Float[Array, "b h w c"]) -> Float[Array, "b c h w"]:
    with jax.set_mesh(NO_MESH):  # the caller may have set a mesh of other devices
        return jnp.moveaxis(latents, -1, 1)


def crop_latents(
    static: tuple[Layout, P], params: tuple[()], latents: Float[Array, "b H W c"]
) -> Float[Array, "b h w c"]:
    """Latents without padding.

    Args:
        static: The layout of the call, and the sharding of the result.
        params: None.
        latents: With padding.
    """
    layout, spec = static
    rows, columns = layout.latent
    return jax.lax.with_sharding_constraint(latents[:, :rows, :columns], layout.sharding(spec))


CROP = Stage(crop_latents)
