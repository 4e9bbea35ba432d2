"""The fidelity table: what is generated, measured, kept and shown, with a small random checkpoint on virtual devices."""

from __future__ import annotations

import csv
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from coco_folder import coco
from facts import refuses, says
from marks import slow
from PIL import Image
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from distrijax import DistriConfig, DistriSDXLPipeline
from distrijax.cli import evaluate
from distrijax.cli.fidelity import figures, grid, metrics, prompts
from distrijax.cli.fidelity.results import COLUMNS, Results
from distrijax.pipelines.call import PipelineOutput

CAPTIONS, STEPS, SIZE = 3, 3, 64
GRID = "--devices 2 --parallelism patch --sync-mode corrected_async_gn full_sync --warmup-steps 0"
SETTINGS = {
    "devices=1": "lossless",
    "parallelism=patch,sync_mode=corrected_async_gn,extrapolate=False,compress=none,"
    "warmup_steps=0,sync_steps=none,split_batch=False,devices=2": "lossy",
    "parallelism=patch,sync_mode=full_sync,split_batch=False,devices=2": "lossless",
}
LOSSY = list(SETTINGS)[1]


def run(model: Path, output: Path, *flags: str) -> None:
    """The script, with prompts in batches of two, so that the last batch is not full."""
    shared = f"--captions {CAPTIONS} --num-inference-steps {STEPS} --image-size {SIZE} --batch 2 {GRID}".split()
    evaluate.main(["--model", str(model), "--output", str(output), *shared, *flags])


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "fidelity.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def images(folder: Path, setting: str) -> np.ndarray:
    files = sorted((folder / "pictures" / setting).iterdir())
    assert [file.name for file in files] == [f"{index:05}.png" for index in range(CAPTIONS)]
    return np.stack([np.asarray(Image.open(file)) for file in files])


@pytest.fixture(autouse=True)
def no_networks(monkeypatch):
    """The networks of LPIPS and FID cannot be imported, whatever is installed; compiled programs stay in pytest's cache."""
    assert len(jax.devices()) == 8  # else the script would have as many as it asks for
    monkeypatch.setattr(evaluate, "keep_compiled_programs", lambda: None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image", None)
    monkeypatch.setitem(sys.modules, "cleanfid", None)


@pytest.fixture(scope="module")
def done(shallow_checkpoint, tmp_path_factory) -> Path:
    """The folder of a finished run; tests share it, so leave it as it is."""
    folder = tmp_path_factory.mktemp("evaluate") / "fidelity"
    with pytest.MonkeyPatch.context() as patch:
        no_networks.__wrapped__(patch)
        run(shallow_checkpoint, folder)
    return folder


# What is generated and measured ------------------------------------------------------------------------------------------


@slow
def test_each_setting_has_one_row_and_is_called_lossless_or_lossy(done):
    rows = read(done)
    assert {grid.folder_name(row): row["exactness"] for row in rows} == SETTINGS
    one, displaced, synchronous = rows
    assert (one["psnr"], one["ssim"], one["received_bytes"], one["stale_bytes"]) == ("inf", "1", "0", "0")
    assert float(synchronous["psnr"]) > 60 > float(displaced["psnr"]) > 0
    assert int(displaced["stale_bytes"]) > 0 == int(synchronous["stale_bytes"])
    assert int(displaced["received_bytes"]) == int(synchronous["received_bytes"]) > 0
    assert {row[name] for row in rows for name in ("lpips", "fid")} == {"not available"}


@slow
@pytest.mark.parametrize(
    ("setting", "exactness"),
    [
        ({"devices": 2, "parallelism": "naive_patch", "split_scheme": "row", "split_batch": False}, "lossy"),
        ({"devices": 2, "sync_mode": "no_sync", "warmup_steps": STEPS - 1, "split_batch": False}, "lossless"),
        ({"devices": 2, "sync_mode": "no_sync", "warmup_steps": 0, "split_batch": True}, "lossless"),
        ({"devices": 2, "warmup_steps": STEPS - 2, "sync_steps": (-1,), "split_batch": False}, "lossless"),
    ],
)
def test_a_setting_is_lossless_where_nothing_it_uses_is_stale_or_cut_off(setting, exactness, shallow_checkpoint):
    flags = ["--model", str(shallow_checkpoint), "--num-inference-steps", str(STEPS), "--image-size", str(SIZE)]
    arguments = evaluate.parse(flags)
    job = evaluate.read_job(arguments, prompts.scene_prompts(1))
    assert evaluate.cost(setting, job)["exactness"] == exactness


def test_images_are_as_large_as_the_model_was_trained_for():
    job = evaluate.read_job(evaluate.parse([]), prompts.scene_prompts(1))
    assert (job.call["height"], job.call["width"]) == (256, 256)


@slow
def test_images_are_the_pipelines(done, shallow_checkpoint):
    pipe = DistriSDXLPipeline.from_pretrained(shallow_checkpoint, DistriConfig(devices=1), scheduler="ddim")
    text = prompts.scene_prompts(CAPTIONS).texts[2]
    call = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "guidance_scale": 5.0, "chunk_size": None}
    expected = pipe([text] * 2, **call, seed=[2, 9], output_type="np").images[0]
    assert np.abs(255 * expected - images(done, "devices=1")[2]).max() < 0.51


@slow
@pytest.mark.parametrize("row", range(1, len(SETTINGS)))
def test_psnr_and_ssim_of_a_row_are_torchmetrics(done, row):
    ours, theirs = (
        torch.from_numpy(images(done, setting)).permute(0, 3, 1, 2).double()
        for setting in (list(SETTINGS)[row], "devices=1")
    )
    found = read(done)[row]
    assert float(found["psnr"]) == pytest.approx(PeakSignalNoiseRatio(data_range=255.0)(ours, theirs).item(), rel=1e-4)
    similarity = StructuralSimilarityIndexMeasure(data_range=255.0)(ours, theirs).item()
    assert float(found["ssim"]) == pytest.approx(similarity, abs=1e-4)


def test_psnr_is_the_mean_over_groups_of_64_images_as_in_the_papers_script():
    errors = np.random.default_rng(0).uniform(1, 1000, 150)
    groups = [10 * np.log10(255**2 / errors[start : start + 64].mean()) for start in (0, 64, 128)]
    assert metrics.psnr(errors) == pytest.approx((64 * groups[0] + 64 * groups[1] + 22 * groups[2]) / 150)
    assert metrics.psnr([0.0, 0.0]) == np.inf


@pytest.mark.parametrize("shape", [(2, 24, 40, 3), (1, 8, 16, 3)])
def test_ssim_is_torchmetrics(shape):
    draw = np.random.default_rng(0)
    reference = draw.random(shape, np.float32)
    near = np.clip(reference + draw.normal(0, 0.2, shape), 0, 1).astype(np.float32)
    theirs = StructuralSimilarityIndexMeasure(data_range=1.0, reduction="none")
    expected = theirs(*(torch.from_numpy(part).permute(0, 3, 1, 2) for part in (near, reference)))
    assert np.allclose(metrics.ssim(near, reference), expected.reshape(-1), atol=1e-4)


# Going on --------------------------------------------------------------------------------------------------------------


def refuse(*_, **__):
    raise AssertionError("this was generated before")


class StandInPipeline:
    """In place of the pipeline where generation itself is not in question: noise, other for each prompt, seed and setting."""

    calls: list[tuple[str, list[str], list[int]]]
    stop_at: int | None = None  # the call that is interrupted

    def __init__(self, config: DistriConfig):
        self.config = config

    @classmethod
    def from_pretrained(cls, model, config, *, scheduler, dtype):
        assert (scheduler, dtype.name) == ("ddim", "float32")
        return cls(config)

    def set_progress_bar_config(self, *, disable):
        assert disable  # or its bar would be drawn over that of the images

    def __call__(self, texts, *, height, width, num_inference_steps, guidance_scale, seed, output_type, chunk_size):
        assert (num_inference_steps, guidance_scale, output_type, chunk_size) == (STEPS, 5.0, "np", None)
        if len(self.calls) == self.stop_at:
            StandInPipeline.stop_at = None
            raise KeyboardInterrupt
        self.calls.append((repr(self.config), texts, seed))
        seeds = [
            [self.config.devices, *map(ord, self.config.sync_mode + text), each]
            for text, each in zip(texts, seed, strict=True)
        ]
        drawn = [np.random.default_rng(each).random((height, width, 3), np.float32) for each in seeds]
        return PipelineOutput(np.stack(drawn))


@pytest.fixture
def stand_in(monkeypatch) -> type[StandInPipeline]:
    monkeypatch.setattr(StandInPipeline, "calls", [], raising=False)
    monkeypatch.setattr(evaluate, "load_pipeline", StandInPipeline.from_pretrained)
    cost = {"exactness": "lossy", "received_bytes": 1, "stale_bytes": 1}  # tracing takes seconds
    monkeypatch.setattr(evaluate, "cost", lambda setting, job: cost)
    return StandInPipeline


def test_prompts_come_in_full_batches_each_with_the_seed_of_its_index(stand_in, shallow_checkpoint, tmp_path):
    run(shallow_checkpoint, tmp_path)
    texts = prompts.scene_prompts(CAPTIONS).texts
    assert len(set(texts)) == CAPTIONS
    assert [(given, seeds) for _, given, seeds in stand_in.calls[:2]] == [(texts[:2], [0, 1]), (texts[2:] * 2, [2, 3])]
    assert len(stand_in.calls) == 2 * len(SETTINGS) == 2 * len({config for config, *_ in stand_in.calls})


@slow
def test_nothing_is_generated_or_measured_twice(done, shallow_checkpoint, monkeypatch):
    before = (done / "fidelity.csv").read_bytes()
    monkeypatch.setattr(evaluate, "load_pipeline", refuse)
    monkeypatch.setattr(evaluate, "_measure", refuse)
    run(shallow_checkpoint, done)
    assert (done / "fidelity.csv").read_bytes() == before


def test_an_interrupted_run_goes_on_and_gives_the_same_files(stand_in, shallow_checkpoint, tmp_path, capsys):
    run(shallow_checkpoint, tmp_path / "whole")
    calls, stand_in.calls, stand_in.stop_at = stand_in.calls, [], 3
    with pytest.raises(SystemExit) as end:
        run(shallow_checkpoint, tmp_path / "stopped")
    assert end.value.code == 130 and capsys.readouterr().err.endswith("interrupted\n")
    assert [row["devices"] for row in read(tmp_path / "stopped")] == ["1"]
    run(shallow_checkpoint, tmp_path / "stopped")
    assert stand_in.calls == calls
    whole, stopped = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "whole", tmp_path / "stopped")
    )
    assert len(whole) == len(SETTINGS) * CAPTIONS + 4 and stopped == whole


def test_a_setting_is_added_to_a_folder_without_generating_the_others_again(stand_in, shallow_checkpoint, tmp_path):
    run(shallow_checkpoint, tmp_path)
    old, stand_in.calls = read(tmp_path), []
    run(shallow_checkpoint, tmp_path, "--warmup-steps", "0", "1")
    new = read(tmp_path)
    assert new[:-1] == old and (new[-1]["sync_mode"], new[-1]["warmup_steps"]) == ("corrected_async_gn", "1")
    assert len(stand_in.calls) == 2


OTHERS = {
    "steps": ("--num-inference-steps 4", "num_inference_steps 3 4"),
    "prompts": ("--captions 2", "prompts"),
    "scheduler": ("--scheduler euler", "scheduler ddim euler"),
    "size": ("--image-size 64 96", "width 64 96"),
}


@slow
@pytest.mark.parametrize("kind", OTHERS)
def test_results_of_other_runs_are_not_mixed(kind, done, shallow_checkpoint, monkeypatch):
    flags, told = OTHERS[kind]
    before = {path: path.read_bytes() for path in done.glob("*.*")}
    monkeypatch.setattr(evaluate, "load_pipeline", refuse)
    with refuses("--output", *told.split(), error=SystemExit):
        run(shallow_checkpoint, done, *flags.split())
    assert {path: path.read_bytes() for path in done.glob("*.*")} == before


def test_a_table_with_other_columns_is_not_written_to(tmp_path):
    Results(tmp_path, {"model": "embedded"})
    (tmp_path / "fidelity.csv").write_text("mode,psnr\n")
    with refuses("fidelity.csv", "columns", "--output"):
        Results(tmp_path, {"model": "embedded"})
    (tmp_path / "settings.json").unlink()
    with refuses(str(tmp_path), "--output"):
        Results(tmp_path, {"model": "embedded"})


# LPIPS and FID ---------------------------------------------------------------------------------------------------------


class StandInLpips(torch.nn.Module):
    """In place of torchmetrics' LPIPS, whose network is not here: the mean absolute difference of what it is given."""

    def __init__(self, normalize: bool):
        super().__init__()
        assert normalize

    def reset(self):
        pass

    def forward(self, ours, theirs):
        assert ours.shape[1:] == (3, SIZE, SIZE) and ours.dtype == torch.float32
        assert ours.min() >= 0 and 0.5 < ours.max() <= 1
        return (ours - theirs).abs().mean()


class StandInCleanFid(types.ModuleType):
    """In place of clean-fid, whose network is not here: the features are mean colours, their distance that of the means."""

    def __init__(self):
        super().__init__("cleanfid")
        self.features, self.fid, self.read = self, self, []

    def build_feature_extractor(self, mode, device, use_dataparallel):
        assert mode == "clean" and not use_dataparallel
        return "network"

    def get_folder_features(self, folder, network, *, num_workers, batch_size, device, verbose):
        assert network == "network" and not verbose
        self.read.append(Path(folder).name)
        return np.stack([np.asarray(Image.open(path)).mean((0, 1)) for path in sorted(Path(folder).glob("*.*"))])

    def fid_from_feats(self, ours, theirs):
        return np.square(ours.mean(0) - theirs.mean(0)).sum()


@pytest.fixture
def networks(monkeypatch) -> StandInCleanFid:
    images = types.ModuleType("torchmetrics.image")
    images.LearnedPerceptualImagePatchSimilarity = StandInLpips
    monkeypatch.setitem(sys.modules, "torchmetrics.image", images)
    cleanfid = StandInCleanFid()
    monkeypatch.setitem(sys.modules, "cleanfid", cleanfid)
    return cleanfid


@pytest.fixture
def generated(done, tmp_path) -> Path:
    """A folder that has the images and rows of `done`, to go on with."""
    for path in (path for path in done.rglob("*") if path.is_file()):
        copy = tmp_path / "fidelity" / path.relative_to(done)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path / "fidelity"


@slow
def test_rows_without_lpips_and_fid_get_them_once_they_can_be_had(generated, shallow_checkpoint, networks, monkeypatch):
    monkeypatch.setattr(evaluate, "load_pipeline", refuse)
    old = read(generated)
    run(shallow_checkpoint, generated)
    rows = read(generated)
    assert networks.read == ["devices=1", *SETTINGS]
    for before, row, setting in zip(old, rows, SETTINGS, strict=True):
        ours, theirs = (images(generated, name).astype(np.float64) for name in (setting, "devices=1"))
        assert float(row["lpips"]) == pytest.approx(np.abs(ours - theirs).mean() / 255, rel=1e-4)
        expected = np.square((ours - theirs).mean((0, 1, 2))).sum()
        assert float(row["fid"]) == pytest.approx(expected, rel=1e-4)
        assert {**row, "lpips": "", "fid": ""} == {**before, "lpips": "", "fid": ""}


@slow
def test_a_missing_network_is_told_once_in_one_line(generated, shallow_checkpoint, networks, monkeypatch, capsys):
    def download(*_, **__):
        raise OSError("<urlopen error [Errno -2] Name or service not known>\nand more")

    monkeypatch.setattr(networks, "build_feature_extractor", download)
    run(shallow_checkpoint, generated)
    printed = capsys.readouterr()
    assert re.fullmatch(r"FID: not available \(<urlopen error .* known>\)[^\n]*\n", printed.err)
    assert {row["fid"] for row in read(generated)} == {"not available"}
    assert all(float(row["lpips"]) >= 0 for row in read(generated))
    assert printed.out.count("| not available |") == len(SETTINGS) - 1


def test_a_metric_that_breaks_down_does_not_end_the_run(tmp_path, networks, capsys):
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "00000.png")
    fid = metrics.OptionalMetric(metrics.Fid)
    assert fid(tmp_path, tmp_path) == fid(tmp_path, tmp_path) == "not available" and not fid.available
    told = capsys.readouterr().err
    assert re.fullmatch(r"FID: not available [^\n]*\n", told)
    says(told, 2)


# What is shown ---------------------------------------------------------------------------------------------------------


def made_up(psnr: float, exactness: str = "lossy", fid_real: str = "", **setting: object) -> dict[str, str]:
    figures = {"psnr": psnr, "ssim": 0.98765, "lpips": "not available", "fid": 6.456, "fid_real": fid_real}
    row = {**dict.fromkeys(COLUMNS, ""), **setting, **figures, "exactness": exactness, "received_bytes": 1.5e6}
    return {column: str(value) for column, value in row.items()}


ROWS = [
    made_up(np.inf, "lossless", devices=1),
    made_up(30.04, parallelism="patch", sync_mode="no_sync", warmup_steps=4, split_batch=False, devices=4),
    made_up(40.0, parallelism="patch", sync_mode="no_sync", warmup_steps=4, split_batch=False, devices=2),
    made_up(np.inf, "lossless", parallelism="patch", sync_mode="full_sync", split_batch=False, devices=4),
    made_up(10.0, parallelism="naive_patch", split_scheme="row", split_batch=False, devices=2),
]


def test_the_table_has_a_line_for_each_mode():
    header, *lines = figures.table(ROWS).splitlines()
    assert header.count("|") == 8
    says(header, "2 / 4", "PSNR, dB", "SSIM", "LPIPS", "FID", "MB")
    assert lines == [
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| `no_sync` | lossy | 40.0 / 30.0 | 0.988 | not available | 6.46 | 1.5 |",
        "| `full_sync` | - / lossless | - / ∞ | - / 0.988 | - / not available | - / 6.46 | - / 1.5 |",
        "| `naive_patch, row` | lossy / - | 10.0 / - | 0.988 / - | not available / - | 6.46 / - | 1.5 / - |",
    ]


def test_axes_with_several_values_are_told_in_the_table():
    rows = [*ROWS, made_up(20.0, parallelism="patch", sync_mode="no_sync", warmup_steps=0, split_batch=True, devices=8)]
    told = ["no_sync", 4, "no CFG"], ["full_sync", "no CFG"], ["naive_patch, row", "no CFG"], ["no_sync", 0, "CFG"]
    for label, facts in zip(figures.groups(rows), told, strict=True):
        says(label, *facts)
    assert len(figures.groups(rows)) == 4


@slow
def test_the_sheet_has_every_mode_below_one_device_with_its_errors(done):
    sheet = np.asarray(Image.open(done / "sheet.png"))
    assert sheet.shape == (6 + len(SETTINGS) * (SIZE + 34), 6 + CAPTIONS * 2 * (SIZE + 6), 3)
    ours, theirs = (images(done, setting)[1] for setting in (LOSSY, "devices=1"))
    top, left = 6 + (SIZE + 34) + 28, 6 + 2 * (SIZE + 6)
    assert np.array_equal(sheet[top : top + SIZE, left : left + SIZE], ours)
    left += SIZE + 6
    error = np.minimum(np.abs(np.int16(ours) - theirs) * 4, 255)
    assert error.max() > 0 and np.array_equal(sheet[top : top + SIZE, left : left + SIZE], error)


@slow
def test_the_plot_has_a_line_for_each_mode_and_a_point_for_each_number_of_devices(done):
    with Image.open(done / "plot.png") as plot:
        assert plot.size == (1080, 660)
    (axes,) = figures.plot(ROWS, "title").axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines == {
        "no_sync": [[1.5, 40.0], [1.5, 30.04]],
        "full_sync (lossless)": [[1.5, 45.0]],  # on the upper edge
        "naive_patch, row": [[1.5, 10.0]],
    }
    assert sorted(text.get_text() for text in axes.texts) == ["2", "2", "4", "4"]


@slow
def test_without_matplotlib_the_table_is_still_printed(generated, shallow_checkpoint, monkeypatch, capsys):
    (generated / "plot.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(shallow_checkpoint, generated)
    printed = capsys.readouterr()
    says(printed.err, "plot.png: not available")
    says(printed.out, "| `full_sync` |", "sheet.png")
    assert not (generated / "plot.png").exists()


def test_a_coco_folder_with_images_gives_the_fid_against_them(tmp_path, shallow_checkpoint, networks, stand_in, capsys):
    folder = coco(tmp_path / "coco", karpathy=False)
    run(shallow_checkpoint, tmp_path / "out", "--coco", str(folder), "--parallelism", "naive_patch")
    assert [texts for _, texts, _ in stand_in.calls[:2]] == [["70 0", "60 1"], ["50 0"] * 2]
    real = tmp_path / "out" / "pictures" / "real"
    assert sorted(path.name for path in real.iterdir()) == ["00000.jpg", "00001.jpg", "00002.jpg"]
    assert real.joinpath("00001.jpg").resolve().name == "COCO_val2014_000000000060.jpg"
    for row in read(tmp_path / "out"):
        ours = images(tmp_path / "out", grid.folder_name(row)).mean((0, 1, 2))
        assert float(row["fid_real"]) == pytest.approx(np.square(ours - (254, 0, 0)).sum(), rel=1e-4)
    says(capsys.readouterr().out, re.compile(r"\| FID, [^|]+ \|"), re.compile(r"\| (one|1) device \|"))
