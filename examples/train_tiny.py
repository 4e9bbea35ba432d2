"""Trains the embedded default model: a small SDXL-shaped pipeline that paints the scenes of scenes.py.

    python examples/train_tiny.py --output tiny             # about two hours on two CPU cores
    python examples/check_scenes.py --model tiny            # does it paint what it is told?

    vae         the autoencoder, from crops that show shapes
    text        both text encoders: captions to pictures of 8 x 8 cells; they stay as they are from here on
    unet-128    the UNet on cached latents of 128x128, then
    unet-256    of 256x256, 192x320 and 320x192, with SDXL's size conditioning
    decoder     the autoencoder's decoder once more, on larger crops

Every batch follows from the seed and the step, its noise from the step, and a checkpoint is kept every 500 steps: an
interrupted run goes on where it stopped, and is refused settings that what is there was not made with. Needs the extra `train`.
The result is a folder in the diffusers layout. Up to four devices share a batch.
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
from tiny_tokenizer import train_tokenizer
from tqdm import tqdm

from distrijax.cli.fidelity.scenes import PLACES, all_captions_vocabulary, example
from distrijax.cli.options import check_positive, written_whole
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
CELLS = 8  # a coarse picture, from which the text encoders learn, has 8 x 8 cells
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
PICTURES = {  # height, width and how many, for each stage of the UNet
    "unet-128": [(128, 128, 16384)],
    "unet-256": [(256, 256, 4096), (192, 320, 512), (320, 192, 512)],
}
STEPS = {
    "vae": "--vae-steps",
    "text": "--text-steps",
    "unet-128": "--small-steps",
    "unet-256": "--large-steps",
    "decoder": "--decoder-steps",
}
"""Whose steps a flag gives: stages, by the names of their checkpoints."""
MADE_WITH = {
    "--seed": ("checkpoints/vae", "cache"),
    "--vae-steps": ("cache", "checkpoints/unet-128"),
    "--text-steps": ("checkpoints/unet-128",),
    "--small-steps": ("checkpoints/unet-256",),
}
"""What of `--output` goes on from what a flag gave, which may not change once there is something in it."""
BATCH_UNIT = 4  # every batch is a multiple of it, so that up to as many devices can share it
NO_CAPTION = 0.1  # share of captions that are left out, for classifier-free guidance


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
    """Minimises `loss(module, key, *batches(step))`; returns the module with exponentially averaged parameters.

    average: the decay of that average. folder: where checkpoints are kept, and looked for when training resumes.
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


def crops(seed: int, step: int) -> np.ndarray:
    """Crops of random scenes: many small ones, and at every fourth step fewer larger ones."""
    count, side, size = (4, 96, 256) if step % 4 == 3 else (16, 48, 256 if step % 4 == 2 else 128)
    return scene_crops([seed, step], step * 16, count=count, side=side, size=size)


def scene_crops(seeds: list[int], first: int, *, count: int, side: int, size: int) -> np.ndarray:
    """One crop of each of `count` scenes, -1 to 1: a variety of colours is what the autoencoder learns fastest from.

    Three crops in four hold the centre of a shape; backgrounds fill most of every picture anyway.
    """
    rng = np.random.default_rng(seeds)
    pictures = []
    for index in range(first, first + count):
        picture, _, scene = example(seeds[0], index, size, size)
        corner = rng.integers(0, size - side + 1, 2)
        if rng.random() < 0.75:
            centre = np.array(PLACES[rng.choice(scene.shapes).place]) * size
            corner = np.clip(centre - rng.integers(side // 4, side - side // 4, 2), 0, size - side).astype(int)
        y, x = corner
        pictures.append(picture[y : y + side, x : x + side])
    return to_pixels(pictures)


def to_pixels(pictures: list[np.ndarray]) -> np.ndarray:
    """uint8 pictures as the autoencoder takes them, -1 to 1."""
    return np.stack(pictures).astype(np.float32) / 127.5 - 1


def vae_loss(vae: AutoencoderKL, key: jax.Array, pixels: jax.Array) -> jax.Array:
    """The picture's error, and a little KL divergence."""
    mean, std = vae.encode(pixels, WholeImage())
    latents = mean + std * jax.random.normal(key, mean.shape)
    divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.square(std) - 1 - 2 * jnp.log(std))
    return picture_error(vae.decode(latents, WholeImage()), pixels) + 1e-6 * divergence


def picture_error(painted: jax.Array, pixels: jax.Array) -> jax.Array:
    """Absolute and squared error, and the absolute error of the differences between neighbours (edges)."""
    error = painted - pixels
    edges = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
    return jnp.mean(jnp.abs(error)) + jnp.mean(jnp.square(error)) + 0.5 * edges


def train_vae(args: argparse.Namespace) -> AutoencoderKL:
    """The autoencoder, from `--vae-steps` batches of crops."""
    vae = quiet_residuals(AutoencoderKL(VAE, rngs=nnx.Rngs(args.seed)))
    latents = VAE.latent_channels
    vae.quant_conv.bias.set_value(jnp.repeat(jnp.array([0.0, -6.0]), latents))  # little noise, or colours drown in it
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
    """The decoder once more, on larger crops at full resolution, with the encoder and so the latents as they are."""
    encode = jax.jit(lambda vae, pixels: vae.post_quant_conv(vae.encode(pixels, WholeImage())[0]))

    def batches(step: int) -> tuple:
        pixels = scene_crops([args.seed, step, 3], step * 8, count=8, side=96, size=256)
        return encode(vae, pixels), pixels

    vae.decoder = fit(
        vae.decoder,
        lambda decoder, key, latents, pixels: picture_error(decoder(latents, WholeImage()), pixels),
        batches,
        steps=args.decoder_steps,
        learning_rate=1e-3,
        average=0.99,
        folder=args.output / "checkpoints" / "decoder",
    )
    return vae


def text_config(tokenizer: CLIPTokenizer, which: int) -> CLIPTextConfig:
    """SDXL's two text encoders in small: quick_gelu without, and gelu with a projection."""
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


class Reader(nnx.Module):
    """Both text encoders, and what teaches them: telling from a caption the colours of a coarse picture of it.

    SDXL's text encoders were taught by pictures too, before there was a UNet (CLIP, by contrast). One attention layer reads
    the tokens from every cell of the picture, as the UNet's cross-attention will; a second head reads the pooled embedding.
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
        """What the UNet is given: token embeddings [b, t, c] of both encoders, and the second's pooled embedding."""
        first, _ = self.text_encoder(ids)
        second, pooled = self.text_encoder_2(ids_2)
        return jnp.concatenate([first, second], -1), pooled

    def __call__(self, ids: jax.Array, ids_2: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The coarse picture as both heads see it."""
        hidden, pooled = self.encode(ids, ids_2)
        shape = (len(ids), CELLS, CELLS, 3)
        cells = jnp.broadcast_to(self.cells.get_value(), (len(ids), *self.cells.get_value().shape))
        seen = cells + self.attention(cells, WholeImage(), self.attention.project_context(hidden))
        from_pooled = self.pooled_out(gelu(self.pooled_in(pooled)))
        return self.colours(gelu(seen)).reshape(shape), from_pooled.reshape(shape)


def train_text(args: argparse.Namespace, tokenizers: list[CLIPTokenizer]) -> Reader:
    """The text encoders, from captions and pictures of 8 x 8 cells."""

    def batches(step: int) -> tuple:
        pictures, captions, _ = zip(
            *(example(args.seed, index, 64, 64) for index in range(step * 32, step * 32 + 32)), strict=True
        )
        cells = to_pixels(pictures).reshape(32, CELLS, 64 // CELLS, CELLS, 64 // CELLS, 3).mean((2, 4))
        return *(tokenizer(captions) for tokenizer in tokenizers), cells

    def loss(reader: Reader, key: jax.Array, ids: jax.Array, ids_2: jax.Array, cells: jax.Array) -> jax.Array:
        return sum(jnp.mean(jnp.square(guess - cells)) for guess in reader(ids, ids_2))

    return fit(
        Reader(tokenizers, rngs=nnx.Rngs(args.seed + 1)),
        loss,
        batches,
        steps=args.text_steps,
        learning_rate=1e-3,
        average=0.99,
        folder=args.output / "checkpoints" / "text",
    )


def unet_loss(unet: UNet, key, latents, hidden, pooled, time_ids) -> jax.Array:
    """Squared error of the velocity at a random timestep of a schedule that ends in pure noise (arXiv 2305.08891).

    Some captions are zeroed, as SDXL does for an empty prompt.
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


def framed(seed: int, index: int, height: int, width: int) -> tuple[np.ndarray, str, list[float]]:
    """A training picture, its caption and its time ids: some are cropped, some enlarged from half the size."""
    rng = np.random.default_rng([seed, index, 1])
    kind = rng.choice(["whole", "crop", "enlarged"], p=[0.9, 0.06, 0.04])
    if kind == "crop":
        tall, wide = height * 5 // 32 * 8, width * 5 // 32 * 8
        top, left = int(rng.integers(0, tall - height + 1)), int(rng.integers(0, wide - width + 1))
        picture, caption, _ = example(seed, index, tall, wide)
        return picture[top : top + height, left : left + width], caption, [tall, wide, top, left, height, width]
    if kind == "enlarged":
        picture, caption, _ = example(seed, index, height // 2, width // 2)
        enlarged = picture.repeat(2, 0).repeat(2, 1)
        return enlarged, caption, [height // 2, width // 2, 0, 0, height, width]
    picture, caption, _ = example(seed, index, height, width)
    return picture, caption, [height, width, 0, 0, height, width]


def cache_latents(args, vae, tokenizers, height: int, width: int, count: int, first: int) -> dict[str, np.ndarray]:
    """Latents, token ids and time ids of `count` pictures, computed once and kept in `--output`."""
    file = args.output / "cache" / f"{height}x{width}-{first}-{count}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        encode = jax.jit(lambda vae, pixels: vae.encode(pixels, WholeImage())[0])
        parts = []
        for start in tqdm(range(first, first + count, 16), desc=file.stem, mininterval=10):
            batch = [framed(args.seed, index, height, width) for index in range(start, start + 16)]
            pictures, captions, time_ids = zip(*batch, strict=True)
            latents = np.asarray(encode(vae, to_pixels(pictures)))
            parts.append((latents, *(tokenizer(captions) for tokenizer in tokenizers), np.float32(time_ids)))
        whole = map(np.concatenate, zip(*parts, strict=True))
        np.savez(
            file.with_suffix(".part.npz"), **dict(zip(("latents", "ids", "ids_2", "time_ids"), whole, strict=True))
        )
        file.with_suffix(".part.npz").rename(file)
    return dict(np.load(file))


def train_unet(args, vae: AutoencoderKL, reader: Reader, tokenizers: list[CLIPTokenizer]) -> tuple[UNet, float]:
    """The UNet, small pictures first; and the factor that scales the latents to unit variance."""
    unet = quiet_residuals(UNet(UNET, rngs=nnx.Rngs(args.seed + 2)))
    encode = jax.jit(lambda reader, ids, ids_2: reader.encode(ids, ids_2))
    scale = None
    for name, steps, batch, rate in (
        ("unet-128", args.small_steps, 32, 1.5e-3),
        ("unet-256", args.large_steps, 16, 1e-3),
    ):
        shapes = PICTURES[name]
        first, caches = 0, []
        for height, width, count in shapes:
            cache = cache_latents(args, vae, tokenizers, height, width, count, first)
            texts = [
                encode(reader, *ids) for ids in zip(*(np.split(cache[k], 32) for k in ("ids", "ids_2")), strict=True)
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


def export(args, vae: AutoencoderKL, reader: Reader, unet: UNet, scale: float) -> None:
    """The folder that `from_pretrained` reads, and diffusers too; weights in float16."""

    def write(name, module, library, class_name, stem):
        config = {"_class_name": class_name, **dataclasses.asdict(module.config)}
        save_module(module, config, args.output / name, stem=stem, dtype=np.float16)
        index[name] = [library, class_name]

    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    vae.config = dataclasses.replace(vae.config, scaling_factor=scale)
    write("vae", vae, "diffusers", "AutoencoderKL", "diffusion_pytorch_model")
    write("unet", unet, "diffusers", "UNet2DConditionModel", "diffusion_pytorch_model")
    write("text_encoder", reader.text_encoder, "transformers", "CLIPTextModel", "model")
    write("text_encoder_2", reader.text_encoder_2, "transformers", "CLIPTextModelWithProjection", "model")
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"]}
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (args.output / "scheduler").mkdir(exist_ok=True)
    for name, content in (("scheduler/scheduler_config.json", SCHEDULER), ("model_index.json", index)):
        (args.output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_settings(args: argparse.Namespace) -> None:
    """Keeps in `--output` what it is trained with. Raises DistriError for what does not go with what is there."""
    given = {flag: getattr(args, flag.removeprefix("--").replace("-", "_")) for flag in ("--seed", *STEPS.values())}
    checkpoints = args.output / "checkpoints"
    file = checkpoints / "settings.json"
    old = read_json(file) if file.exists() else {}
    for flag, folders in MADE_WITH.items():
        if old.get(flag) != given[flag] and any(any((args.output / folder).glob("*")) for folder in folders):
            raise DistriError(
                f"--output {args.output} was trained with {flag} {old.get(flag, 'unknown')}, now {given[flag]}; "
                "choose another folder, or go on as before"
            )
    for stage, flag in STEPS.items():
        steps = [int(path.name) for path in (checkpoints / stage).glob("*") if path.name.isdecimal()]
        if max(steps, default=0) > given[flag]:
            raise DistriError(f"{flag} is {given[flag]} and {checkpoints / stage} has done {max(steps)}; give no fewer")
    checkpoints.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as beside:
        beside.write_text(json.dumps({flag: given[flag] for flag in MADE_WITH}, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the result, its checkpoints and caches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, help="virtual CPU devices to share a batch, where no accelerator is")
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
        parser.error(f"--output {args.output} cannot be made ({error.strerror}); choose another folder")
    if args.devices:
        jax.config.update("jax_num_cpu_devices", args.devices)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((args.output / "checkpoints" / "xla").absolute()))
    words = [" ".join(all_captions_vocabulary())]
    tokenizers = [
        train_tokenizer(words, args.output / name, vocab_size=1024, pad_token=pad)
        for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!"))
    ]
    vae, reader = train_vae(args), train_text(args, tokenizers)
    unet, scale = train_unet(args, vae, reader, tokenizers)
    export(args, train_decoder(args, vae), reader, unet, scale)


if __name__ == "__main__":
    main()
