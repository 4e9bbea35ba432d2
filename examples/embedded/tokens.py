"""A tokenizer for free English: every word of the captions is one token, other common words are few, and bytes spell the rest."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
from tiny_tokenizer import BYTES, count_words, learn_merges, merge, write_tokenizer

from distrijax.models.tokenizer import BOS, EOS, WORD_END, CLIPTokenizer
from embedded import backgrounds, captions
from embedded.artwork import DATA, OBJECTS, TAGS, Artwork, names_of, plural
from embedded.outlines import OTHER_NAMES, OUTLINES
from embedded.scene import COLOURS, PLACES

OTHER_MERGES = 1400  # for words that no caption has
SMALL = "a an the and , grey plain on in with to left right of background table wall next beside"
FREQUENT = "what who is are it its has have i you he she they we my your for from by near behind between many some lots of very"


def caption_words() -> list[str]:
    """Every phrase out of which captions are made."""
    phrases = [*OBJECTS, *map(plural, OBJECTS), *TAGS, *OUTLINES, *map(plural, OUTLINES), *OTHER_NAMES.values()]
    phrases += [*COLOURS, *backgrounds.TONES, *PLACES, *captions.PRAISE, *captions.BEGINNINGS, *captions.ENDINGS]
    phrases += [other for name in OBJECTS for other in names_of(name)]
    tables = ("SIZE", "PLACE", "LANDSCAPE", "PATTERN", "RELATION")
    for table in (getattr(captions, f"{name}_WORDS") for name in tables):
        phrases += [word for words in table.values() for word in words]
    phrases += [str(word) for words in captions.NUMBERS.values() for word in words]
    return [
        *phrases,
        SMALL,
        FREQUENT,
    ]


def english_words(artwork: Artwork) -> tuple[str, ...]:
    """Words of the names and tags of all emoji, the most frequent first: what people talk about, and a few thousand of it."""
    with tarfile.open(artwork.folder / DATA) as archive:
        emoji = json.load(archive.extractfile("package/en/data.json"))
    texts = (" ".join([entry["label"], *entry.get("tags", [])]).lower() for entry in emoji if entry.get("group") != 1)
    counted = Counter(word for text in texts for word in re.findall("[a-z]{3,}", text))
    return tuple(sorted(counted, key=lambda word: (-counted[word], word)))


def write_tokenizers(artwork: Artwork, folder: Path, merges: int = OTHER_MERGES) -> list[CLIPTokenizer]:
    """Both tokenizers of the pipeline, in `folder`/tokenizer and `folder`/tokenizer_2, which differ in their padding."""
    learnt = learn_merges(count_words(caption_words()))
    learnt += more_merges(count_words(english_words(artwork)), learnt, merges)
    symbols = BYTES + [byte + WORD_END for byte in BYTES] + ["".join(pair) for pair in learnt] + [BOS, EOS]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    for name, pad in (("tokenizer", EOS), ("tokenizer_2", "!")):
        write_tokenizer(folder / name, vocabulary, learnt, pad)
    return read_tokenizers(folder)


def read_tokenizers(folder: Path) -> list[CLIPTokenizer]:
    return [CLIPTokenizer.from_folder(folder / name) for name in ("tokenizer", "tokenizer_2")]


def more_merges(words: Counter[str], learnt: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """The `count` merges of the most frequent pairs that are left of `words` after the merges `learnt`."""
    ranks = {pair: rank for rank, pair in enumerate(learnt)}
    split = {word: _merged(word, ranks) for word in words}
    found = []
    while len(found) < count:
        pairs = Counter()
        for word, symbols in split.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        found.append(best)
        split = {word: merge(symbols, best) if best[0] in symbols else symbols for word, symbols in split.items()}
    return found


def _merged(word: str, ranks: dict[tuple[str, str], int]) -> tuple[str, ...]:
    """A word's symbols after all merges that apply, the first learnt first."""
    symbols = (*word[:-1], word[-1] + WORD_END)
    while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
        symbols = merge(symbols, min(pairs, key=ranks.__getitem__))
    return symbols


def lengths(ids: np.ndarray, end: int) -> np.ndarray:
    """How many tokens of each row come before the padding, the end of the text included."""
    return np.argmax(ids == end, axis=1) + 1
