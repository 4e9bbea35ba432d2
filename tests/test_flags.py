"""Flags of a command line against the configuration that they stand for."""

from __future__ import annotations

import argparse
import json

import pytest

from distrijax import DistriConfig
from distrijax.flags import FLAGS, add_config_flags, config_of, settings_of


def parsed(*flags: str, **options) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_config_flags(parser, **options)
    return parser.parse_args(flags)


def test_no_flags_are_the_usual_configuration():
    assert config_of(parsed()) == DistriConfig()


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--warmup-steps 2", "warmup_steps", 2),
        ("--sync-steps 9 -1", "sync_steps", (9, -1)),
        ("--sync-mode stale_gn", "sync_mode", "stale_gn"),
        ("--extrapolate", "extrapolate", True),
        ("--compress", "compress", "int8"),
        ("--compress int4", "compress", "int4"),
        ("--shard-weights", "shard_weights", True),
        ("--parallelism tensor", "parallelism", "tensor"),
        ("--split-scheme row", "split_scheme", "row"),
        ("--no-split-batch", "split_batch", False),
    ],
)
def test_each_flag_sets_its_field(flags, field, value):
    config = config_of(parsed(*flags.split()), devices=3)
    assert config == DistriConfig(devices=3, **{field: value})
    assert settings_of(config)[field] == value
    json.dumps(settings_of(config))


def test_flags_may_be_left_out():
    arguments = parsed("--sync-mode", "no_sync", without=FLAGS.keys() - {"sync_mode"})
    assert vars(arguments) == {"sync_mode": "no_sync"}
    assert config_of(arguments) == DistriConfig(sync_mode="no_sync")
