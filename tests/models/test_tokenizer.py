"""CLIP's tokenizer against transformers, on a small vocabulary and, where it is installed, on CLIP's own."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from facts import refuses, says
from tiny_tokenizer import BYTES, count_words, learn_merges, train_tokenizer, write_tokenizer
from transformers import CLIPTokenizer as TorchTokenizer

from distrijax import DistriWarning
from distrijax.models.tokenizer import BOS, EOS, CLIPTokenizer

CAPTIONS = [
    "a large red circle at the top left, on a striped yellow background",
    "a small blue star on the right and a green square in the center",
    "It's what they've drawn: café, naïve, 12 stars!",
]
TEXTS = [
    "",
    "   ",
    "A red Circle, at the TOP left!",
    "a large  red\tcircle\n\nat the\r\n top",
    "it's we'll they've I'm you're he'd don't isn’t 'S 'LL",
    "café cafe\u0301 Ünïcödé İstanbul ẞ ﬁ Ａ",
    "日本語のテキスト 中文 한국어 मराठी नमस्ते",
    "emoji 😀👩‍👩‍👧🏽 !",
    "1234 5 ½ ² Ⅷ ٣",
    "hello!!! wow ! (masterpiece:1.2), [low-res] {x|y} ~ `` '' a-b_c/d\\e@f#g$h%i^j&k*l",
    f"{EOS} x {BOS} <|ENDOFTEXT|>y<|EndOfText|> <|endof",
    "\x00\x01\x7f\u200b\ufeff\u00a0zero",
    "star " * 200,
    "!" * 200,
    "é" * 200,
    "x" * 500,
]
PADDINGS = pytest.mark.parametrize("pad_token", [EOS, "!"], ids=["first", "second"])


def random_texts(count: int) -> list[str]:
    """Blanks, exclamation marks and letters out of all of Unicode's corners."""
    draw = random.Random(0)
    ranges = [(32, 127), (32, 127), (0x80, 0x600), (0x900, 0x1200), (0x3000, 0xA000), (0x1F300, 0x1FAFF)]
    letters = [lambda: draw.choice(" !'"), *(lambda ends=ends: chr(draw.randrange(*ends)) for ends in ranges)]
    return ["".join(draw.choice(letters)() for _ in range(draw.randrange(60))) for _ in range(count)]


def assert_equal_to_transformers(folder: Path, texts: list[str]) -> None:
    theirs, ours = TorchTokenizer.from_pretrained(folder), CLIPTokenizer.from_folder(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DistriWarning)
        got = ours(texts)
    wanted = theirs(texts, padding="max_length", max_length=theirs.model_max_length, truncation=True)["input_ids"]
    assert got.shape == (len(texts), 77)
    assert got.dtype == np.int32
    for text, ids, expected in zip(texts, got.tolist(), wanted, strict=True):
        assert ids == expected, repr(text)


@pytest.fixture
def folder(tmp_path):
    train_tokenizer(CAPTIONS, tmp_path / "tokenizer", vocab_size=2000, pad_token="!")
    return tmp_path / "tokenizer"


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def flags(content: str, **changes) -> dict:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False} | changes


@PADDINGS
def test_small_vocabulary_equals_transformers(tmp_path, pad_token):
    train_tokenizer(CAPTIONS, tmp_path, vocab_size=2000, pad_token=pad_token)
    assert_equal_to_transformers(tmp_path, TEXTS + CAPTIONS + random_texts(200))


@PADDINGS
def test_folder_written_by_transformers_5_equals_transformers(tmp_path, pad_token):
    train_tokenizer(CAPTIONS, tmp_path / "old", vocab_size=2000, pad_token=pad_token)
    TorchTokenizer.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert_equal_to_transformers(tmp_path / "new", TEXTS)


@PADDINGS
@pytest.mark.parametrize("normalized", [True, False])
def test_settings_of_sdxl_equal_transformers(tmp_path, pad_token, normalized):
    """SDXL's files spell the special tokens out, and transformers 4.34 and later also write added_tokens_decoder."""
    tokenizer = train_tokenizer(CAPTIONS, tmp_path, vocab_size=2000, pad_token=pad_token)
    special = {key: flags(text, normalized=normalized) for key, text in (("bos_token", BOS), ("eos_token", EOS))}
    edit(tmp_path / "special_tokens_map.json", **special)
    settings = {key: value | {"__type": "AddedToken"} for key, value in special.items()}
    edit(tmp_path / "tokenizer_config.json", errors="replace", add_prefix_space=False, do_lower_case=True, **settings)
    assert_equal_to_transformers(tmp_path, TEXTS)
    ids = {tokenizer.bos_token_id: BOS, tokenizer.eos_token_id: EOS, tokenizer.pad_token_id: pad_token}
    decoder = {str(index): flags(text, normalized=normalized, special=True) for index, text in ids.items()}
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=decoder)
    assert_equal_to_transformers(tmp_path, TEXTS)


def test_added_words_equal_transformers(folder):
    new = CLIPTokenizer.from_folder(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<cat-toy>": new, "<sks>": new + 1}))
    texts = ["a red <cat-toy>", "<sks><CAT-toy> star", "a <sks>, right"]
    assert_equal_to_transformers(folder, texts)
    assert new + 1 in CLIPTokenizer.from_folder(folder)(texts)


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip_torch carries CLIP's vocabulary")
@PADDINGS
def test_real_vocabulary_equals_transformers(tmp_path, pad_token):
    package = Path(importlib.util.find_spec("open_clip").submodule_search_locations[0])
    lines = gzip.decompress((package / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    symbols = [*BYTES, *(byte + "</w>" for byte in BYTES), *map("".join, merges), BOS, EOS]
    write_tokenizer(tmp_path, {symbol: index for index, symbol in enumerate(symbols)}, merges, pad_token)
    assert CLIPTokenizer.from_folder(tmp_path).eos_token_id == 49407
    assert_equal_to_transformers(tmp_path, TEXTS + random_texts(500))


def test_begin_words_end_padding(folder):
    tokenizer = CLIPTokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (tokenizer.vocab_size - 2, 0)
    ids = tokenizer(["A red   circle"])[0]
    assert [tokenizer.bpe.id_to_token(i) for i in ids[:6]] == [BOS, "a</w>", "red</w>", "circle</w>", EOS, "!"]
    assert (ids[5:] == 0).all()


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("star " * 75 + "Red Circle, at the left", "Red Circle, at the left"),
        ("cafe\u0301 " * 75 + "Café, 日本 😀", "Café, 日本 😀"),
        ("star\n" * 74 + "a  large\tred", "large\tred"),
    ],
)
def test_long_prompt_warns_with_the_lost_words(folder, text, lost):
    tokenizer = CLIPTokenizer.from_folder(folder)
    with pytest.warns(DistriWarning) as caught:
        ids = tokenizer([text])
    says(str(caught[0].message), 75, repr(lost))
    assert caught[0].filename == __file__
    assert ids[0, -1] == tokenizer.eos_token_id


def test_prompt_that_just_fits_does_not_warn(folder):
    assert CLIPTokenizer.from_folder(folder)(["star " * 75]).shape == (1, 77)


def test_length_is_the_folders(folder):
    edit(folder / "tokenizer_config.json", model_max_length=16)
    assert CLIPTokenizer.from_folder(folder)(["a", "b"]).shape == (2, 16)
    edit(folder / "tokenizer_config.json", model_max_length=10**30)
    assert CLIPTokenizer.from_folder(folder)(["a"]).shape == (1, 77)


def test_trained_vocabulary_is_in_clips_order_and_knows_every_word(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, tmp_path, vocab_size=2000, pad_token=EOS)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    assert list(vocabulary.values()) == list(range(tokenizer.vocab_size))
    symbols = list(vocabulary)
    assert symbols[0] == "!"
    assert symbols[256] == "!</w>"
    assert len(set(BYTES)) == 256
    assert symbols[-2:] == [BOS, EOS]
    assert tokenizer.eos_token_id == tokenizer.vocab_size - 1
    for word in count_words(CAPTIONS):
        assert f"{word}</w>" in vocabulary
    assert len(tokenizer.bpe.encode("yellow background café", add_special_tokens=False)) == 3


def test_training_merges_the_most_frequent_pair_first():
    assert learn_merges({"low": 5, "lot": 3, "aa": 1}) == [("l", "o"), ("lo", "w</w>"), ("lo", "t</w>"), ("a", "a</w>")]


def test_training_is_reproducible(tmp_path):
    for name in ("one", "two"):
        train_tokenizer(CAPTIONS, tmp_path / name, vocab_size=2000, pad_token="!")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_training_refuses_a_vocabulary_too_small_for_the_words(tmp_path):
    with refuses("vocab_size", 520, re.compile(r"\b6\d\d\b")):
        train_tokenizer(CAPTIONS, tmp_path, vocab_size=520, pad_token="!")


def broken(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def without_end(folder: Path) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    del vocabulary[EOS]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (shutil.rmtree, ["folder", "diffusers"]),
        (lambda folder: (folder / "merges.txt").unlink(), ["merges.txt"]),
        (
            lambda folder: [(folder / name).unlink() for name in ("vocab.json", "merges.txt")],
            ["vocab.json", "merges.txt"],
        ),
        (
            lambda folder: [(folder / name).unlink() for name in ("tokenizer_config.json", "special_tokens_map.json")],
            ["tokenizer_config.json"],
        ),
        (broken("vocab.json", '{"!": 0,'), ["vocab.json", "JSON"]),
        (broken("vocab.json", '{"!": "zero"}'), ["vocabulary", "ids"]),
        (broken("merges.txt", "#version: 0.2\na b c\n"), ["merge", "'a b c'", "pair"]),
        (broken("merges.txt", "#version: 0.2\nq zebra\n"), ["vocabulary"]),
        (broken("tokenizer.json", "{"), ["tokenizer.json", "JSON"]),
        (broken("tokenizer.json", '{"model": {"type": "Unigram", "vocab": []}}'), ["tokenizer.json", "byte pair"]),
        (
            broken("tokenizer.json", '{"model": {"vocab": {"a": 0}, "merges": [], "end_of_word_suffix": null}}'),
            ["end_of_word_suffix", "None", "</w>"],
        ),
        (without_end, ["vocabulary", "<|endoftext|>"]),
        (lambda folder: edit(folder / "special_tokens_map.json", pad_token="<pad>"), ["vocabulary", "<pad>"]),
        (lambda folder: edit(folder / "special_tokens_map.json", pad_token=None), ["special token", "None"]),
        (lambda folder: edit(folder / "tokenizer_config.json", padding_side="left"), ["padding_side", "'left'"]),
        (lambda folder: edit(folder / "tokenizer_config.json", model_max_length="77"), ["model_max_length", "'77'"]),
        (broken("added_tokens.json", '{"<sks>": 7}'), ["<sks>", 7, "vocabulary"]),
        (broken("added_tokens.json", '{"<sks>": "x"}'), ["added", "token", "id"]),
    ],
)
def test_spoilt_folder_gives_one_sentence(folder, spoil, told):
    spoil(folder)
    with refuses(str(folder), *told):
        CLIPTokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ("a star", ["prompts", "'a star'", "list"]),
        ([], ["prompts", "[]", "list"]),
        (None, ["prompts", "None"]),
        (["a star", 7], ["prompt", 7, "int"]),
        (["\ud800"], ["Unicode"]),
    ],
)
def test_prompts_that_are_no_texts(folder, prompts, told):
    with refuses(*told):
        CLIPTokenizer.from_folder(folder)(prompts)
