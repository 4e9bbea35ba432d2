"""The benchmarks run and tell what they should; how fast anything is, is no test's affair."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import convert_file
import jax
import jax.numpy as jnp
import latency
import pytest
import scaling
import shard
from facts import refuses
from marks import slow
from PIL import Image
from unet_configs import BASE

from distrijax import DistriConfig, load_scheduler, plan_mesh
from distrijax.convert.layouts.original import from_original, to_original
from distrijax.models import attention
from distrijax.models.clip import CLIPTextConfig
from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import VAEConfig
from distrijax.plan.overlap import HloProgram
from distrijax.plan.traffic import main_step


@pytest.fixture(autouse=True)
def caches_stay(monkeypatch):
    """Compiled programs stay in pytest's cache."""
    assert len(jax.devices()) == 8  # else the script would have as many as it asks for
    for script in (latency, shard):
        monkeypatch.setattr(script, "keep_compiled_programs", lambda: None)


@slow
def test_latency_tells_a_line_for_each_number_of_devices(shallow_checkpoint, tmp_path, capsys, monkeypatch):
    lines, plot = tmp_path / "latency.jsonl", tmp_path / "plot.png"
    peaks = iter([0, 50, 50, 70, 70, 70])  # before and after each; devices remember theirs
    monkeypatch.setattr(latency, "peak_memory", lambda: next(peaks))
    call = "--devices 1 4 1 --image-size 64 --num-inference-steps 3 --warmup-steps 0 --warmup-times 1 --test-times 2"
    latency.main(["--model", str(shallow_checkpoint), *call.split(), "--output", str(lines), "--plot", str(plot)])
    printed = capsys.readouterr().out
    assert lines.read_text() == printed
    four, one, again = map(json.loads, printed.splitlines())
    assert [(row["devices"], row["peak_bytes"]) for row in (four, one, again)] == [(4, 50), (1, 70), (1, None)]
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
        ("--test-times 0", ["--test-times", 0, 1]),
        ("--output nowhere/x.jsonl", ["--output", "nowhere/x.jsonl", "No such file or directory"]),
        ("--plot nowhere/x.png", ["--plot", "nowhere/x.png", "No such file or directory"]),
        ("--plot .", ["--plot", "folder", "file"]),
        ("--ignore-ratio 1", ["--ignore-ratio", "1.0", 0, 1]),
        ("--devices 1 0", ["--devices", 0, 1]),
        ("--devices 9", ["--devices", 9, 8, "virtual CPU", "--devices 8"]),
    ],
)
def test_latency_refuses_wrong_flags_in_one_line(flags, told):
    with refuses(*told, error=SystemExit):
        latency.main(flags.split())


def test_what_is_not_installed_is_told_before_anything_is_measured(monkeypatch):
    for module in ("matplotlib", "diffusers"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(latency, "open_model", lambda *_: pytest.fail("the model was looked for"))
    monkeypatch.setattr(convert_file, "random_checkpoint", lambda *_: pytest.fail("the file was made"))
    with refuses("--plot", "matplotlib", "`eval`", error=SystemExit):
        latency.main(["--plot", "x.png"])
    with refuses("diffusers", "torch", "`test`", error=SystemExit):
        convert_file.main([])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the script sets it
    with refuses("diffusers", "torch", "`test`", error=SystemExit):
        runpy.run_path(str(Path(latency.__file__).with_name("unet_vs_torch.py")))


@slow
def test_a_part_of_a_step_has_its_part_of_the_work_and_no_traffic(monkeypatch):
    monkeypatch.setattr(attention, "CPU_ATTENTION_CHUNK", 2**24)  # in one piece: XLA counts a loop's work once
    config, scheduler = DistriConfig(split_batch=False), load_scheduler({"_class_name": "DDIMScheduler"})

    def part(of: int) -> jax.stages.Compiled:
        size = {"latent": (64, 64), "dtype": jnp.float32}
        step = main_step(config, UNetConfig.from_dict(BASE), scheduler, plan_mesh(config, of), **size)
        return shard.compile_part(step, {})()

    whole, quarter = part(1), part(4)
    assert sum(transfer.received for transfer in HloProgram(quarter.as_text()).transfers) == 0
    flops = [program.cost_analysis()["flops"] for program in (whole, quarter)]
    assert flops[0] / 4 < flops[1] < flops[0] / 3  # more than a quarter, for boundary rows are computed on both sides


@slow
def test_shard_tells_a_line_for_each_part(shallow_checkpoint, capsys):
    flags = "--image-size 64 --parts 1 2 --steps 2 --warmup-times 1 --test-times 1 --split-batch"
    shard.main(["--model", str(shallow_checkpoint), *flags.split()])
    one, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert (one["part_of"], two["part_of"], two["mesh"]) == (1, 2, "data 1 x cfg 2 x patch 1")
    assert one["of_1"] == 1 and two["step_s"] > 0 and two["collectives"] == "local stand-ins"


STAND_IN = """
import json, os, sys
words = [word for word in sys.argv[1:] if word != "--no-split-batch"]
flags = dict(zip(words[::2], words[1::2]))
assert len(os.sched_getaffinity(0)) == 1
print("a library says something")
print("and something", file=sys.stderr)
if flags["--process-id"] == "0":
    names = "mesh", "model", "warmup_steps", "sync_mode", "dtype", "image_size", "num_inference_steps"
    seconds = 2 / int(flags["--num-processes"])
    row = {**dict.fromkeys(names), "loop_s": seconds, "end_to_end_s": seconds, "compile_s": 1}
    open(flags["--output"], "w").write(json.dumps(row))
"""
"""Of latency.py: twice as fast in two processes, each of which may use one core."""


def test_scaling_compares_two_processes_of_a_core_each_with_one(tmp_path, capsys, monkeypatch):
    lines, stand_in = tmp_path / "scaling.jsonl", tmp_path / "stand_in.py"
    stand_in.write_text(STAND_IN)
    monkeypatch.setattr(scaling, "LATENCY_SCRIPT", stand_in)
    scaling.main(["--repeats", "2", "--output", str(lines)])
    printed = capsys.readouterr().out
    assert lines.read_text() == printed
    one, cfg, patch = map(json.loads, printed.splitlines())
    assert [row["processes"] for row in (one, cfg, patch)] == [1, 2, 2]
    assert one["loop_speed_up"] == [1, 1, 1] and cfg["loop_speed_up"] == patch["end_to_end_speed_up"] == [2, 2, 2]


def test_scaling_compares_the_runs_of_each_repeat():
    kept = dict.fromkeys((*scaling.KEPT, "compile_s"), 0)
    ones = [{**kept, "loop_s": seconds, "end_to_end_s": 2 * seconds} for seconds in (2.0, 4.0, 2.0)]
    twos = [{**kept, "loop_s": seconds, "end_to_end_s": 2.0} for seconds in (1.0, 2.5, 1.1)]
    told = scaling.compare("cfg", twos, ones)
    assert told["loop_s"] == 1.1 and told["loop_speed_up"] == [1.818, 1.6, 2.0]
    assert told["end_to_end_speed_up"] == [2.0, 2.0, 4.0]


def test_scaling_needs_two_cores(monkeypatch):
    monkeypatch.setattr(scaling.os, "sched_getaffinity", lambda process: {3})
    with refuses("cores", 1, 2, error=SystemExit):
        scaling.main([])


def test_the_file_to_convert_has_what_stable_diffusion_has():
    checkpoint = convert_file.random_checkpoint("SD1")
    again = from_original(to_original(checkpoint), "file")
    assert again.configs.keys() == checkpoint.configs.keys()
    for part, kind in {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": CLIPTextConfig}.items():
        # keys with diffusers' defaults may be left out
        assert kind.from_dict(again.configs[part]) == kind.from_dict(checkpoint.configs[part])
    assert {part: len(held) for part, held in again.tensors.items()} == {"unet": 686, "vae": 248, "text_encoder": 196}
    assert again.tensors["unet"]["conv_in.weight"].read().std() == pytest.approx(1, abs=0.05)


def test_the_memory_of_a_process_is_told_and_its_failure_too():
    told = convert_file.run([sys.executable, "-c", "import time; a = b'x' * 300_000_000; time.sleep(0.5)"])
    assert told["seconds"] > 0.5
    assert 0.3 < told["own_gb"] <= told["peak_gb"] < 0.4
    with refuses("ValueError: why"):
        convert_file.run([sys.executable, "-c", "raise ValueError('why')"])
