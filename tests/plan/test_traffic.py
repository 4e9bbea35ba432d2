"""What a run will exchange: against the paper's figures, and against the collectives of the program that XLA compiled."""

from __future__ import annotations

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from facts import refuses, says
from marks import slow, slow_but
from unet_configs import BASE, FULL_BASE

from distrijax import DistriConfig, plan_mesh
from distrijax.convert.sources import open_checkpoint
from distrijax.models.unet_config import UNetConfig
from distrijax.parallel.collectives import FIRST, LAST
from distrijax.parallel.exchange import KV
from distrijax.parallel.programs import compiled, options_for
from distrijax.pipelines.loading import read_configs
from distrijax.plan.overlap import HloProgram, array_bytes
from distrijax.plan.traffic import Traffic, main_step, stale_of, step_kinds, traffic
from distrijax.schedulers import load_scheduler

PERMUTE = "collective-permute"
DDIM = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@functools.cache
def full_size(side: int, **settings) -> Traffic:
    """Of SDXL on eight devices; tracing it takes seconds."""
    unet, latent = UNetConfig.from_dict(FULL_BASE), (side // 8, side // 8)
    return traffic(DistriConfig(split_batch=False, **settings), unet, load_scheduler(DDIM), devices=8, latent=latent)


@pytest.mark.parametrize(("side", "billions"), slow_but([(1024, 0.424)], [(1024, 0.424), (2048, 1.583), (3840, 5.376)]))
def test_full_size_model_exchanges_as_much_as_the_original(side, billions):
    """In elements received from seven others, both boundary rows of every convolution going to all of them."""
    latent = side // 8
    planned = full_size(side)
    assert planned.rows == latent // 8
    elements = planned.stale["kv"] // 2 + planned.stale["halo"] // 2 + planned.stale["moments"] // 4
    never_read = 2 * (
        latent * 320 + latent // 2 * 640
    )  # the row below a convolution of stride 2, which ours leaves out
    assert 7 * (elements + never_read) / 1e9 == pytest.approx(billions, abs=0.0005)
    assert planned.stale["moments"] // 4 == 5888
    assert planned.received["kv"] == 7 * planned.stale["kv"]
    assert planned.received["moments"] == 7 * planned.stale["moments"]
    fresh = 2 * 2 * latent * 4 * 2  # a row of the latent from above and from below, in two branches of bfloat16
    assert planned.received["halo"] == planned.stale["halo"] + fresh


def test_a_shrunk_step_exchanges_keys_and_values_of_the_small_map():
    """At half the height and width a quarter of them."""
    config, unet = DistriConfig(split_batch=False, warmup_steps=0), UNetConfig.from_dict(BASE)
    mesh = plan_mesh(config, 4).abstract()
    sizes = [(16, 16)] * 2 + [None] * 2
    plan, described = step_kinds(config, unet, load_scheduler(DDIM), mesh, sizes, latent=(32, 32))
    assert len(plan.kinds) == 4 and len(described) == 4
    small, full = ([*described.values()][index] for index in (1, 3))
    keys = [
        sum(math.prod(leaf.shape) for (kind, _), leaf in stale_of(step).items() if kind == KV) for step in (small, full)
    ]
    assert keys[1] == 4 * keys[0]
    assert stale_of(small).keys() > stale_of(full).keys()  # what resizing asks of the neighbours
    assert {name for kind, name in stale_of(small).keys() - stale_of(full).keys()} <= {
        name + end for name in ("shrink", "enlarge") for end in (FIRST, LAST)
    }


@slow
@pytest.mark.parametrize(("side", "billions"), [(1024, 1.333), (2048, 5.332), (3840, 18.744)])
def test_tensor_parallelism_sums_as_much_as_the_originals(side, billions):
    planned = full_size(side, parallelism="tensor")
    assert planned.received["partial sums"] / 2 / 1e9 == pytest.approx(billions, abs=0.0005)
    assert planned.stale == {} and planned.received.keys() == {"partial sums", "guidance"}
    assert planned.received["guidance"] == 0  # both branches are on the same device


@slow
@pytest.mark.parametrize(("compress", "bits", "percent"), [("int8", 8, 52), ("int4", 4, 28)])
def test_full_size_models_tokens_travel_in_a_half_or_a_quarter_of_bfloat16s_bytes(compress, bits, percent):
    """Besides, two values of each channel in each layer: 70 layers, 2 branches, keys and values."""
    whole, less = full_size(1024), full_size(1024, compress=compress)
    channels = 10 * 640 + 60 * 1280
    assert less.stale["kv"] == whole.stale["kv"] * bits // 16 + 2 * 2 * channels * 2 * 2
    assert less.received["kv"] == 7 * less.stale["kv"]
    assert round(100 * sum(less.received.values()) / sum(whole.received.values())) == percent


SETTINGS = [
    {},
    {"split_batch": False},
    {"split_batch": False, "devices": 2},
    {"split_batch": False, "compress": "int8"},
    {"split_batch": False, "compress": "int4"},
    {"sync_mode": "async_tokens", "extrapolate": True, "compress": "int4"},
    {"sync_mode": "sync_gn"},
    {"sync_mode": "separate_gn"},
    {"sync_mode": "full_sync"},
    {"sync_mode": "stale_gn", "devices": 3},
    {"sync_mode": "no_sync"},
    {"parallelism": "naive_patch", "split_scheme": "column"},
    {"parallelism": "tensor"},
    {"parallelism": "tensor", "devices": 3},
]


QUICK = [{}, {"parallelism": "tensor"}]


@pytest.mark.parametrize(
    "settings", slow_but(QUICK, SETTINGS), ids=lambda settings: "-".join(map(str, settings.values())) or "default"
)
def test_received_bytes_are_those_of_the_compiled_program(settings, shallow_checkpoint):
    config = DistriConfig(**{"devices": 4, "warmup_steps": 0} | settings)
    unet, scheduler = read_configs(open_checkpoint(shallow_checkpoint)).unet, load_scheduler(DDIM)
    shape = {"latent": (16, 16), "dtype": jnp.float32}
    step = main_step(
        config, unet, scheduler, plan_mesh(config, config.devices), devices=jax.devices()[: config.devices], **shape
    )
    program = compiled(step.trace().lower(), options_for("cpu"), {})
    planned = traffic(config, unet, scheduler, devices=config.devices, **shape)
    # each transfer of a compiled program is rounded
    assert sum(planned.received.values()) == pytest.approx(received_by_hlo(program.as_text()), rel=1e-5)
    _, _, _, stale, _ = program.args_info[0]
    kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(stale)) // config.devices
    assert sum(planned.stale.values()) == kept


def received_by_hlo(text: str) -> int:
    """Bytes that the busiest device receives in the collectives of a compiled program, a ring's for all-reduce."""
    program = HloProgram(text)
    total = sum(each.received for each in program.transfers if each.kind != PERMUTE)
    permuted = collections.Counter()
    for instruction in program.step:
        if instruction.opcode.removesuffix("-start") == PERMUTE:
            pairs = re.search(r"source_target_pairs=\{([\d,{}]*)\}", instruction.rest).group(1)
            for target in re.findall(r"\{\d+,(\d+)\}", pairs):
                permuted[target] += array_bytes(instruction.arrays[-1])
    return total + max(permuted.values(), default=0)


@pytest.mark.parametrize(
    ("side", "devices", "padding", "told"),
    [
        (1024, 8, 0, None),
        (1000, 3, 1 - 125 / 132, ["5.3%"]),
        (128, 8, 0.5, ["50.0%", "4 patches"]),
        (96, 10, 0.7, ["70.0%", "3 patches"]),
    ],
)
def test_rows_that_are_padding_are_told(side, devices, padding, told):
    config = DistriConfig(split_batch=False)
    planned = traffic(
        config, UNetConfig.from_dict(BASE), load_scheduler(DDIM), devices=devices, latent=(side // 8, side // 8)
    )
    assert planned.padding == pytest.approx(padding)
    padded = [line for line in str(planned).splitlines() if line.startswith("padding")]
    assert len(padded) == (0 if told is None else 1)
    for line in padded:
        says(line, *told)
        assert len(re.findall(r"\d+ patches", line)) == len(told) - 1


def test_images_that_do_not_divide_are_refused():
    with refuses(1, "data=2", 2):
        traffic(
            DistriConfig(data=2), UNetConfig.from_dict(FULL_BASE), load_scheduler(DDIM), devices=4, latent=(128, 128)
        )
