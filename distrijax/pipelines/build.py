"""Pipelines from checkpoints: devices, mesh and programs, and what all families' calls have in common."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

from distrijax import interrupts
from distrijax.config import DistriConfig
from distrijax.errors import InvalidArgument, warn
from distrijax.parallel.layout import Layout, check_images
from distrijax.parallel.mesh import DATA, devices_of, plan_mesh
from distrijax.parallel.processes import check_agreement, versions, warm_up_collectives
from distrijax.parallel.programs import MAX_PROGRAMS
from distrijax.parallel.stages import Dry, On, OnDevices
from distrijax.pipelines.call import Call, PipelineOutput, Request, Size
from distrijax.pipelines.loading import abstract_components, check_arguments, opened, read_components, read_configs
from distrijax.pipelines.prompt import Embeddings, Prompts
from distrijax.pipelines.run import After, Runner
from distrijax.sampling.begin import put_latents
from distrijax.sampling.decode import DECODE
from distrijax.sampling.layouts import image_layout
from distrijax.sampling.steps import StepInputs
from distrijax.schedulers import State
from distrijax.validate import check_choice, host_array, positive
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.dtypes import resolve_dtype
from distrijax.weights.recipe import Additions


class Pipeline(Runner):
    """All of a pipeline but its conditioning.

    A subclass names its family and the class of its calls' arguments, and reads them (`_read`).
    """

    call_type: ClassVar[type[Call]] = Call

    @classmethod
    @interrupts.not_lost()
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | Checkpoint,
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
        max_programs: int = MAX_PROGRAMS,
        **additions: Unpack[Additions],
    ) -> Self:
        """Loads a checkpoint onto the devices, tensor by tensor and without a copy on disk.

        Args:
            pretrained_model_name_or_path: A folder in the diffusers layout, a model id on the Hugging Face hub, or a single
                file in the original layout, local or on the hub; or a checkpoint that `open_checkpoint` returned.
            distri_config: How images are spread over devices; None uses all devices with the defaults.
            dtype: float32, bfloat16 or float16; None is bfloat16 on accelerators and float32 on CPUs.
            variant: The variant of the weight files, such as "fp16".
            scheduler: A name from `distrijax.schedulers.SCHEDULERS` that replaces the checkpoint's class.
            scheduler_options: Options that replace the checkpoint's, such as `{"timestep_spacing": "trailing"}`.
            revision: The hub's branch, tag or commit.
            token: The hub's access token.
            local_files_only: Whether only what is cached from the hub is used.
            compiler_options: XLA's options for all programs; they take precedence over `programs.options_for`.
            compile_for: The arguments of the first call, whose programs are then compiled while the weights are read.
            max_programs: How many compiled programs are kept. A call runs about 7, and another image size needs 5 new ones;
                the least recently used are evicted.
            **additions: `config`, `ema`, `prediction_type`, `unet`, `vae`, `loras`, `embeddings`: how a single file is read,
                and what goes on top of the checkpoint (`distrijax.weights.recipe.Additions`).

        Raises:
            CheckpointError: For a checkpoint that is incomplete or of another family, and what does not fit on top of it.
            InvalidArgument: For other arguments that cannot be used, such as more devices than JAX shows.
        """
        check_arguments(additions, cls.from_pretrained)
        config = DistriConfig() if distri_config is None else distri_config
        if not isinstance(config, DistriConfig):
            raise InvalidArgument(
                f"distri_config is {config!r:.60}; give a DistriConfig, such as DistriConfig(devices=8)"
            )
        devices = devices_of(config)
        dtype = resolve_dtype(dtype, devices[0].platform)
        checkpoint = opened(
            pretrained_model_name_or_path,
            variant=variant,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            **additions,
        )
        configs = read_configs(checkpoint, scheduler, scheduler_options, needed=cls.family)
        model = (configs.family.name, configs.unet, configs.vae, configs.text_encoders)
        facts = {"config": config, "model": repr(model), "dtype": dtype.name}
        check_agreement(devices, lambda: {**versions(), **facts, **checkpoint.recipe.facts})
        mesh = plan_mesh(config, len(devices), branches=configs.unet.branches).build(devices)
        warm_up_collectives(mesh)
        components = abstract_components(
            checkpoint,
            configs,
            dtype=dtype,
            mesh=mesh,
            parallelism=config.parallelism,
            shard_weights=config.shard_weights,
        )
        pipe = cls(components, mesh, config, dtype, compiler_options, max_programs)
        try:
            if compile_for is not None:
                pipe._prepare_first(compile_for)
            pipe._set_components(read_components(components, checkpoint, cls.family, mesh))
        except BaseException:
            pipe.programs.cancel_pending()
            raise
        return pipe

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | Path, distri_config: DistriConfig | None = None, **arguments: Any
    ) -> Self:
        """`from_pretrained` by the name that it has in diffusers for single files; `config` is a folder as there."""
        return cls.from_pretrained(pretrained_model_link_or_path, distri_config, **arguments)

    def prepare(self, *prompts: Any, **arguments: Any) -> None:
        """Starts to compile, in the background, the programs of a call with these arguments; nothing is computed.

        It is the call run dry: a call with the same arguments, whatever its prompts say and its seeds are, compiles
        nothing more.

        Args:
            *prompts: As in a call; may be left out.
            **arguments: As in a call.

        Raises:
            InvalidArgument: As the call.
        """
        call = self.call_type.of(*prompts, **arguments)
        if call.prompt is None and call.prompt_embeds is None:
            call = dataclasses.replace(call, prompt="")
        request = self._read(call)
        self._run(Dry(self.programs), request, self._plan(request), self._unwatched)

    def _prepare_first(self, compile_for: Mapping[str, Any]) -> None:
        """`prepare`, of arguments in a mapping."""
        if not isinstance(compile_for, Mapping) or not all(isinstance(name, str) for name in compile_for):
            raise InvalidArgument(
                f"compile_for is {compile_for!r:.60}; give a dict of arguments of the pipeline's call"
            )
        try:
            self.prepare(**compile_for)
        except InvalidArgument as error:
            raise InvalidArgument(f"compile_for: {error}") from None

    @contextlib.contextmanager
    def _unwatched(self, on: On, layout: Layout, call: Call, xs: StepInputs) -> Iterator[After]:
        """In the place of `_watched`, for a dry call."""

        def after(start: int, stop: int, state: State) -> State:
            if call.callback_on_step_end is not None:
                self._crop(on, layout, state.latents)
            return state

        yield after

    def _read(self, call: Call) -> Request:
        """Checks the arguments of a call against the models; raises DistriError for those that cannot be used."""
        raise NotImplementedError

    def decode(self, latents: Any, *, output_type: str = "pil") -> PipelineOutput:
        """Decodes latents to images.

        Args:
            latents: [b, c, h, w], as a call with `output_type="latent"` returns them.
            output_type: "pil", or "np" for float32 [b, h, w, 3] in 0 to 1.

        Raises:
            InvalidArgument: For latents of another shape or with values that are not finite.
        """
        check_choice(output_type, ("pil", "np"), "output_type")
        latents, channels = host_array(latents, "latents"), self.vae_config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels or not latents.size:
            raise InvalidArgument(f"latents is {list(latents.shape)}; give [images, {channels}, rows, columns]")
        check_images(len(latents), self.mesh.shape[DATA])
        size = tuple(side * self.vae_config.scale for side in latents.shape[2:])
        layout = image_layout(self.config, self.mesh, self.unet_config, self.vae_config, size, guided=False)
        on = OnDevices(self.programs)
        pixels = on.run(DECODE, self._decoder(layout), self._vae.params, put_latents(on, layout, latents))
        return self._images(layout, pixels, output_type)

    def _encode(
        self, prompts: Prompts, negative_prompts: Prompts, clip_skip: int | None
    ) -> tuple[Embeddings, Embeddings]:
        """Returns the embeddings of prompts and of negative prompts."""
        branches = self._prompts.read(prompts, negative_prompts, None, None, guided=True)
        skipped = positive(0 if clip_skip is None else clip_skip, "clip_skip", least=0)
        negative, text = self._prompts.encode(OnDevices(self.programs), branches, clip_skip=skipped)
        return text, negative

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Sets options of the tqdm progress bar, such as `disable=True`."""
        self._progress = settings

    def _size(self, call: Call) -> Size:
        """Height and width of a call's images; None becomes the model's."""
        height, width = self.default_size
        return height if call.height is None else call.height, width if call.width is None else call.width

    def _guided(self, call: Call) -> bool:
        """Whether an unconditional branch runs beside the conditional one."""
        return call.guidance_scale > 1 and self.unet_config.branches == 2

    def _warn_of_single_branch(self, call: Call, *others: str) -> None:
        """Warns of given arguments that a UNet with a single guidance branch ignores, `others` among them."""
        names = ("negative_prompt", "negative_prompt_embeds", *others)
        idle = [name for name in names if getattr(call, name) is not None]
        if call.guidance_rescale:
            idle.append("guidance_rescale")
        if self.unet_config.branches == 1 and idle:
            warn(
                f"{', '.join(idle)} has no effect: this UNet is conditioned on the guidance scale and runs one branch; remove it"
            )
