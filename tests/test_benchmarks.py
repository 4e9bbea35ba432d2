"""The benchmarks run and tell what they should; how fast anything is, is no test's affair."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import jax
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import latency


@pytest.fixture(autouse=True)
def caches_stay(monkeypatch):
    """Compiled programs stay in pytest's cache."""
    assert len(jax.devices()) == 8  # else the script would have as many as it asks for
    monkeypatch.setattr(latency, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)


def test_latency_tells_a_line_for_each_number_of_devices(tiny_checkpoint, tmp_path, capsys):
    lines, plot = tmp_path / "latency.jsonl", tmp_path / "plot.png"
    call = "--devices 1 4 --image-size 64 --num-inference-steps 3 --warmup-steps 0 --warmup-times 1 --test-times 2"
    latency.main(["--model", str(tiny_checkpoint), *call.split(), "--output", str(lines), "--plot", str(plot)])
    printed = capsys.readouterr().out
    assert lines.read_text() == printed
    one, four = map(json.loads, printed.splitlines())
    assert (one["devices"], four["devices"]) == (1, 4)
    assert four["mesh"] == {"data": 1, "patch": 2, "cfg": 2}
    for row in (one, four):
        assert row["image_size"] == [64, 64] and row["device"] == "virtual CPU" and row["dtype"] == "float32"
        assert 0 < row["loop_s"] < row["end_to_end_s"]
        assert row["compile_s"] > 0
    with Image.open(plot) as image:
        assert image.width > 500


def test_the_mean_leaves_out_both_ends():
    assert latency.trimmed_mean([9.0, 1.0, 2.0, 3.0, 0.0], 0.4) == 2.0
    assert latency.trimmed_mean([1.0, 2.0, 6.0], 0.2) == 3.0  # too few to leave any out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--test-times 0", "--test-times is 0; give a whole number of at least 1"),
        ("--ignore-ratio 1", "--ignore-ratio is 1.0; give a part of all, from 0 to less than 1"),
        ("--devices 9", "--devices is 9 and this machine shows 8 (virtual CPU); use --devices 8 or fewer"),
    ],
)
def test_latency_refuses_wrong_flags_in_one_line(flags, told):
    with pytest.raises(SystemExit, match=f"^error: {re.escape(told)}$"):
        latency.main(flags.split())
