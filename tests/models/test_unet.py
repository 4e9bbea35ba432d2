"""The UNet against torch diffusers, block by block and whole; full-size models by names and shapes."""

from __future__ import annotations

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from facts import refuses
from flax import nnx
from jax.sharding import PartitionSpec as P
from marks import slow, slow_but
from oracle import disturb, host, nhwc, part, port, record, relative_error
from unet_configs import BASE, FULL_BASE, FULL_REFINER, FULL_SD15, FULL_SD21, FULL_TOLD, KINDS, REFINER

from distrijax.models.unet import UNet, guidance_embedding
from distrijax.models.unet_config import UNetConfig
from distrijax.parallel.collectives import FIRST, LAST
from distrijax.parallel.displaced import Displaced
from distrijax.parallel.exchange import HALO, KV, MOMENTS, Synchronous, WholeImage
from distrijax.parallel.mesh import PATCH, MeshPlan
from distrijax.weights.names import checkpoint_name, to_pytorch

EXACT = 1e-5


class Pair:
    """One model in both libraries, and what torch computed in each of its parts for some input."""

    def __init__(self, kind: dict):
        torch.manual_seed(1)
        source = disturb(UNet2DConditionModel(**kind))
        self.ours = port(UNet(UNetConfig.from_dict(kind), rngs=nnx.Rngs(0)), source)
        self.sample, self.timestep = torch.randn(2, 4, 8, 16), torch.tensor([981.0, 12.5])
        self.prompt = torch.randn(2, 7, kind["cross_attention_dim"])
        self.pooled = self.ids = None
        if kind["addition_embed_type"]:
            self.pooled = torch.randn(2, 20)
            count = (kind["projection_class_embeddings_input_dim"] - 20) // kind["addition_time_embed_dim"]
            self.ids = torch.randint(0, 1024, (2, count)).float()
        added = {"text_embeds": self.pooled, "time_ids": self.ids} if self.pooled is not None else None
        self.scales = embedded = None
        if "time_cond_proj_dim" in kind:
            self.scales = torch.tensor([8.0, 1.5])
            embed = functools.partial(StableDiffusionXLPipeline.get_guidance_scale_embedding, None)
            embedded = embed(self.scales - 1, embedding_dim=kind["time_cond_proj_dim"])
        arguments = (self.sample, self.timestep, self.prompt)
        self.seen = record(source, *arguments, timestep_cond=embedded, added_cond_kwargs=added)

    @functools.cached_property
    def conditioning(self):
        return self.condition(self.scales)

    def condition(self, scales):
        given = (self.prompt, self.pooled, self.ids, scales)
        arguments = [None if a is None else a.numpy() for a in given]
        return jax.jit(lambda unet, *a: unet.condition(*a))(self.ours, *arguments)


@pytest.fixture(scope="module")
def pairs():
    return functools.cache(lambda kind: Pair(KINDS[kind]))


@pytest.mark.parametrize("kind", slow_but(["base"], KINDS))
def test_whole_unet_equals_diffusers(pairs, kind):
    pair = pairs(kind)
    run = jax.jit(lambda unet, x, t, c: unet(x, t, c, WholeImage()))
    got = run(pair.ours, nhwc(pair.sample), pair.timestep.numpy(), pair.conditioning)
    # the sinusoids of a guidance scale of 8 have arguments of 7000, and float32 rounds those by as much as 5e-4
    assert relative_error(got, nhwc(pair.seen[""][1][0])) < (EXACT if pair.scales is None else 1e-4)
    if pair.scales is not None:
        untold = run(pair.ours, nhwc(pair.sample), pair.timestep.numpy(), pair.condition(None))
        assert relative_error(got, untold) > 1e-2


@pytest.mark.parametrize("size", [256, 33])
def test_the_embedding_of_a_guidance_scale_is_that_of_diffusers(size):
    scales = torch.tensor([0.0, 0.5, 1.0, 1.7, 2.0])
    wanted = StableDiffusionXLPipeline.get_guidance_scale_embedding(None, scales - 1, embedding_dim=size)
    np.testing.assert_allclose(guidance_embedding(jnp.asarray(scales.numpy()), size), wanted, rtol=0, atol=1e-4)


@slow
@pytest.mark.parametrize("size", [(13, 9), (1, 3)])
def test_sizes_that_do_not_halve_equal_diffusers(size):
    """Odd numbers of rows and columns at every level: an upsampling leaves a row or a column out."""
    torch.manual_seed(1)
    source = disturb(UNet2DConditionModel(**REFINER))
    ours = port(UNet(UNetConfig.from_dict(REFINER), rngs=nnx.Rngs(0)), source)
    sample, prompt, pooled, ids = (torch.randn(*shape) for shape in ((1, 4, *size), (1, 7, 24), (1, 20), (1, 5)))
    with torch.no_grad():
        added = {"text_embeds": pooled, "time_ids": ids}
        wanted = source(sample, 500, prompt, added_cond_kwargs=added).sample
    arguments = [value.numpy() for value in (prompt, pooled, ids)]
    run = jax.jit(lambda unet, x, *a: unet(x, jnp.float32(500), unet.condition(*a), WholeImage()))
    assert relative_error(run(ours, nhwc(sample), *arguments), nhwc(wanted)) < EXACT


def ours_for(kind: str, module: nnx.Module, given: dict, context: dict) -> jax.Array:
    """What our part of this kind gives for what torch's was given."""
    arrays = {name: value for name, value in given.items() if name != "return_dict"}
    x = arrays.get("hidden_states", arrays.get("input_tensor"))
    embedding = arrays.get("temb")
    if kind == "BasicTransformerBlock":
        return module(jnp.asarray(host(x))[:, None], WholeImage(), context)[:, 0]
    x = jnp.asarray(nhwc(x))
    embedding = None if embedding is None else jnp.asarray(host(embedding))
    if kind == "ResnetBlock2D":
        return module(x, WholeImage(), module.project_time(embedding))
    if kind == "sampler":
        return module(x, WholeImage())
    if kind == "Transformer2DModel":
        return module(x, WholeImage(), context)
    times = {resnet.path: resnet.project_time(embedding) for resnet in module.resnets}
    if kind == "up":
        skips = [jnp.asarray(nhwc(skip)) for skip in arrays["res_hidden_states_tuple"]]
        above = jnp.zeros((1, 2 * x.shape[1], 2 * x.shape[2], 1))  # of the level above; its size alone is looked at
        return module(x, [above, *skips], WholeImage(), times, context)
    return module(x, WholeImage(), times, context)


PARTS = [
    ("base", "ResnetBlock2D", "down_blocks.0.resnets.0"),
    ("base", "ResnetBlock2D", "down_blocks.1.resnets.0"),
    ("base", "BasicTransformerBlock", "down_blocks.1.attentions.0.transformer_blocks.0"),
    ("base", "Transformer2DModel", "down_blocks.2.attentions.1"),
    ("convolutional projections", "Transformer2DModel", "down_blocks.1.attentions.0"),
    ("base", "sampler", "down_blocks.0.downsamplers.0"),
    ("base", "sampler", "up_blocks.0.upsamplers.0"),
    ("base", "down", "down_blocks.0"),
    ("base", "down", "down_blocks.1"),
    ("base", "down", "down_blocks.2"),
    ("refiner", "down", "down_blocks.3"),
    ("base", "mid", "mid_block"),
    ("base", "up", "up_blocks.0"),
    ("base", "up", "up_blocks.2"),
    ("refiner", "up", "up_blocks.0"),
]


@slow
@pytest.mark.parametrize(("model", "kind", "path"), PARTS, ids=[f"{model}-{path}" for model, _, path in PARTS])
def test_block_equals_diffusers(pairs, model, kind, path):
    pair = pairs(model)
    given, wanted = pair.seen[path]
    if kind == "down":
        wanted = wanted[1]  # every output of the block, of which the last is its result
    elif kind == "Transformer2DModel":
        wanted = wanted[0]
    got = jax.jit(lambda module, context: ours_for(kind, module, given, context))(
        part(pair.ours, path), pair.conditioning.context
    )
    if kind == "BasicTransformerBlock":
        assert relative_error(got, wanted) < EXACT
    elif kind == "down":
        assert len(got) == len(wanted)
        assert max(relative_error(g, nhwc(w)) for g, w in zip(got, wanted, strict=True)) < EXACT
    else:
        assert relative_error(got, nhwc(wanted)) < EXACT


@pytest.mark.parametrize("name", ["time_embedding", "add_embedding"])
def test_embedding_equals_diffusers(pairs, name):
    pair = pairs("base")
    given, wanted = pair.seen[name]
    assert relative_error(part(pair.ours, name)(jnp.asarray(host(given["sample"]))), wanted) < EXACT


@slow
@pytest.mark.parametrize(
    ("kind", "tensors", "millions"),
    [
        (FULL_BASE, 1680, 2567.46),
        (FULL_REFINER, 1220, None),
        (FULL_SD15, 686, 859.52),
        (FULL_SD21, 686, 865.91),
        (FULL_SD15 | FULL_TOLD, 687, None),
    ],
    ids=["base", "refiner", "SD 1.5", "SD 2.1", "LCM of SD 1.5"],
)
def test_full_size_model_has_the_tensors_of_diffusers(kind, tensors, millions):
    with torch.device("meta"):
        source = UNet2DConditionModel(**kind)
    ours = nnx.eval_shape(lambda: UNet(UNetConfig.from_dict(kind), rngs=nnx.Rngs(0)))
    shapes = {
        checkpoint_name(path): to_pytorch(path[-1], np.broadcast_to(0, leaf.shape)).shape
        for path, leaf in nnx.to_flat_state(nnx.state(ours))
    }
    assert shapes == {name: tuple(tensor.shape) for name, tensor in source.state_dict().items()}
    assert len(shapes) == tensors
    if millions:
        assert sum(map(np.prod, shapes.values())) / 1e6 == pytest.approx(millions, abs=0.005)


def published(kind: dict, side: int) -> list[tuple[str, str]]:
    """Kind and name of what one of eight devices publishes at a step, from shapes alone."""
    mesh = MeshPlan(1, 1, 8).build(jax.devices())
    unet = nnx.eval_shape(lambda: UNet(UNetConfig.from_dict(kind), rngs=nnx.Rngs(0)))
    added = [(2, 1280), (2, 6)] if kind["addition_embed_type"] else [None, None]
    shapes = [(2, side // 8, side // 8, 4), (2, 77, kind["cross_attention_dim"]), *added]

    def call(unet, x, *prompt):
        exchange = Synchronous()
        unet(x, jnp.float32(500), unet.condition(*prompt), exchange)
        return jax.tree.map(lambda leaf: leaf[None], exchange.finish())

    mapped = jax.shard_map(call, mesh=mesh, in_specs=(P(), P(None, PATCH), P(), P(), P()), out_specs=P(PATCH))
    arguments = (shape and jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return list(jax.eval_shape(mapped, unet, *arguments))


@slow
@pytest.mark.parametrize(
    ("kind", "counts"),
    [(FULL_BASE, {"moments": 46, "halo": 39, "kv": 70}), (FULL_SD15, {"moments": 61, "halo": 51, "kv": 16})],
    ids=["SDXL", "SD 1.x"],
)
def test_full_size_model_exchanges_the_tensors_of_the_original(kind, counts):
    layers = {(kind, name.removesuffix(LAST).removesuffix(FIRST)) for kind, name in published(kind, 1024)}
    assert collections.Counter(kind for kind, _ in layers) == counts


@pytest.fixture(scope="module")
def on_bands(pairs):
    """The base model on four bands of rows: synchronous(x), and displaced(x, stale of another call)."""
    pair = pairs("base")
    mesh = MeshPlan(1, 1, 4).build(jax.devices()[:4])
    rows = P(None, PATCH)

    def call(unet, x, conditioning, exchange):
        return unet(x, jnp.float32(500), conditioning, exchange), exchange.finish()

    def synchronous(unet, conditioning, x):
        return call(unet, x, conditioning, Synchronous())

    def displaced(unet, conditioning, x, stale):
        return call(unet, x, conditioning, Displaced(stale))

    def mapped(function, *specs):
        specs = (P(), P(), rows, *specs)
        whole = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=(rows, rows)))
        return lambda *arguments: whole(pair.ours, pair.conditioning, *arguments)

    return mapped(synchronous), mapped(displaced, rows)


def latents(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 16, 8, 4), np.float32)


def test_bands_that_wait_for_each_other_equal_the_whole_image(pairs, on_bands):
    pair = pairs("base")
    run = jax.jit(lambda unet, x, c: unet(x, jnp.float32(500), c, WholeImage()))
    assert relative_error(on_bands[0](latents(0))[0], run(pair.ours, latents(0), pair.conditioning)) < EXACT


def test_displaced_step_with_the_same_input_is_the_synchronous_one(on_bands):
    synchronous, displaced = on_bands
    wanted, stale = synchronous(latents(0))
    got, fresh = displaced(latents(0), stale)
    assert relative_error(got, wanted) < EXACT
    assert fresh.keys() == stale.keys()
    assert max(relative_error(fresh[name], stale[name]) for name in stale) < 1e-4


def test_displaced_step_from_another_input_is_not(on_bands):
    synchronous, displaced = on_bands
    wanted, _ = synchronous(latents(0))
    assert relative_error(displaced(latents(0), synchronous(latents(1))[1])[0], wanted) > 0.01


def test_displaced_step_does_not_wait_for_the_other_bands(on_bands):
    """Of what one band computes in this step nothing reaches the others; of its input, the boundary rows do."""
    synchronous, displaced = on_bands
    _, stale = synchronous(latents(0))

    def changed_rows(*rows: int) -> set[int]:
        changed = latents(0)
        changed[:, rows] = latents(1)[:, rows]
        before, after = (np.asarray(displaced(x, stale)[0]) for x in (latents(0), changed))
        return set(np.flatnonzero(np.any(after != before, axis=(0, 2, 3))))

    assert changed_rows(5, 6) == set(range(4, 8))
    assert changed_rows(7) == set(range(4, 12))


def test_stale_state_has_what_each_exchanging_layer_published(on_bands):
    _, stale = jax.eval_shape(on_bands[0], latents(0))
    norms, attentions, convolutions = (
        [name for kind, name in stale if kind == wanted] for wanted in (MOMENTS, KV, HALO)
    )
    assert len(norms) + len(attentions) + len(convolutions) == len(stale)
    assert all(name.endswith("attn1") for name in attentions)
    assert (
        len(attentions) == (1 + 2) * 2 + (2 + 3) * 1 + 1
    )  # both levels with transformers, down and up, and the middle
    assert all(re.search(r"conv|sampler", name) for name in convolutions)
    assert all(re.search(r"norm", name) for name in norms)


def test_bfloat16_stays_bfloat16(pairs):
    pair = pairs("base")
    short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (pair.ours, pair.conditioning))

    def published(unet, conditioning, x):
        exchange = Synchronous()
        return unet(x, jnp.float32(500), conditioning, exchange), exchange.finish()

    mesh = MeshPlan(1, 1, 2).build(jax.devices()[:2])
    rows = P(None, PATCH)
    mapped = jax.shard_map(published, mesh=mesh, in_specs=(P(), P(), rows), out_specs=(rows, rows))
    output, stale = jax.eval_shape(mapped, *short, latents(0).astype(jnp.bfloat16))
    assert output.dtype == jnp.bfloat16
    for (kind, name), leaf in stale.items():
        assert leaf.dtype == (jnp.float32 if kind == MOMENTS else jnp.bfloat16), name


@pytest.mark.parametrize(
    ("changes", "embedded"),
    [
        ({"act_fn": "gelu"}, "act_fn 'gelu' 'silu'"),
        ({"block_out_chanels": (1,)}, "key 'block_out_chanels'"),
        ({"mid_block_type": None}, "mid_block_type None"),
        ({"down_block_types": ("DownBlock2D",)}, "1 3 blocks"),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D")}, "'AttnUpBlock2D'"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image'"),
        ({"addition_time_embed_dim": None}, "addition_time_embed_dim"),
        ({"time_cond_proj_dim": 3}, "time_cond_proj_dim 3 4"),
        ({"norm_num_groups": 7}, "7 groups"),
    ],
)
def test_unknown_config_raises(changes, embedded):
    with refuses(*embedded.split()):
        UNetConfig.from_dict(BASE | changes)


def test_wrong_number_of_features_names_what_to_check(pairs):
    pair = pairs("base")
    arguments = [jnp.asarray(host(value)) for value in (pair.prompt, pair.pooled[:, :10], pair.ids)]
    with refuses(6, 10, 58):
        jax.eval_shape(pair.ours.condition, *arguments)
