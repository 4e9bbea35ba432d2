"""The engine takes tensors through a table in both directions, and lists everything that it can't."""

import re

import numpy as np
from facts import refuses

from distrijax.convert.engine import SPLIT, SQUEEZED, TRANSPOSED, Row, Table, to_diffusers, to_source
from distrijax.weights.tensors import Tensors, of_array

INNER = Table(
    Row("in_layers.0.", "norm1."),
    Row("q.", "to_q.", SQUEEZED),
    Row("in_proj_weight", ("q.weight", "k.weight", "v.weight"), SPLIT),
    Row("projection", "projection.weight", TRANSPOSED),
)
TABLE = Table(Row("input.1.0.", "down.0.", INNER), Row("res.{n}.at.{n}.", "layers.{n}.{n}.", INNER), Row("pos", None))


def tensors(**shapes) -> Tensors:
    rng = np.random.default_rng(0)
    return {name: of_array(rng.normal(size=shape)) for name, shape in shapes.items()}


THEIRS = tensors(
    **{
        "input.1.0.in_layers.0.weight": (3,),
        "res.11.at.2.q.weight": (4, 3, 1, 1),
        "res.11.at.2.q.bias": (4,),
        "res.2.at.0.in_proj_weight": (9, 2),
        "input.1.0.projection": (2, 5),
    }
)


def test_every_name_and_layout_goes_where_the_table_says():
    ours, _ = to_diffusers(TABLE, THEIRS, "file")
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        "down.0.norm1.weight": (3,),
        "layers.11.2.to_q.weight": (4, 3),
        "layers.11.2.to_q.bias": (4,),
        "layers.2.0.q.weight": (3, 2),
        "layers.2.0.k.weight": (3, 2),
        "layers.2.0.v.weight": (3, 2),
        "down.0.projection.weight": (5, 2),
    }
    assert all(tensor.read().shape == tensor.shape for tensor in ours.values())
    whole = THEIRS["res.2.at.0.in_proj_weight"].read()
    np.testing.assert_array_equal(ours["layers.2.0.k.weight"].read(), whole[3:6])


def test_there_and_back_is_the_same_bytes():
    ours, _ = to_diffusers(TABLE, THEIRS, "file")
    back = to_source(TABLE, dict(sorted(ours.items())), "file")
    assert back.keys() == THEIRS.keys()
    for name, tensor in THEIRS.items():
        assert back[name].shape == tensor.shape
        np.testing.assert_array_equal(back[name].read(), tensor.read())


def test_what_is_dropped_is_told():
    ours, mapping = to_diffusers(TABLE, tensors(pos=(1,)), "file")
    assert not ours
    assert [(each.source, each.diffusers) for each in mapping] == [("pos", ())]


def test_all_that_is_wrong_is_in_one_error():
    wrong = tensors(**{"other": (3,), "res.1.at.1.in_proj_weight": (4, 2), "input.1.0.q.weight": (4, 3, 3, 3)})
    with refuses("model.safetensors", "1 unknown (other)", re.compile(r"\b2 [^;(]*shape")):
        to_diffusers(TABLE, wrong, "model.safetensors")


def test_two_tensors_for_one_place_are_refused():
    table = Table(Row("a", "c"), Row("b", "c"))
    with refuses("1 duplicate (b)"):
        to_diffusers(table, tensors(a=(1,), b=(1,)), "file")


def test_a_part_that_is_missing_or_of_another_size_is_named_on_the_way_back():
    ours, _ = to_diffusers(TABLE, THEIRS, "file")
    del ours["layers.2.0.v.weight"]
    with refuses(re.compile(r"missing .*layers\.2\.0\.v\.weight")):
        to_source(TABLE, ours, "file")
    with refuses(re.compile(r"\b1 [^;(]*shape[^;(]* \(layers\.2\.0\.q\.weight [^)]*\[3, 2\]")):
        to_source(TABLE, {**ours, **tensors(**{"layers.2.0.v.weight": (4, 2)})}, "file")


def test_two_tensors_of_ours_for_one_of_theirs_are_refused():
    table = Table(Row("a", "b"), Row("a", "c"))
    with refuses("1 duplicate (c)"):
        to_source(table, tensors(b=(1,), c=(1,)), "file")
