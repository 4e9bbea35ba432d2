"""The training images of the default model, and the check that looks for a caption's shapes in pixels."""

from __future__ import annotations

import dataclasses

import check_scenes
import numpy as np
import pytest
from facts import refuses, says

from distrijax.cli.fidelity import scenes

SIZE = (96, 96)
CAPTION_0 = "a large black circle at the top right and a red diamond in the center, on an orange dotted background"


@pytest.fixture(scope="module")
def held_out():
    return [scenes.held_out_example(0, index, *SIZE) for index in range(200)]


def share_found(pairs) -> float:
    return float(np.mean([one for image, scene in pairs for one in scenes.found(image, scene)]))


def disc_scene(colour="red", place="on the left", background="gray"):
    return scenes.Scene((scenes.Shape("circle", colour, "medium", place),), background, "plain")


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (256, 256), (128, 256), (192, 104)])
def test_drawn_images_pass_their_own_check(size):
    pairs = [(image, scene) for image, _, scene in (scenes.held_out_example(1, i, *size) for i in range(60))]
    assert share_found(pairs) >= 0.98


def test_float_images_are_judged_like_bytes(held_out):
    for image, _, scene in held_out[:20]:
        assert scenes.found(image / np.float32(255), scene) == scenes.found(image, scene)


def test_noise_and_moderate_shifts_do_not_hide_shapes(held_out):
    rng = np.random.default_rng(0)
    noisy = [(np.clip(p + rng.normal(0, 20, p.shape), 0, 255).astype(np.uint8), s) for p, _, s in held_out]
    shifted = [(np.roll(p, (5, -5), (0, 1)), s) for p, _, s in held_out]
    assert share_found(noisy) >= 0.95
    assert share_found(shifted) >= 0.95


def test_other_captions_are_not_found(held_out):
    pairs = [(held_out[i][0], held_out[i - 1][2]) for i in range(len(held_out))]
    assert share_found(pairs) < 0.1


def test_moved_shapes_are_not_found(held_out):
    pairs = [(np.roll(p, SIZE[0] * 3 // 10, 0), s) for p, _, s in held_out]
    assert share_found(pairs) < 0.1


@pytest.mark.parametrize("colour", [*scenes.COLOURS.values(), *(t for two in scenes.BACKGROUNDS.values() for t in two)])
def test_constant_images_show_nothing(held_out, colour):
    constant = np.broadcast_to(np.uint8(colour), (*SIZE, 3))
    assert not any(one for _, _, scene in held_out for one in scenes.found(constant, scene))


def test_broken_images_show_nothing(held_out):
    rng = np.random.default_rng(0)
    for image in (rng.random((*SIZE, 3)), np.full((*SIZE, 3), np.nan)):
        assert not any(one for _, _, scene in held_out[:50] for one in scenes.found(image, scene))


def test_the_colour_must_be_in_its_place():
    rng = np.random.default_rng(0)
    for there in scenes.PLACES:
        image = scenes.draw(disc_scene(place=there), *SIZE, rng)
        seen = [here for here in scenes.PLACES if scenes.found(image, disc_scene(place=here)) == [True]]
        assert seen == [there]


def test_each_colour_is_told_from_all_others_on_every_background():
    rng = np.random.default_rng(0)
    for background in scenes.BACKGROUNDS:
        for colour in set(scenes.COLOURS) - {background}:
            image = scenes.draw(disc_scene(colour, background=background), *SIZE, rng)
            # The background asked for is another one: it is not what the check judges.
            seen = [c for c in scenes.COLOURS if scenes.found(image, disc_scene(c, background="pink")) == [True]]
            assert seen == [colour]


def test_a_speck_of_the_colour_is_not_enough():
    image = scenes.draw(disc_scene(), *SIZE, np.random.default_rng(0))
    blank = scenes.draw(scenes.Scene((), "gray", "plain"), *SIZE, np.random.default_rng(0))
    speck = blank.copy()
    speck[46:50] = image[46:50]
    assert scenes.found(image, disc_scene()) == [True]
    assert scenes.found(speck, disc_scene()) == [False]


def test_training_never_sees_a_held_out_scene(held_out):
    training = [scenes.example(0, index, 64, 64)[2] for index in range(1000)]
    assert not any(scene.held_out for scene in training)
    assert all(scene.held_out for _, _, scene in held_out)
    keys = [
        {frozenset((s.colour, s.kind, s.place) for s in scene.shapes) for scene in group}
        for group in (training, [scene for _, _, scene in held_out])
    ]
    assert not keys[0] & keys[1]


def test_holding_out_ignores_what_the_caption_may_leave_out():
    scene = next(s for s in (scenes.sample_scene(np.random.default_rng(i)) for i in range(99)) if len(s.shapes) == 3)
    other = dataclasses.replace(scene, shapes=scene.shapes[::-1], background="gray", texture="dotted")
    assert other.held_out == scene.held_out
    flags = [scenes.sample_scene(np.random.default_rng(i)).held_out for i in range(2000)]
    assert 0.07 < np.mean(flags) < 0.13


def test_the_same_index_gives_the_same_example():
    first, again, another = (scenes.example(5, index, *SIZE) for index in (7, 7, 8))
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1:] == again[1:] != another[1:]
    assert scenes.example(5, 7, 64, 128)[1:] == first[1:]


def test_examples_do_not_change_between_releases():
    """A resumed or repeated training would otherwise see other images than the published model did."""
    image, caption, scene = scenes.example(0, 0, 64, 64)
    assert (caption, scene.held_out) == (CAPTION_0, False)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8


def test_captions_name_every_shape_and_use_only_the_vocabulary():
    vocabulary = set(scenes.all_captions_vocabulary())
    used = set()
    for index in range(3000):
        rng = np.random.default_rng([2, index])
        scene = scenes.sample_scene(rng)
        words = scenes.caption(scene, rng)
        for shape in scene.shapes:
            assert f"{shape.colour} {shape.kind} {shape.place}" in words
        used |= set(words.replace(",", " ,").split())
    assert used == vocabulary


def test_shapes_of_a_scene_differ_in_place_and_colour():
    for index in range(500):
        scene = scenes.sample_scene(np.random.default_rng(index))
        assert len({s.place for s in scene.shapes}) == len({s.colour for s in scene.shapes}) == len(scene.shapes)
        assert scene.background not in {s.colour for s in scene.shapes}


@pytest.mark.parametrize("kind", scenes.OUTLINES)
def test_areas_are_those_of_the_drawn_shapes(kind):
    y, x = (np.mgrid[-160:160, -160:160] / 100).astype(np.float32)
    drawn = np.mean(scenes._distance(kind, y, x) < 0) * 3.2**2
    assert drawn * scenes.SIZES["large"] ** 2 == pytest.approx(
        scenes.Shape(kind, "red", "large", "at the top").area, rel=0.02
    )


def test_sizes_that_cannot_be_drawn_are_refused():
    for size in ((100, 64), (64, 56), (1032, 64)):
        with refuses("multiples of 8", 64, 1024, error=ValueError):
            scenes.example(0, 0, *size)
    with refuses("[height, width, 3]", error=ValueError):
        scenes.found(np.zeros((64, 64)), disc_scene())


def test_copies_beside_the_shapes_are_counted():
    scene, rng = disc_scene(), np.random.default_rng(0)
    image = scenes.draw(scene, *SIZE, rng)
    assert scenes.copies(image, scene) == 0
    twice = image.copy()
    twice[:20, -20:] = scenes.COLOURS["red"]
    assert scenes.copies(twice, scene) == 1
    twice[-3:, -3:] = scenes.COLOURS["red"]  # too small for a copy
    assert scenes.copies(twice, scene) == 1
    twice[-20:, -20:] = scenes.COLOURS["blue"]
    assert scenes.copies(twice, scene) == 1


def test_sharpness_is_the_largest_difference_of_edges():
    stripes = np.zeros((64, 64, 3), np.float32)
    stripes[:, ::8] = 0.3
    assert scenes.sharpness(stripes) == pytest.approx(0.3)
    assert scenes.sharpness(np.full((64, 64, 3), 0.7)) == 0


class StandInPipeline:
    """Draws the scenes that belong to the prompts, except those whose position in the whole run is in `blank`."""

    def __init__(self, size, blank=()):
        self.examples = {}
        self.calls = []
        for index in range(64):
            image, caption, _ = scenes.held_out_example(0, index, *size)
            self.examples[caption] = np.zeros_like(image) if index in blank else image

    def __call__(self, prompts, seed):
        self.calls.append((len(prompts), seed))
        return np.stack([self.examples[prompt] for prompt in prompts]) / 255


def test_the_check_counts_shapes_and_captions():
    generate = StandInPipeline(SIZE, blank={3})
    results = check_scenes.check(generate, 10, 4, *SIZE, seed=0)
    shapes, captions = check_scenes.rates(results)
    total, lost = sum(len(r.found) for r in results), len(results[3].found)
    assert generate.calls == [(4, 0), (4, 4), (4, 8)]
    assert (shapes, captions) == pytest.approx(((total - lost) / total, 0.9))
    assert f"in: {results[3].caption}" in check_scenes.report(results)


def test_the_script_writes_its_sheet_and_fails_below_the_asked_share(tmp_path, monkeypatch, capsys):
    arguments = ["--captions", "5", "--batch", "2", "--image-size", "64", "--at-least", "0.8"]
    arguments += ["--contact-sheet", str(tmp_path / "sheet.png")]
    monkeypatch.setattr(check_scenes, "pipeline_generator", lambda args: StandInPipeline(args.image_size))
    assert check_scenes.main(arguments) == 0
    says(capsys.readouterr().out, "100.0%")
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    monkeypatch.setattr(
        check_scenes, "pipeline_generator", lambda args: StandInPipeline(args.image_size, blank=range(5))
    )
    assert check_scenes.main(arguments) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--image-size", "250"],
        ["--image-size", "64", "64", "64"],
        ["--captions", "0"],
        ["--at-least", "2"],
        ["--at-least", "nan"],
        ["--contact-sheet", "sheet.txt"],
        ["--contact-sheet", "/no/such/folder/sheet.png"],
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, monkeypatch, capsys):
    monkeypatch.setattr(check_scenes, "pipeline_generator", lambda args: pytest.fail("an image was generated"))
    with pytest.raises(SystemExit) as error:
        check_scenes.main(arguments)
    assert error.value.code == 2
    says(capsys.readouterr().err, arguments[0])
