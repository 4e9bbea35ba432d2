"""What is made of a caller's prompts before anything is encoded."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from facts import refuses, warns

from distrijax.pipelines.prompt import Embeddings, PromptEncoder, Prompts

GIVEN = Embeddings(np.zeros((1, 77, 8)), np.zeros((1, 4)))


def read(
    prompts: Prompts, negative_prompts: Prompts = (None, None), given: Embeddings | None = None, *, zeros: bool = True
):
    """The branches of guidance of a model with two encoders, which are not needed."""
    encoder = PromptEncoder((), (), pooled=True, zeros_for_empty=zeros, everywhere=None)
    return encoder.read(prompts, negative_prompts, given, None, guided=True)


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_an_empty_second_prompt_is_the_first(prompt):
    wanted = read((prompt, prompt), (prompt, prompt))
    assert read((prompt, ""), (prompt, "")) == read((prompt, None), (prompt, None)) == wanted


def test_an_empty_second_prompt_stands_beside_embeddings():
    assert read((None, ""), given=GIVEN)[1] is GIVEN
    with refuses("prompt_2", "prompt_embeds"):
        read((None, "b"), given=GIVEN)


def test_an_empty_second_prompt_in_a_list_is_a_prompt():
    assert read((["a", "b"], ["", "c"]), ("d", [""])) == ((["d"] * 2, [""] * 2), (["a", "b"], ["", "c"]))


def test_a_lone_second_negative_prompt_is_heeded_or_told():
    with warns("negative_prompt_2", "negative_prompt", "''"):
        assert read(("a", None), (None, "b"))[0] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(("a", None), (None, ""))[0] is None
        assert read(("a", None), ("", "b"))[0] == ([""], ["b"])
        assert read(("a", None), (None, "b"), zeros=False)[0] == ([""], ["b"])
