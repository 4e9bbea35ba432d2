"""CLIP's vocabulary, which travels with the package, against transformers' tokenizer."""

from __future__ import annotations

import pytest
from test_tokenizer import PADDINGS, TEXTS, assert_equal_to_transformers, random_texts

from distrijax.convert.layouts.vocabulary import SIZE, tokenizer_files
from distrijax.models.tokenizer import CLIPTokenizer


@pytest.fixture
def folder(tmp_path):
    def write(pad_token: str):
        for name, content in tokenizer_files("tokenizer", pad_token=pad_token).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        return tmp_path / "tokenizer"

    return write


@PADDINGS
def test_ids_are_those_of_transformers(folder, pad_token):
    assert_equal_to_transformers(folder(pad_token), TEXTS + random_texts(300))


def test_ids_are_clips(folder):
    """Those that CLIP's own examples and Stable Diffusion's documentation print."""
    tokenizer = CLIPTokenizer.from_folder(folder("!"))
    assert tokenizer.vocab_size == SIZE == 49408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 0)
    assert tokenizer(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
