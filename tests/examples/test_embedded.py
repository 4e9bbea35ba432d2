"""The scenes that the next embedded model is trained on, their captions, its tokenizer, and the training loop."""

import dataclasses
import io
import json
import pickle
import re
import tarfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from embedded import artwork, backgrounds, perceptual, texts
from embedded.ahead import ahead
from embedded.artwork import ART, DATA, OBJECTS, Artwork, names_of, plural
from embedded.autoencoder import SIDE, VAE, crops, widened
from embedded.caching import FRAMES, batch_of, cache_folder, extend_cache, read_cache
from embedded.captions import PLACE_WORDS, SIZE_WORDS, caption
from embedded.fitting import fit
from embedded.outlines import OTHER_NAMES, OUTLINES, mask
from embedded.scene import COLOURS, Scene, Thing, draw, sample_scene, scene_of
from embedded.texts import KINDS, Reader, kinds_of_cells, lesson, reader_loss
from embedded.tokens import english_words, lengths, write_tokenizers
from flax import nnx
from PIL import Image

from distrijax.errors import DistriError
from distrijax.models.layers import Linear
from distrijax.models.vae import AutoencoderKL
from distrijax.parallel.exchange import WholeImage

CODES = {name: f"1F{i:03X}" for i, name in enumerate(OBJECTS)}


@pytest.fixture(scope="module")
def art(tmp_path_factory) -> Artwork:
    """Stand-ins for the two packages: ellipses in the place of artwork."""
    folder = tmp_path_factory.mktemp("packages")
    images = {f"package/assets/{code.lower()}.webp": _ellipse(i) for i, code in enumerate(CODES.values())}
    labels = {name: names.split("/")[0] for name, names in OBJECTS.items()}
    emoji = [{"label": labels[name], "hexcode": code, "tags": ["animal", "wizard"]} for name, code in CODES.items()]
    emoji[0]["tags"].append("puppies")
    _pack(folder / ART, images)
    _pack(folder / DATA, {"package/en/data.json": json.dumps(emoji).encode()})
    return Artwork(artwork.fetch(folder))


def _ellipse(i: int) -> bytes:
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[np.hypot(y, 1.4 * x) < 0.9] = (2 * i, 255 - 2 * i, 90, 255)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "webp", lossless=True)
    return content.getvalue()


def _pack(file, contents: dict[str, bytes]) -> None:
    with tarfile.open(file, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_a_scene_is_drawn_the_same_each_time_and_other_scenes_are_not(art):
    def example(index):
        scene, rng = scene_of(0, index)
        return caption(scene, art, rng), draw(scene, art, 64, 96, rng)

    first, again, other = example(3), example(3), example(4)
    assert first[0] == again[0]
    np.testing.assert_array_equal(first[1], again[1])
    assert first[1].shape == (64, 96, 3) and not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("kind", [*backgrounds.PATTERNS, *backgrounds.LANDSCAPES])
def test_every_background_is_drawn_alike_at_every_size(kind):
    background = backgrounds.Background(kind, "blue" if kind in backgrounds.PATTERNS else "")
    small, large = (
        backgrounds.draw_background(background, n, n, np.random.default_rng(5)).reshape(16, n // 16, 16, n // 16, 3)
        for n in (64, 256)
    )
    difference = np.abs(small.mean((1, 3)) - large.mean((1, 3)))
    assert difference.mean() < 3  # of 255


@pytest.mark.parametrize("kind", OUTLINES)
def test_a_shape_has_its_colour_where_it_was_placed(art, kind):
    thing = Thing(kind, "red", "", "right", 0.5, 0.78, 0.16)
    scene = Scene((thing,), "placed", backgrounds.Background("plain", "white"))
    pixels = draw(scene, art, 128, 128, np.random.default_rng(0)).astype(int)
    red = np.abs(pixels - COLOURS["red"]).max(-1) < 30
    y, x = np.argwhere(red).mean(0) / 128
    area = mask(kind, 64).mean() * 0.32**2
    assert abs(y - 0.5) < 0.06 and abs(x - 0.78) < 0.06
    assert 0.7 * area < red.mean() < 1.2 * area


def test_captions_name_what_is_drawn_and_only_rarely_nothing(art):
    empty = 0
    for index in range(300):
        scene, rng = scene_of(1, index)
        words = caption(scene, art, rng)
        empty += not words
        if words:
            for thing in scene.things:
                names = [*names_of(thing.kind), *art.tags[thing.kind]] if thing.kind in OBJECTS else [thing.kind]
                names += [plural(thing.kind), OTHER_NAMES.get(thing.kind, thing.kind)]
                assert any(name in words for name in names), words
                assert thing.colour.replace("gray", "") in words, words
                for said, meant in ((thing.place, PLACE_WORDS), (thing.size, SIZE_WORDS)):
                    assert not said or any(word in words for word in meant[said]), words
    assert 0 < empty < 20


def test_one_combination_in_ten_is_held_out_whatever_its_wording():
    scenes = [sample_scene(np.random.default_rng(i)) for i in range(1500)]
    combined = [s for s in scenes if s.layout != "alone" or s.things[0].colour]
    assert 0.06 < np.mean([scene.held_out for scene in combined]) < 0.14
    assert not any(scene.held_out for scene in scenes if scene not in combined)
    assert scene_of(0, 5, held_out=True)[0].held_out and not scene_of(0, 5)[0].held_out


def test_cells_tell_the_kind_of_thing_that_they_show():
    thing = Thing("star", "red", "large", "top left", 0.22, 0.22, 0.16)
    cells = kinds_of_cells(Scene((thing,), "placed", backgrounds.Background("sky"))).reshape(8, 8)
    assert cells[1, 1] == KINDS.index("star") and not cells[4:].any() and not cells[:, 4:].any()


def test_the_tokenizer_has_one_token_for_each_word_of_a_caption_and_spells_all_others(art, tmp_path):
    first, second = write_tokenizers(art, tmp_path, merges=5)
    told = [caption(scene, art, rng) for scene, rng in (scene_of(0, i) for i in range(100))]
    ids = first(told)
    words = [len(re.findall("[a-z]+|[0-9]|[,-]", text)) for text in told]
    np.testing.assert_array_equal(lengths(ids, first.eos_token_id), np.array(words) + 2)
    strange = second(["a zebra, Ñandú 狐狸 🦊"])
    assert 8 < lengths(strange, second.eos_token_id)[0] < 40
    assert strange.max() == second.eos_token_id < 32768  # the cache keeps ids in 16 bits
    assert "wizard" in english_words(art)


def test_a_step_of_training_lowers_the_loss_of_the_text_encoders(art, tmp_path, monkeypatch):
    shallow = partial(dataclasses.replace, num_hidden_layers=1)
    monkeypatch.setattr(texts, "text_config", lambda *args, make=texts.text_config: shallow(make(*args)))
    tokenizers = write_tokenizers(art, tmp_path, merges=0)
    batch = lesson(0, art, tokenizers, (), 0)
    graph, state = nnx.split(Reader(tokenizers, rngs=nnx.Rngs(0)))
    loss = jax.jit(jax.value_and_grad(lambda state: reader_loss(nnx.merge(graph, state), jax.random.key(0), *batch)))
    with jax.numpy_dtype_promotion("standard"):
        before, gradient = loss(state)
        after, _ = loss(jax.tree.map(lambda value, slope: value - 0.001 * slope, state, gradient))
    assert after < before


def test_training_goes_on_from_its_checkpoint_and_hands_back_the_average(tmp_path):
    def loss(layer, key, x):
        return jnp.mean(jnp.square(layer(x) - 3.0))

    def train(average):
        return fit(
            Linear(2, 1, rngs=nnx.Rngs(0)),
            loss,
            lambda step: (np.ones((8, 2), np.float32),),
            minutes=0,  # one step
            learning_rate=20.0,
            average=average,
            file=tmp_path / "layer.npz",
        )

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        first, second = train(0.0), train(0.0)
        averaged = train(1.0)
    ones = np.ones((8, 2), np.float32)
    assert loss(second, None, ones) < loss(first, None, ones) < loss(Linear(2, 1, rngs=nnx.Rngs(0)), None, ones)
    with np.load(tmp_path / "layer.npz") as kept:
        assert int(kept["step"]) == 3
    moved = second.bias.get_value() - averaged.bias.get_value()
    assert moved != 0  # a third of the third step


def test_a_cache_is_read_as_it_was_written_and_belongs_to_one_encoder(art, tmp_path, monkeypatch):
    monkeypatch.setattr("embedded.caching.CHUNK", 16)

    class Encoder(nnx.Module):
        def __init__(self, value):
            self.encoder, self.quant_conv = nnx.Param(np.float32([value])), nnx.Param(np.zeros(1, np.float32))

        def encode(self, pixels, exchange):
            return (pixels[:, ::8, ::8, :1].repeat(4, -1),)

    folder = cache_folder(tmp_path, Encoder(1))
    assert folder != cache_folder(tmp_path, Encoder(2))
    tokenizers = write_tokenizers(art, tmp_path, merges=0)
    extend_cache(folder, Encoder(1), art, tokenizers, (), seed=0, wanted={"192x320": 1, "512": 1})
    cache = read_cache(folder, list(FRAMES))
    latents, ids, ids_2, time_ids = batch_of(cache, 2.0, 0, 0, 5)
    assert latents.shape in ((5, 24, 40, 4), (5, 32, 32, 4)) and ids.shape == ids_2.shape == (5, 77)
    assert (cache["512"]["time_ids"][:, [0, 1, 4, 5]] == 512).all() and cache["512"]["time_ids"][:, 2:4].max() <= 256
    np.testing.assert_array_equal(time_ids[:, :2], time_ids[:, 4:])


def test_an_autoencoder_of_twice_as_many_channels_gives_the_same_and_its_pairs_differ():
    blocks = dict(down_block_types=VAE.down_block_types[:2], up_block_types=VAE.up_block_types[:2])
    vae = AutoencoderKL(dataclasses.replace(VAE, block_out_channels=(8, 8), **blocks), rngs=nnx.Rngs(0))
    wide = widened(vae, 0)
    trip = jax.jit(lambda vae, x: vae.decode(vae.encode(x, WholeImage())[0], WholeImage()))
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(trip(wide, pixels), trip(vae, pixels), atol=2e-5)
    kernel = np.asarray(wide.decoder.conv_in.kernel.get_value())
    assert kernel.shape[-1] == 16
    inner = np.asarray(wide.encoder.mid_block.resnets[0].conv1.kernel.get_value())
    assert not np.allclose(inner[:, :, ::2], inner[:, :, 1::2])


def test_batches_are_the_same_when_another_process_draws_them(art):
    make = partial(crops, artwork=art, seed=0, count=2)
    (near,) = ahead(make, [3], workers=0)
    assert near.shape == (2, SIDE, SIDE, 3)
    np.testing.assert_array_equal(near, pickle.loads(pickle.dumps(make))(3))


def test_lpips_reads_arrays_and_nothing_else(tmp_path):
    attack = b"cos\nsystem\n(S'true'\ntR."
    _pack(tmp_path / "weights.tar.gz", {perceptual.MEMBER: attack})
    with pytest.raises(DistriError, match="os.system"):
        perceptual.read_weights(tmp_path / "weights.tar.gz")


def test_lpips_is_nothing_for_equal_images_and_grows_with_their_difference():
    rng = np.random.default_rng(0)
    weights, channels = {}, 3
    for i, (side, features) in enumerate(((11, 64), (5, 8), (3, 8), (3, 8), (3, 8))):
        weights |= {f"conv{i}": rng.normal(size=(side, side, channels, features)).astype(np.float32) / side}
        weights |= {f"bias{i}": np.zeros(features, np.float32), f"linear{i}": np.ones(features, np.float32)}
        channels = features
    a, noise = rng.uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32), rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
    distance = jax.jit(perceptual.lpips)
    same, near, far = (np.asarray(distance(weights, a, a + np.float32(s) * noise)) for s in (0, 0.05, 0.5))
    assert np.allclose(same, 0, atol=1e-6) and (near < far).all() and (near > 0).all()
