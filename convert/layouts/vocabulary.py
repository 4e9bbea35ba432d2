"""CLIP's vocabulary, which single files lack: the tokenizers' folders as the diffusers layout has them.

`clip_bpe.txt.gz` is OpenAI's `bpe_simple_vocab_16e6.txt.gz` as open_clip distributes it; `clip_bpe.license.txt` has its licence.
"""

from __future__ import annotations

import functools
import gzip
import json
from importlib import resources

from distrijax.models.tokenizer import BOS, DEFAULT_LENGTH, EOS, WORD_END

FILE = "clip_bpe.txt.gz"

SIZE = 49408
"""Tokens: 256 bytes, 256 bytes that end a word, merges, begin and end of text."""

PRINTABLE = [code for first, last in ((33, 126), (161, 172), (174, 255)) for code in range(first, last + 1)]


def tokenizer_files(folder: str, *, pad_token: str) -> dict[str, bytes]:
    """The files of a tokenizer, by path.

    folder: `tokenizer` or `tokenizer_2`. pad_token: what short prompts are padded with, "<|endoftext|>" or "!".
    """
    special = {key: _token(text) for key, text in (("bos_token", BOS), ("eos_token", EOS), ("unk_token", EOS))}
    special["pad_token"] = pad_token
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": DEFAULT_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
        **special,
    }
    vocab, pairs = _vocabulary_files()
    return {
        f"{folder}/vocab.json": vocab,
        f"{folder}/merges.txt": pairs,
        f"{folder}/special_tokens_map.json": _json(special),
        f"{folder}/tokenizer_config.json": _json(settings),
    }


def merges() -> list[str]:
    """CLIP's merges in their order, each "left right"."""
    packed = (resources.files("distrijax.convert") / FILE).read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    return lines[1 : 1 + SIZE - 512 - 2]  # the file's further lines were not used in training


@functools.cache
def _vocabulary_files() -> tuple[bytes, bytes]:
    letters = [chr(code) for code in PRINTABLE]
    letters += [chr(256 + n) for n in range(256 - len(letters))]
    joined = ["".join(merge.split()) for merge in merges()]
    tokens = [*letters, *(letter + WORD_END for letter in letters), *joined, BOS, EOS]
    vocabulary = json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False)
    return vocabulary.encode("utf-8"), "\n".join(["#version: 0.2", *merges(), ""]).encode("utf-8")


def _token(text: str) -> dict[str, object]:
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": text, **flags}


def _json(content: dict[str, object]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
