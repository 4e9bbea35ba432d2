"""Scenes in the words of people: with or without article, place, size, colour and background, in several orders."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from embedded.artwork import UNCOUNTED, Artwork, names_of, plural
from embedded.backgrounds import LANDSCAPES, Background
from embedded.outlines import OTHER_NAMES
from embedded.scene import RELATIONS, Scene, Thing

SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}
PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "top left": ("in the top left corner", "at the top left", "in the upper left", "top left"),
    "top": ("at the top", "at the top center", "near the top"),
    "top right": ("in the top right corner", "at the top right", "in the upper right", "top right"),
    "left": ("on the left", "on the left side", "at the left"),
    "center": ("in the center", "in the middle", "in the centre", "centered"),
    "right": ("on the right", "on the right side", "at the right"),
    "bottom left": ("in the bottom left corner", "at the bottom left", "in the lower left", "bottom left"),
    "bottom": ("at the bottom", "at the bottom center", "near the bottom"),
    "bottom right": ("in the bottom right corner", "at the bottom right", "in the lower right", "bottom right"),
}
LANDSCAPE_WORDS: dict[str, tuple[str, ...]] = {
    "meadow": ("in a meadow", "on the grass", "in a green field", "on a hill", "in the park", "outdoors"),
    "beach": ("on the beach", "at the beach", "on the sand by the sea", "on a sunny beach"),
    "sea": ("in the sea", "on the ocean", "on the water", "at sea", "in the water"),
    "snow": ("in the snow", "in winter", "on a snowy hill", "in a snowy landscape"),
    "desert": ("in the desert", "on a sand dune", "in a sandy desert"),
    "table": ("on a wooden table", "on a table", "on a brown table", "on the desk"),
    "sky": ("in the sky", "in the clouds", "in a blue sky", "flying in the sky"),
    "night": ("at night", "under the stars", "in the night", "in a starry night"),
    "space": ("in space", "in outer space", "among the stars", "in the galaxy"),
}
PATTERN_WORDS = {
    "gradient": ("gradient",),
    "striped": ("striped",),
    "dotted": ("dotted", "polka dot"),
    "checkered": ("checkered",),
}
PRAISE = ("cute", "beautiful", "nice", "pretty", "lovely", "funny", "happy", "shiny", "adorable", "single", "simple")
BEGINNINGS = (
    "a picture of",
    "picture of",
    "an image of",
    "an illustration of",
    "a drawing of",
    "a photo of",
    "a 3d render of",
    "an emoji of",
)
ENDINGS = ("high quality", "3d render", "detailed", "4k", "digital art", "emoji", "minimalist", "cartoon", "colorful")
RELATION_WORDS = {
    "to the left of": ("to the left of", "left of"),
    "to the right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "in front of": ("in front of",),
}
NUMBERS = {2: ("two", "2", "a pair of"), 3: ("three", "3")}
EMPTY = 0.02


def caption(scene: Scene, artwork: Artwork, rng: np.random.Generator, other_words: tuple[str, ...] = ()) -> str:
    """One of the many ways to tell the scene; now and then nothing.

    other_words: of which one in a dozen captions has one or two, as words that mean nothing to the model.
    """
    if rng.random() < EMPTY:
        return ""
    words = _things(scene, artwork, rng)
    where = _background(scene.background, rng)
    if where and not _hidden(scene, rng):
        words = _with_background(words, where, scene, rng)
    if rng.random() < 0.12:
        words = f"{_pick(BEGINNINGS, rng)} {words}"
    if rng.random() < 0.1:
        words = f"{words}, {_pick(ENDINGS, rng)}"
    if other_words and rng.random() < 0.08:
        words = f"{words}, {' '.join(_pick(other_words, rng) for _ in range(rng.integers(1, 3)))}"
    return words


def _hidden(scene: Scene, rng: np.random.Generator) -> bool:
    """Whether the background is left to the model: often where it is plain, seldom where it is the scene."""
    return rng.random() < {"plain": 0.45, "gradient": 0.4}.get(scene.background.kind, 0.15)


def _with_background(words: str, where: str, scene: Scene, rng: np.random.Generator) -> str:
    join = ", " if scene.layout == "placed" or rng.random() < 0.2 else " "
    if rng.random() < 0.12:
        return f"{where}, {words}"
    return f"{words}{join}{where}"


def _things(scene: Scene, artwork: Artwork, rng: np.random.Generator) -> str:
    things = scene.things
    if scene.layout == "count":
        return _several(things[0], len(things), artwork, rng)
    if scene.layout in RELATIONS:
        first, second = (_thing(thing, artwork, rng) for thing in things)
        return f"{first} {_pick(RELATION_WORDS[scene.layout], rng)} {second}"
    if scene.layout == "row":
        phrases = [_thing(thing, artwork, rng) for thing in things]
        if len(phrases) == 2 and rng.random() < 0.25:
            return f"{phrases[0]} {_pick(('next to', 'beside', 'with'), rng)} {phrases[1]}"
        return _listed(phrases)
    order = rng.permutation(len(things))
    return _listed([_placed(things[i], artwork, rng) for i in order])


def _listed(phrases: list[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _placed(thing: Thing, artwork: Artwork, rng: np.random.Generator) -> str:
    phrase = _thing(thing, artwork, rng)
    if not thing.place:
        return phrase
    place = _pick(PLACE_WORDS[thing.place], rng)
    return f"{place}, {phrase}" if rng.random() < 0.08 else f"{phrase} {place}"


def _thing(thing: Thing, artwork: Artwork, rng: np.random.Generator) -> str:
    name = _name(thing, artwork, rng)
    article = "" if thing.kind in UNCOUNTED or rng.random() < 0.25 else "the" if rng.random() < 0.06 else "a"
    return _joined(article, *_adjectives(thing, rng), name)


def _several(thing: Thing, count: int, artwork: Artwork, rng: np.random.Generator) -> str:
    name = plural(thing.kind)
    return _joined(_pick(NUMBERS[count], rng), *_adjectives(thing, rng), name)


def _adjectives(thing: Thing, rng: np.random.Generator) -> list[str]:
    size = _pick(SIZE_WORDS[thing.size], rng) if thing.size else ""
    praise = _pick(PRAISE, rng) if rng.random() < 0.08 else ""
    colour = "grey" if thing.colour == "gray" and rng.random() < 0.3 else thing.colour
    return [praise, size, colour]


def _name(thing: Thing, artwork: Artwork, rng: np.random.Generator) -> str:
    if thing.is_shape:
        return OTHER_NAMES[thing.kind] if thing.kind in OTHER_NAMES and rng.random() < 0.1 else thing.kind
    names, tags = names_of(thing.kind), artwork.tags[thing.kind]
    if tags and rng.random() < 0.05:
        return _pick(tags, rng)
    return names[0] if rng.random() < 0.7 else _pick(names, rng)


def _background(background: Background, rng: np.random.Generator) -> str:
    if background.kind == "table" and background.colour:
        return f"on {_joined('a', background.colour, 'table')}"
    if background.kind in LANDSCAPES:
        return _pick(LANDSCAPE_WORDS[background.kind], rng)
    pattern = _pick(PATTERN_WORDS[background.kind], rng) if background.kind in PATTERN_WORDS else ""
    if background.kind == "plain" and rng.random() < 0.15:
        pattern = "plain"
    colour = "grey" if background.colour == "gray" and rng.random() < 0.3 else background.colour
    words = (pattern, colour) if rng.random() < 0.7 else (colour, pattern)
    match int(rng.integers(0, 8)):
        case 0:
            return _joined("with a", *words, "background")
        case 1:
            return _joined(*words, "background")
        case 2 if background.kind == "plain":
            return f"on {colour}"
        case 3 if background.kind == "plain":
            return _joined("in front of a", colour, "wall")
    return f"on {_joined('a', *words, 'background')}"


def _joined(*words: str) -> str:
    """Words that are there, and "an" where "a" is followed by a vowel."""
    kept = " ".join(word for word in words if word).split(" ")
    for i, (word, following) in enumerate(pairwise(kept)):
        if word == "a" and following[0] in "aeio":
            kept[i] = "an"
    return " ".join(kept)


def _pick(choices, rng: np.random.Generator) -> str:
    return str(choices[int(rng.integers(len(choices)))])
