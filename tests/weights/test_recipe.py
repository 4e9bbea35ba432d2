"""What a checkpoint is made of: which values are taken, and what several processes compare of it."""

from __future__ import annotations

import numpy as np
import pytest
from facts import refuses

from distrijax import InvalidArgument
from distrijax.weights.recipe import Recipe


@pytest.mark.parametrize(
    ("name", "value"),
    [("ema", "yes"), ("ema", 1), ("variant", 16), ("revision", 3.5), ("prediction_type", ["epsilon"]), ("vae", 5)],
)
def test_values_of_other_types_are_refused(name, value):
    with refuses(name, repr(value), error=InvalidArgument):
        Recipe("model", **{name: value})


def test_a_flag_may_be_numpys():
    assert Recipe("model", ema=np.bool_(True)).ema is True


FULL = {
    "variant": "fp16",
    "revision": "main",
    "ema": True,
    "prediction_type": "epsilon",
    "unet": "/here/unet.safetensors",
    "vae": "owner/vae",
    "loras": [("/here/a.safetensors", 0.5), "b.safetensors"],
    "embeddings": {"/here/word.pt": "<word>", "other.pt": None},
}

OTHERS = {
    "variant": None,
    "revision": "0123abcd",
    "ema": False,
    "prediction_type": "v_prediction",
    "unet": None,
    "vae": "owner/other",
    "loras": [("/here/a.safetensors", 0.6), "b.safetensors"],
    "embeddings": {"/here/word.pt": None, "other.pt": "<word>"},
}


@pytest.mark.parametrize("name", FULL)
def test_each_value_that_changes_the_model_is_a_fact(name):
    one, other = Recipe("model", **FULL).facts, Recipe("model", **{**FULL, name: OTHERS[name]}).facts
    assert list(one) == list(other)
    assert [each for each in one if one[each] != other[each]] == [name]


def test_a_folder_that_differs_between_hosts_is_no_fact():
    moved = {
        "unet": "there/unet.safetensors",
        "loras": [("a.safetensors", 0.5), ("/there/b.safetensors", 1)],
        "embeddings": {"word.pt": "<word>", "/there/other.pt": None},
    }
    assert Recipe("/here/model", **FULL).facts == Recipe("/there/copy", **{**FULL, **moved}).facts
