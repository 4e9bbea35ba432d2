"""Trains the embedded default model: a small SDXL-shaped pipeline that generates scenes of coloured shapes.

    python examples/train_tiny.py --output tiny             # about two hours on two CPU cores
    python examples/check_scenes.py --model tiny            # do its images show what their captions say?

    vae         the autoencoder, from crops that show shapes
    text        both text encoders: captions to images of 8 x 8 cells; they are frozen from here on
    unet-128    the UNet on cached latents of 128x128, then
    unet-256    of 256x256, 192x320 and 320x192, with SDXL's size conditioning
    decoder     the autoencoder's decoder again, on larger crops

The seed and the step determine a batch, and the step its noise. A checkpoint is kept every 500 steps, so an interrupted run
resumes where it stopped; it refuses settings that differ from those of its checkpoints. The result is
a folder in the diffusers layout. Up to four devices share a batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tiny_data import crops, framed, scene_crops, to_pixels
from tiny_tokenizer import train_tokenizer
from tqdm import tqdm

from distrijax.atomic_write import atomic_write
from distrijax.cli.fidelity.scenes import all_captions_vocabulary, example
from distrijax.cli.options import Parser, check_positive
from distrijax.errors import DistriError
from distrijax.json_config import read_json
from distrijax.models.attention import Attention
from distrijax.models.clip import CLIPTextConfig, CLIPTextEncoder
from distrijax.models.layers import Linear, gelu
from distrijax.models.tokenizer import CLIPTokenizer
from distrijax.models.unet import UNet
from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import AutoencoderKL, VAEConfig
from distrijax.parallel.exchange import WholeImage
from distrijax.schedulers import common
from distrijax.validate import positive
from distrijax.weights.load import save_module

VAE = VAEConfig(
    block_out_channels=(16, 32, 64, 64),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    norm_num_groups=4,
    force_upcast=False,
)
TEXT_WIDTHS = (64, 128)
CELLS = 8  # side of the coarse images from which the text encoders learn
UNET = UNetConfig(
    block_out_channels=(32, 64, 128),
    cross_attention_dim=sum(TEXT_WIDTHS),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1, 1),
    attention_head_dim=(1, 2, 4),
    norm_num_groups=4,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=32,
    projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * 32,
    sample_size=32,
)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "clip_sample": False,
}
TRAINING_IMAGES = {  # height, width and number, for each stage of the UNet
    "unet-128": [(128, 128, 16384)],
    "unet-256": [(256, 256, 4096), (192, 320, 512), (320, 192, 512)],
}
BATCH_SIZES = {"unet-128": 32, "unet-256": 16}
STEP_FLAGS = {
    "vae": "--vae-steps",
    "text": "--text-steps",
    "unet-128": "--small-steps",
    "unet-256": "--large-steps",
    "decoder": "--decoder-steps",
}
"""The flag with each stage's steps, by the names of the stages' checkpoints."""
FIXED_FLAGS = {
    "--seed": ("checkpoints/vae", "cache"),
    "--vae-steps": ("cache", "checkpoints/unet-128"),
    "--text-steps": ("checkpoints/unet-128",),
    "--small-steps": ("checkpoints/unet-256",),
}
"""The folders of `--output` that depend on a flag, which may not change once they contain something."""
BATCH_UNIT = 4  # divides every batch, so that up to as many devices can share it
NO_CAPTION = 0.1  # share of captions left out, for classifier-free guidance


def quiet_residuals(module: nnx.Module) -> nnx.Module:
    """Zeroes the last layer of every residual branch, so that training starts from the plain path through the model."""
    graph, state = nnx.split(module)
    for path, leaf in nnx.to_flat_state(state):
        layer = ".".join(map(str, path[:-1]))
        if layer.endswith((".conv2", ".proj_out", ".to_out.0", ".ff.net.2")):
            leaf.set_value(jnp.zeros_like(leaf.get_value()))
    return nnx.merge(graph, state)


def fit(
    module: nnx.Module,
    loss: Callable,
    batches: Callable[[int], tuple],
    *,
    steps: int,
    learning_rate: float,
    average: float,
    folder: Path,
) -> nnx.Module:
    """Minimises a loss and returns the module with the exponential moving average of its parameters.

    Args:
        module: The module to train.
        loss: Called as `loss(module, key, *batch)`.
        batches: The batch of a step.
        steps: Number of steps.
        learning_rate: Peak of the schedule.
        average: Decay of the exponential moving average.
        folder: Where checkpoints are kept, and from which training resumes.
    """
    graph, params = nnx.split(module)
    params = nnx.to_pure_dict(params)
    rate = optax.warmup_cosine_decay_schedule(0, learning_rate, min(200, steps // 10), steps, learning_rate / 50)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-4))
    mesh = Mesh(
        np.array(jax.devices()[: math.gcd(jax.device_count(), BATCH_UNIT)]), "data", axis_types=(AxisType.Auto,)
    )
    split, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    state = {"params": params, "average": jax.tree.map(jnp.copy, params), "optimizer": optimizer.init(params)}
    state = jax.device_put(state, everywhere)

    def rebuild(params):
        abstract = nnx.split(module)[1]
        nnx.replace_by_pure_dict(abstract, params)
        return nnx.merge(graph, abstract)

    @jax.jit
    def update(state, step, batch):
        value, gradient = jax.value_and_grad(lambda p: loss(rebuild(p), jax.random.key(step), *batch))(state["params"])
        change, optimizer_state = optimizer.update(gradient, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], change)
        weight = jnp.maximum(1 - average, 1 / (step + 1))  # a plain mean at first
        averaged = jax.tree.map(lambda a, p: a + weight * (p - a), state["average"], params)
        return {"params": params, "average": averaged, "optimizer": optimizer_state}, value

    with ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start:
            state = checkpoints.restore(start, args=ocp.args.StandardRestore(state))
        progress = tqdm(range(start, steps), initial=start, total=steps, desc=folder.name, mininterval=10)
        for step in progress:
            state, value = update(state, step, jax.device_put(batches(step), split))
            if step % 25 == 24:
                progress.set_postfix(loss=f"{float(value):.4f}", refresh=False)
            if step % 500 == 499 or step + 1 == steps:
                checkpoints.save(step + 1, args=ocp.args.StandardSave(state))
    return rebuild(state["average"])


def vae_loss(vae: AutoencoderKL, key: jax.Array, pixels: jax.Array) -> jax.Array:
    """The image's error, and a small share of KL divergence."""
    mean, std = vae.encode(pixels, WholeImage())
    latents = mean + std * jax.random.normal(key, mean.shape)
    divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.square(std) - 1 - 2 * jnp.log(std))
    return image_error(vae.decode(latents, WholeImage()), pixels) + 1e-6 * divergence


def image_error(generated: jax.Array, pixels: jax.Array) -> jax.Array:
    """Absolute and squared error, and the absolute error of the differences between neighbours (edges)."""
    error = generated - pixels
    edges = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
    return jnp.mean(jnp.abs(error)) + jnp.mean(jnp.square(error)) + 0.5 * edges


def train_vae(args: argparse.Namespace) -> AutoencoderKL:
    """Trains the autoencoder on `--vae-steps` batches of crops."""
    vae = quiet_residuals(AutoencoderKL(VAE, rngs=nnx.Rngs(args.seed)))
    latents = VAE.latent_channels
    # little noise, which would drown the colours
    vae.quant_conv.bias.set_value(jnp.repeat(jnp.array([0.0, -6.0]), latents))
    return fit(
        vae,
        vae_loss,
        lambda step: (crops(args.seed, step),),
        steps=args.vae_steps,
        learning_rate=3e-3,
        average=0.99,
        folder=args.output / "checkpoints" / "vae",
    )


def train_decoder(args: argparse.Namespace, vae: AutoencoderKL) -> AutoencoderKL:
    """Trains the decoder again, on larger crops at full resolution; encoder and latents stay the same."""
    encode = jax.jit(lambda vae, pixels: vae.post_quant_conv(vae.encode(pixels, WholeImage())[0]))

    def batches(step: int) -> tuple:
        pixels = scene_crops([args.seed, step, 3], step * 8, count=8, side=96, size=256)
        return encode(vae, pixels), pixels

    vae.decoder = fit(
        vae.decoder,
        lambda decoder, key, latents, pixels: image_error(decoder(latents, WholeImage()), pixels),
        batches,
        steps=args.decoder_steps,
        learning_rate=1e-3,
        average=0.99,
        folder=args.output / "checkpoints" / "decoder",
    )
    return vae


def text_config(tokenizer: CLIPTokenizer, which: int) -> CLIPTextConfig:
    """Configurations of SDXL's two text encoders, made small: quick_gelu without, and gelu with a projection."""
    width = TEXT_WIDTHS[which]
    return CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=width // 32,
        hidden_act=("quick_gelu", "gelu")[which],
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class CaptionModel(nnx.Module):
    """Both text encoders with the heads that train them: they predict a coarse image from its caption.

    SDXL's text encoders were trained on images too, without a UNet (CLIP, by a contrastive loss). One attention layer reads
    the tokens from every cell of the image, as the UNet's cross-attention will; a second head reads the pooled embedding.
    """

    def __init__(self, tokenizers: list[CLIPTokenizer], *, rngs: nnx.Rngs):
        width = sum(TEXT_WIDTHS)
        self.text_encoder = CLIPTextEncoder(text_config(tokenizers[0], 0), with_projection=False, rngs=rngs)
        self.text_encoder_2 = CLIPTextEncoder(text_config(tokenizers[1], 1), with_projection=True, rngs=rngs)
        self.cells = nnx.Param(jax.random.normal(rngs.params(), (CELLS * CELLS, width)))
        self.attention = Attention(width, 6, context=width, rngs=rngs)
        self.colours = Linear(width, 3, rngs=rngs)
        self.pooled_in = Linear(TEXT_WIDTHS[1], 2 * width, rngs=rngs)
        self.pooled_out = Linear(2 * width, CELLS * CELLS * 3, rngs=rngs)

    def encode(self, ids: jax.Array, ids_2: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Inputs of the UNet: token embeddings `[b, t, c]` of both encoders, and the second's pooled embedding `[b, c]`."""
        first, _ = self.text_encoder(ids)
        second, pooled = self.text_encoder_2(ids_2)
        return jnp.concatenate([first, second], -1), pooled

    def __call__(self, ids: jax.Array, ids_2: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The coarse image `[b, CELLS, CELLS, 3]` that each head predicts."""
        hidden, pooled = self.encode(ids, ids_2)
        shape = (len(ids), CELLS, CELLS, 3)
        cells = jnp.broadcast_to(self.cells.get_value(), (len(ids), *self.cells.get_value().shape))
        seen = cells + self.attention(cells, WholeImage(), self.attention.project_context(hidden))
        from_pooled = self.pooled_out(gelu(self.pooled_in(pooled)))
        return self.colours(gelu(seen)).reshape(shape), from_pooled.reshape(shape)


def train_text(args: argparse.Namespace, tokenizers: list[CLIPTokenizer]) -> CaptionModel:
    """Trains the text encoders on captions and images of 8 x 8 cells."""

    def batches(step: int) -> tuple:
        images, captions, _ = zip(
            *(example(args.seed, index, 64, 64) for index in range(step * 32, step * 32 + 32)), strict=True
        )
        cells = to_pixels(images).reshape(32, CELLS, 64 // CELLS, CELLS, 64 // CELLS, 3).mean((2, 4))
        return *(tokenizer(captions) for tokenizer in tokenizers), cells

    def loss(text_model: CaptionModel, key: jax.Array, ids: jax.Array, ids_2: jax.Array, cells: jax.Array) -> jax.Array:
        return sum(jnp.mean(jnp.square(guess - cells)) for guess in text_model(ids, ids_2))

    return fit(
        CaptionModel(tokenizers, rngs=nnx.Rngs(args.seed + 1)),
        loss,
        batches,
        steps=args.text_steps,
        learning_rate=1e-3,
        average=0.99,
        folder=args.output / "checkpoints" / "text",
    )


def unet_loss(unet: UNet, key, latents, hidden, pooled, time_ids) -> jax.Array:
    """Squared error of the velocity at a random timestep of a schedule that ends in pure noise.

    Some captions are zeroed, as SDXL does for an empty prompt.

    References:
        Zero terminal SNR, arXiv 2305.08891.
    """
    betas = common.betas(common.BetaSchedule.SCALED_LINEAR, 0.00085, 0.012, 1000)
    cumulative = jnp.asarray(common.cumulative_alphas(betas, rescale_zero_snr=True))
    batch = latents.shape[0]
    noise_key, time_key, caption_key = jax.random.split(key, 3)
    # one timestep in each of `batch` equal ranges: the same expectation as independent draws, with less variance
    spread = (jnp.arange(batch) + jax.random.uniform(time_key, (batch,))) / batch
    timesteps = jnp.floor(spread * 1000).astype(jnp.int32)
    alpha = jnp.sqrt(cumulative[timesteps])[:, None, None, None]
    sigma = jnp.sqrt(1 - cumulative[timesteps])[:, None, None, None]
    noise = jax.random.normal(noise_key, latents.shape)
    captioned = (jax.random.uniform(caption_key, (batch, 1)) >= NO_CAPTION).astype(jnp.float32)
    conditioning = unet.condition(hidden * captioned[..., None], pooled * captioned, time_ids)
    noisy = alpha * latents + sigma * noise
    predicted = unet(noisy, timesteps.astype(jnp.float32), conditioning, WholeImage())
    return jnp.mean(jnp.square(predicted - (alpha * noise - sigma * latents)))


def cache_latents(args, vae, tokenizers, height: int, width: int, count: int, first: int) -> dict[str, np.ndarray]:
    """Latents, token ids and time ids of `count` images, computed once and kept in `--output`."""
    file = args.output / "cache" / f"{height}x{width}-{first}-{count}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        encode = jax.jit(lambda vae, pixels: vae.encode(pixels, WholeImage())[0])
        parts = []
        for start in tqdm(range(first, first + count, 16), desc=file.stem, mininterval=10):
            batch = [framed(args.seed, index, height, width) for index in range(start, start + 16)]
            images, captions, time_ids = zip(*batch, strict=True)
            latents = np.asarray(encode(vae, to_pixels(images)))
            parts.append((latents, *(tokenizer(captions) for tokenizer in tokenizers), np.float32(time_ids)))
        whole = map(np.concatenate, zip(*parts, strict=True))
        np.savez(
            file.with_suffix(".part.npz"), **dict(zip(("latents", "ids", "ids_2", "time_ids"), whole, strict=True))
        )
        file.with_suffix(".part.npz").rename(file)
    return dict(np.load(file))


def train_unet(
    args, vae: AutoencoderKL, text_model: CaptionModel, tokenizers: list[CLIPTokenizer]
) -> tuple[UNet, float]:
    """Trains the UNet, on small images first; returns it and the factor that scales the latents to unit variance."""
    unet = quiet_residuals(UNet(UNET, rngs=nnx.Rngs(args.seed + 2)))
    encode = jax.jit(lambda text_model, ids, ids_2: text_model.encode(ids, ids_2))
    scale = None
    for name, steps, rate in (("unet-128", args.small_steps, 1.5e-3), ("unet-256", args.large_steps, 1e-3)):
        shapes, batch = TRAINING_IMAGES[name], BATCH_SIZES[name]
        first, caches = 0, []
        for height, width, count in shapes:
            cache = cache_latents(args, vae, tokenizers, height, width, count, first)
            texts = [
                encode(text_model, *ids)
                for ids in zip(*(np.split(cache[k], 32) for k in ("ids", "ids_2")), strict=True)
            ]
            hidden, pooled = (np.concatenate(part, dtype=np.float16) for part in zip(*texts, strict=True))
            caches.append((cache["latents"], hidden, pooled, cache["time_ids"]))
            first += count
        scale = scale or float(1 / np.std(caches[0][0]))
        sizes = np.array([count for *_, count in shapes])

        def batches(step, caches=caches, sizes=sizes, batch=batch, scale=scale):
            rng = np.random.default_rng([args.seed, step, 2])
            cache = caches[rng.choice(len(caches), p=sizes / sizes.sum())]
            rows = rng.integers(0, len(cache[0]), batch)
            latents, *conditions = (array[rows].astype(np.float32) for array in cache)
            return latents * np.float32(scale), *conditions

        folder = args.output / "checkpoints" / name
        unet = fit(unet, unet_loss, batches, steps=steps, learning_rate=rate, average=0.999, folder=folder)
    return unet, scale


def export(args, vae: AutoencoderKL, text_model: CaptionModel, unet: UNet, scale: float) -> None:
    """Writes a folder that `from_pretrained` and diffusers read, with weights in float16."""

    def write(name, module, library, class_name, stem):
        config = {"_class_name": class_name, **dataclasses.asdict(module.config)}
        save_module(module, config, args.output / name, stem=stem, dtype=np.float16)
        index[name] = [library, class_name]

    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    vae.config = dataclasses.replace(vae.config, scaling_factor=scale)
    write("vae", vae, "diffusers", "AutoencoderKL", "diffusion_pytorch_model")
    write("unet", unet, "diffusers", "UNet2DConditionModel", "diffusion_pytorch_model")
    write("text_encoder", text_model.text_encoder, "transformers", "CLIPTextModel", "model")
    write("text_encoder_2", text_model.text_encoder_2, "transformers", "CLIPTextModelWithProjection", "model")
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"]}
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (args.output / "scheduler").mkdir(exist_ok=True)
    for name, content in (("scheduler/scheduler_config.json", SCHEDULER), ("model_index.json", index)):
        (args.output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_settings(args: argparse.Namespace) -> None:
    """Records the settings in `--output`; raises DistriError for settings that differ from those of its contents."""
    given = {
        flag: getattr(args, flag.removeprefix("--").replace("-", "_")) for flag in ("--seed", *STEP_FLAGS.values())
    }
    checkpoints = args.output / "checkpoints"
    file = checkpoints / "settings.json"
    old = read_json(file) if file.exists() else {}
    for flag, folders in FIXED_FLAGS.items():
        if old.get(flag) != given[flag] and any(any((args.output / folder).glob("*")) for folder in folders):
            raise DistriError(
                f"--output {args.output} was trained with {flag} {old.get(flag, 'unknown')}, now {given[flag]}; "
                "choose another folder, or the same value"
            )
    for stage, flag in STEP_FLAGS.items():
        steps = [int(path.name) for path in (checkpoints / stage).glob("*") if path.name.isdecimal()]
        if max(steps, default=0) > given[flag]:
            raise DistriError(
                f"{flag} is {given[flag]} and {checkpoints / stage} has done {max(steps)}; give at least as many"
            )
    checkpoints.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as beside:
        beside.write_text(json.dumps({flag: given[flag] for flag in FIXED_FLAGS}, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; raises SystemExit for wrong input."""
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the result, its checkpoints and caches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--devices", type=int, help="virtual CPU devices that share a batch, on machines without accelerators"
    )
    parser.add_argument("--vae-steps", type=int, default=2600)
    parser.add_argument("--decoder-steps", type=int, default=600)
    parser.add_argument("--text-steps", type=int, default=1600)
    parser.add_argument("--small-steps", type=int, default=4500, help="steps of the UNet at 128x128")
    parser.add_argument("--large-steps", type=int, default=5000, help="steps of the UNet at 256x256 and other shapes")
    args = parser.parse_args(argv)
    try:
        check_positive(args, "devices", *(f"{stage}_steps" for stage in ("vae", "decoder", "text", "small", "large")))
        positive(args.seed, "--seed", least=0)
        check_settings(args)
    except DistriError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--output {args.output} cannot be created ({error.strerror}); choose another folder")
    if args.devices:
        jax.config.update("jax_num_cpu_devices", args.devices)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((args.output / "checkpoints" / "xla").absolute()))
    words = [" ".join(all_captions_vocabulary())]
    tokenizers = [
        train_tokenizer(words, args.output / name, vocab_size=1024, pad_token=pad)
        for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!"))
    ]
    vae, text_model = train_vae(args), train_text(args, tokenizers)
    unet, scale = train_unet(args, vae, text_model, tokenizers)
    export(args, train_decoder(args, vae), text_model, unet, scale)


if __name__ == "__main__":
    main()
