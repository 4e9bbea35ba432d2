"""The objects of the scenes: Fluent Emoji 3D artwork (Microsoft, MIT) under the names that people give it.

    folder = fetch("artwork")                       # npm pack, once
    Artwork(folder).picture("fox")    [h, w, 4]     # RGBA, cut to what is opaque

The artwork comes from the npm package `@lobehub/fluent-emoji-3d`, tags that serve as synonyms from `emojibase-data`.
Nothing of either is part of this repository.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from distrijax.errors import DistriError

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0")
ART, DATA = "lobehub-fluent-emoji-3d-1.1.0.tgz", "emojibase-data-17.0.0.tgz"

OBJECTS: dict[str, str] = {
    # animals
    "dog": "dog face/puppy",
    "cat": "cat face/kitten,kitty",
    "fox": "fox",
    "lion": "lion",
    "tiger": "tiger face",
    "panda": "panda/panda bear",
    "koala": "koala",
    "frog": "frog/toad",
    "rabbit": "rabbit face/bunny",
    "pig": "pig face/piglet",
    "cow": "cow face",
    "monkey": "monkey face",
    "mouse": "mouse face",
    "unicorn": "unicorn",
    "elephant": "elephant",
    "giraffe": "giraffe",
    "penguin": "penguin",
    "owl": "owl",
    "chick": "baby chick/baby chicken",
    "flamingo": "flamingo",
    "parrot": "parrot",
    "turtle": "turtle/tortoise",
    "dinosaur": "T-Rex/t-rex",
    "octopus": "octopus",
    "crab": "crab",
    "fish": "tropical fish",
    "whale": "spouting whale",
    "butterfly": "butterfly",
    "ladybug": "lady beetle/ladybird",
    "bee": "honeybee/honey bee",
    "snail": "snail",
    # plants
    "sunflower": "sunflower",
    "rose": "rose",
    "tulip": "tulip",
    "cactus": "cactus",
    "tree": "deciduous tree",
    "pine tree": "evergreen tree/fir tree",
    "palm tree": "palm tree/palm",
    "mushroom": "mushroom/toadstool",
    # food
    "apple": "red apple",
    "banana": "banana",
    "grapes": "grapes",
    "watermelon": "watermelon",
    "pineapple": "pineapple",
    "strawberry": "strawberry",
    "lemon": "lemon",
    "cherries": "cherries",
    "orange": "tangerine/tangerine",
    "avocado": "avocado",
    "carrot": "carrot",
    "eggplant": "eggplant/aubergine",
    "tomato": "tomato",
    "pizza": "pizza/slice of pizza",
    "hamburger": "hamburger/burger",
    "hot dog": "hot dog",
    "donut": "doughnut/doughnut",
    "ice cream": "soft ice cream/ice cream cone",
    "cupcake": "cupcake/muffin",
    "birthday cake": "birthday cake/cake",
    "cheese": "cheese wedge",
    "cup of coffee": "hot beverage/coffee",
    # vehicles
    "car": "automobile/automobile",
    "bus": "bus",
    "fire truck": "fire engine/fire engine",
    "bicycle": "bicycle/bike",
    "sailboat": "sailboat/sailing boat,boat",
    "rocket": "rocket/spaceship",
    "airplane": "airplane/plane",
    "helicopter": "helicopter",
    "train": "locomotive/steam train,locomotive",
    "ufo": "flying saucer/flying saucer",
    # objects
    "house": "house/home",
    "tent": "tent",
    "balloon": "balloon",
    "gift": "wrapped gift/present",
    "soccer ball": "soccer ball/football",
    "basketball": "basketball",
    "umbrella": "umbrella",
    "guitar": "guitar",
    "camera": "camera",
    "alarm clock": "alarm clock/clock",
    "light bulb": "light bulb/lightbulb,lamp",
    "key": "key",
    "crown": "crown",
    "teddy bear": "teddy bear/teddy",
    "snowman": "snowman",
    "pumpkin": "jack-o-lantern/jack-o-lantern",
    "ghost": "ghost",
    "robot": "robot",
    "alien": "alien",
    "sun": "sun with face",
    "moon": "crescent moon/half moon",
    "cloud": "cloud",
    "rainbow": "rainbow",
    "fire": "fire/flame",
    "diamond ring": "ring/engagement ring",
    "trophy": "trophy/cup",
    # faces
    "smiley": "grinning face with smiling eyes/happy face,smiling face",
    "crying face": "loudly crying face/sad face",
    "angry face": "enraged face",
    "cool face": "smiling face with sunglasses/face with sunglasses",
}
"""What an object is called here: its label in emojibase, and other names for it."""

PLURALS = {
    "mouse": "mice",
    "fish": "fish",
    "cherries": "cherries",
    "grapes": "grapes",
    "cheese": "pieces of cheese",
    "cup of coffee": "cups of coffee",
    "bus": "buses",
    "fox": "foxes",
    "octopus": "octopuses",
    "cactus": "cacti",
    "tomato": "tomatoes",
    "strawberry": "strawberries",
    "butterfly": "butterflies",
    "fire": "fires",
}
UNCOUNTED = frozenset({"grapes", "cherries", "cheese", "fire"})  # said without an article
TAGS = frozenset(
    "puppies leo australia marsupial pork moo antarctica terrapin rex tyrannosaurus fishes beetle bumblebee slug evergreen "
    "fungus grape berry berries cherry frankfurter hotdog sausage nectarine pepperoni slice icecream cafe caffeine tea "
    "pastry cycle yacht aeroplane jet copter locomotive railway saucer camping wrapped surprise futbol hoop music "
    "instrument selfie electric alarm lock unlock royal royalty plush toy boo haunting extraterrestrial sunny "
    "sunshine burn engagement wedding champion prize victory grin grinning laugh sob tears crying sad angry rage "
    "mad sunglasses shades cool".split()
)
"""Tags of emojibase that people would ask for an object with; the others say too little or mean something else."""


def fetch(folder: str | Path) -> Path:
    """The two packages, by npm, in `folder`; nothing happens where they already are.

    Raises DistriError where npm is missing or fails.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not all((folder / name).exists() for name in (ART, DATA)):
        try:
            subprocess.run(["npm", "pack", *PACKAGES], cwd=folder, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise DistriError(
                f"npm pack {' '.join(PACKAGES)} failed ({error}); install npm, or put both archives in {folder}"
            ) from None
    return folder


class Artwork:
    """The pictures and tags of OBJECTS, read from the two archives in `folder` as they are asked for."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.picture = lru_cache(maxsize=None)(self._picture)

    def __reduce__(self):
        """Another process reads the archives itself, once."""
        return _shared, (self.folder,)

    @cached_property
    def _files(self) -> dict[str, bytes]:
        """The archive's webp files by what their code points are without variation selectors."""
        files = {}
        wanted = {_plain(code) for code, _ in self._codes.values()}
        with tarfile.open(self._archive(ART)) as archive:
            for member in archive:
                code = _plain(Path(member.name).stem)
                if member.name.endswith(".webp") and code in wanted:
                    files[code] = archive.extractfile(member).read()
        return files

    @cached_property
    def _codes(self) -> dict[str, tuple[str, list[str]]]:
        """Code points and tags of each of OBJECTS."""
        with tarfile.open(self._archive(DATA)) as archive:
            emoji = json.load(archive.extractfile("package/en/data.json"))
        by_label = {entry["label"]: (entry["hexcode"], entry.get("tags", [])) for entry in emoji}
        return {name: by_label[names.split("/")[0]] for name, names in OBJECTS.items()}

    def _archive(self, name: str) -> Path:
        if not (self.folder / name).exists():
            raise DistriError(f"{self.folder} has no {name}; fetch it: npm pack {' '.join(PACKAGES)}")
        return self.folder / name

    def _picture(self, name: str) -> UInt8[np.ndarray, "h w 4"]:
        """RGBA of one of OBJECTS, cut to where it is not transparent."""
        picture = Image.open(io.BytesIO(self._files[_plain(self._codes[name][0])])).convert("RGBA")
        return np.asarray(picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 12)).getbbox()))

    @cached_property
    def tags(self) -> dict[str, list[str]]:
        """For each of OBJECTS those of TAGS that it shares with no other."""
        own = {name: set(self._codes[name][1]) & TAGS for name in OBJECTS}
        return {
            name: sorted(tag for tag in tags if sum(tag in t for t in own.values()) == 1) for name, tags in own.items()
        }


@lru_cache(maxsize=1)
def _shared(folder: Path) -> Artwork:
    return Artwork(folder)


def names_of(name: str) -> list[str]:
    """What one of OBJECTS may be called."""
    _, _, others = OBJECTS[name].partition("/")
    return [name, *filter(None, others.split(","))]


def plural(name: str) -> str:
    return PLURALS.get(name, f"{name}s")


def _plain(code: str) -> str:
    return code.lower().replace("-fe0f", "")
