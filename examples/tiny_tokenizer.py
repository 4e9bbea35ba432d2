"""Trains a small CLIP tokenizer for the embedded default model: bytes, and every word of the captions as one token.

The ids are in CLIP's order: 256 bytes, 256 bytes that end a word, merges, <|startoftext|>, <|endoftext|>. Hence "!", with
which SDXL's second tokenizer pads, is 0, and the end of the text has the largest id, as the text encoders expect.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

from distrijax.errors import DistriError
from distrijax.models.tokenizer import BOS, DEFAULT_LENGTH, EOS, WORD_END, CLIPTokenizer, byte_pair_encoder

PRINTABLE = [chr(code) for first, last in ((33, 126), (161, 172), (174, 255)) for code in range(first, last + 1)]
BYTES = PRINTABLE + [chr(256 + n) for n in range(256 - len(PRINTABLE))]
"""Characters that represent the 256 bytes, in CLIP's order; printable bytes represent themselves."""


def train_tokenizer(texts: Iterable[str], folder: str | Path, *, vocab_size: int, pad_token: str) -> CLIPTokenizer:
    """Trains a tokenizer, writes its files as SDXL's are, and reads them back.

    Args:
        texts: Texts whose words each become one token.
        folder: Where to write vocab.json, merges.txt and the settings.
        vocab_size: The largest number of tokens.
        pad_token: "!" or "<|endoftext|>".

    Raises:
        DistriError: When `vocab_size` is too small for the words.
    """
    merges = learn_merges(count_words(texts))
    symbols = BYTES + [byte + WORD_END for byte in BYTES] + ["".join(merge) for merge in merges] + [BOS, EOS]
    if len(symbols) > vocab_size:
        raise DistriError(f"vocab_size is {vocab_size}; the words of these texts need {len(symbols)} tokens")
    write_tokenizer(Path(folder), {symbol: index for index, symbol in enumerate(symbols)}, merges, pad_token)
    return CLIPTokenizer.from_folder(folder)


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, after CLIP's normalisation, in letters that stand for bytes."""
    pipeline = byte_pair_encoder({EOS: 0}, [])
    return Counter(
        word
        for text in texts
        for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(pipeline.normalizer.normalize_str(text))
    )


def learn_merges(words: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merges the most frequent pair until every word is one symbol; ties go to the alphabetically first pair.

    References:
        Byte pair encoding, Sennrich et al., arXiv 1508.07909, here without early stopping.
    """
    split = {word: (*word[:-1], word[-1] + WORD_END) for word in words}
    merges = []
    while True:
        pairs = Counter()
        for word, symbols in split.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: merge(symbols, best) for word, symbols in split.items()}


def merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Joins each occurrence of the pair, from the left."""
    merged: list[str] = []
    rest = list(symbols)
    while rest:
        width = 2 if tuple(rest[:2]) == pair else 1
        merged.append("".join(rest[:width]))
        rest = rest[width:]
    return tuple(merged)


def write_tokenizer(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], pad_token: str) -> None:
    """Writes the four files of a tokenizer of SDXL."""
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": pad_token, "unk_token": EOS}
    settings = {"model_max_length": DEFAULT_LENGTH, "tokenizer_class": "CLIPTokenizer", **special}
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in (
        ("vocab.json", vocabulary),
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", special),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
