"""Pipelines from checkpoints: devices, mesh and programs, and what all families' calls have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, Unpack

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from distrijax import interrupts
from distrijax.config import DistriConfig
from distrijax.errors import InvalidArgument, warn
from distrijax.models.families import default_size
from distrijax.parallel.layout import check_images
from distrijax.parallel.mesh import DATA, devices_of, plan_mesh
from distrijax.parallel.processes import check_agreement, versions, warm_up_collectives
from distrijax.parallel.programs import MAX_PROGRAMS
from distrijax.pipelines.call import (
    Call,
    PipelineOutput,
    Request,
    Size,
    bound_arguments,
    given_latents,
    image_seeds,
)
from distrijax.pipelines.loading import abstract_components, opened, read_components, read_configs
from distrijax.pipelines.prompt import Embeddings, Prompts
from distrijax.pipelines.run import Runner, initial_state, pad_latents
from distrijax.sampling import denoise
from distrijax.sampling.decode import decode
from distrijax.sampling.denoise import image_layout
from distrijax.sampling.shapes import PROMPT_TOKENS, latents_of, prompt_of, step_programs
from distrijax.validate import check_choice, host_array, positive
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.dtypes import resolve_dtype
from distrijax.weights.recipe import Additions


class Pipeline(Runner):
    """All of a pipeline but its conditioning.

    A subclass names its family, reads a call's arguments (`_parse_call`) and has the call itself.
    """

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
        check_agreement(devices, lambda: {**versions(), "config": config, "model": repr(model), "dtype": dtype.name})
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
                pipe._prepare(compile_for)
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

    def _prepare(self, arguments: Mapping[str, Any]) -> None:
        """Begins to compile the programs of a call with these arguments.

        The loop's are those for `chunk_size=1`; others compile in the call.
        """
        given = bound_arguments(type(self).__call__, arguments)
        if given["prompt"] is None and given["prompt_embeds"] is None:
            given["prompt"] = ""
        request = self._parse_call(given)
        call, images, unet = request.call, request.images, self.unet_config
        check_images(images, self.mesh.shape[DATA])
        image_seeds(call.seed, images)
        scheduler = self._scheduler_of(call)
        self._check_agreement(request, scheduler)
        steps, _ = scheduler.schedule(call.num_inference_steps)
        loop = self._loop(call, scheduler, len(steps.timestep))
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
        self.programs.prepare(initial_state, (loop, unet.in_channels), (), seeds, sigma, noise)
        if call.output_type != "latent":
            self.programs.prepare(decode, self._decoder(loop.layout), self._vae.params, latents)

    def _parse_call(self, given: Mapping[str, Any]) -> Request:
        """Checks the arguments of a call, given by name; raises DistriError for those that cannot be used."""
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
        latents, channels = host_array(latents, "latents"), self.unet_config.in_channels
        if latents.ndim != 4 or latents.shape[1] != channels or not latents.size:
            raise InvalidArgument(f"latents is {list(latents.shape)}; give [images, {channels}, rows, columns]")
        check_images(len(latents), self.mesh.shape[DATA])
        size = tuple(side * self.vae_config.scale for side in latents.shape[2:])
        layout = image_layout(self.config, self.mesh, self.unet_config, self.vae_config, size, guided=False)
        return self._decode_images(layout, pad_latents(layout, latents), output_type)

    def _encode(
        self, prompts: Prompts, negative_prompts: Prompts, clip_skip: int | None
    ) -> tuple[Embeddings, Embeddings]:
        """Returns the embeddings of prompts and of negative prompts."""
        branches = self._prompts.read(prompts, negative_prompts, None, None, guided=True)
        skipped = positive(0 if clip_skip is None else clip_skip, "clip_skip", least=0)
        negative, text = self._prompts.encode(branches, clip_skip=skipped)
        return text, negative

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Sets options of the tqdm progress bar, such as `disable=True`."""
        self._progress = settings

    @property
    def default_size(self) -> Size:
        """The height and width in pixels that the model was trained for."""
        return default_size(self.family, self.unet_config, self.vae_config)

    def _common_args(self, given: Mapping[str, Any]) -> Call:
        """Returns the arguments that all pipelines share; a height or width of None becomes the model's."""
        shared = {field.name: given[field.name] for field in dataclasses.fields(Call) if field.name in given}
        for side, usual in zip(("height", "width"), self.default_size, strict=True):
            shared[side] = usual if given[side] is None else given[side]
        return Call(**shared, branches=self.unet_config.branches)

    def _warn_of_single_branch(self, given: Mapping[str, Any], *others: str) -> None:
        """Warns of given arguments that a UNet with a single guidance branch ignores, `others` among them."""
        names = ("negative_prompt", "negative_prompt_embeds", *others, "guidance_rescale")
        given = {**given, "guidance_rescale": given["guidance_rescale"] or None}
        idle = [name for name in names if given[name] is not None]
        if self.unet_config.branches == 1 and idle:
            warn(
                f"{', '.join(idle)} has no effect: this UNet is conditioned on the guidance scale and runs one branch; remove it"
            )
