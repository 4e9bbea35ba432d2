"""The fidelity table: what is painted, measured, kept and shown, with a small random checkpoint on virtual devices."""

from __future__ import annotations

import csv
import json
import re
import sys
import types
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from fidelity import grid, metrics, prompts
from fidelity.results import Results
from PIL import Image
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from distrijax import DistriConfig, DistriError, DistriSDXLPipeline, Parallelism, SplitScheme, SyncMode
from distrijax.pipeline import to_pil

CAPTIONS, STEPS, SIZE = 3, 3, 64
GRID = "--devices 2 --sync-mode corrected_async_gn full_sync --split-scheme row --warmup-steps 0"
SETTINGS = {
    "devices=1": "lossless",
    "parallelism=patch,sync_mode=corrected_async_gn,warmup_steps=0,split_batch=False,devices=2": "lossy",
    "parallelism=patch,sync_mode=full_sync,split_batch=False,devices=2": "lossless",
    "parallelism=naive_patch,split_scheme=row,split_batch=False,devices=2": "lossy",
}
LOSSY = list(SETTINGS)[1]


def run(model: Path, output: Path, *flags: str) -> None:
    """The script, with prompts in batches of two, so that the last batch is not full."""
    shared = f"--captions {CAPTIONS} --num-inference-steps {STEPS} --image-size {SIZE} --batch 2 {GRID}".split()
    evaluate.main(["--model", str(model), "--output", str(output), *shared, *flags])


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "fidelity.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def pictures(folder: Path, setting: str) -> np.ndarray:
    files = sorted((folder / "pictures" / setting).iterdir())
    assert [file.name for file in files] == [f"{index:05}.png" for index in range(CAPTIONS)]
    return np.stack([np.asarray(Image.open(file)) for file in files])


@pytest.fixture(autouse=True)
def no_networks(monkeypatch):
    """The networks of LPIPS and FID are not to be had, whatever is installed; compiled programs stay in pytest's cache."""
    monkeypatch.setattr(evaluate, "keep_compiled_programs", lambda: None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image", None)
    monkeypatch.setitem(sys.modules, "cleanfid", None)


@pytest.fixture(scope="module")
def done(tiny_checkpoint, tmp_path_factory) -> Path:
    """The folder of a finished run; tests share it, so leave it as it is."""
    folder = tmp_path_factory.mktemp("evaluate") / "fidelity"
    with pytest.MonkeyPatch.context() as patch:
        no_networks.__wrapped__(patch)
        run(tiny_checkpoint, folder)
    return folder


# What is painted and measured ------------------------------------------------------------------------------------------


def test_each_setting_has_one_row_and_is_called_lossless_or_lossy(done):
    rows = read(done)
    assert {grid.folder_name(row): row["exactness"] for row in rows} == SETTINGS
    one, displaced, synchronous, naive = rows
    assert (one["psnr"], one["ssim"], one["received_bytes"], one["stale_bytes"]) == ("inf", "1", "0", "0")
    assert float(synchronous["psnr"]) > 60 > float(displaced["psnr"]) > float(naive["psnr"]) > 0
    assert int(displaced["stale_bytes"]) > 0 == int(synchronous["stale_bytes"])
    assert int(displaced["received_bytes"]) > 0 == int(naive["received_bytes"])
    assert {row[name] for row in rows for name in ("lpips", "fid")} == {"not available"}


def test_pictures_are_the_pipelines_each_from_the_seed_of_its_index(done, tiny_checkpoint):
    config = DistriConfig(devices=2, warmup_steps=0, split_batch=False)
    pipe = DistriSDXLPipeline.from_pretrained(tiny_checkpoint, config, scheduler="ddim")
    texts = prompts.scene_prompts(CAPTIONS).texts
    call = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "guidance_scale": 5.0, "chunk_size": None}
    expected = pipe([texts[2]] * 2, **call, seed=[2, 9], output_type="np").images
    difference = np.int16(np.asarray(to_pil(expected)[0])) - pictures(done, LOSSY)[2]
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("row", range(1, len(SETTINGS)))
def test_psnr_and_ssim_of_a_row_are_torchmetrics(done, row):
    ours, theirs = (
        torch.from_numpy(pictures(done, setting)).permute(0, 3, 1, 2).double()
        for setting in (list(SETTINGS)[row], "devices=1")
    )
    found = read(done)[row]
    assert float(found["psnr"]) == pytest.approx(PeakSignalNoiseRatio(data_range=255.0)(ours, theirs).item(), rel=1e-4)
    similarity = StructuralSimilarityIndexMeasure(data_range=255.0)(ours, theirs).item()
    assert float(found["ssim"]) == pytest.approx(similarity, abs=1e-4)


def test_psnr_is_the_mean_over_groups_of_64_pictures_as_in_the_papers_script():
    errors = np.random.default_rng(0).uniform(1, 1000, 150)
    groups = [10 * np.log10(255**2 / errors[start : start + 64].mean()) for start in (0, 64, 128)]
    assert metrics.psnr(errors) == pytest.approx((64 * groups[0] + 64 * groups[1] + 22 * groups[2]) / 150)
    assert metrics.psnr([0.0, 0.0]) == np.inf


@pytest.mark.parametrize("shape", [(2, 24, 40, 3), (1, 11, 11, 3)])
def test_ssim_is_torchmetrics(shape):
    draw = np.random.default_rng(0)
    reference = draw.random(shape, np.float32)
    near = np.clip(reference + draw.normal(0, 0.2, shape), 0, 1).astype(np.float32)
    theirs = StructuralSimilarityIndexMeasure(data_range=1.0, reduction="none")
    expected = theirs(*(torch.from_numpy(part).permute(0, 3, 1, 2) for part in (near, reference)))
    assert np.allclose(metrics.ssim(near, reference), expected.reshape(-1), atol=1e-4)


# Going on --------------------------------------------------------------------------------------------------------------


def refuse(*_, **__):
    raise AssertionError("this was painted before")


def test_nothing_is_painted_twice(done, tiny_checkpoint, monkeypatch):
    before = (done / "fidelity.csv").read_bytes()
    monkeypatch.setattr(evaluate.DistriSDXLPipeline, "from_pretrained", refuse)
    monkeypatch.setattr(evaluate, "measure", refuse)
    run(tiny_checkpoint, done)
    assert (done / "fidelity.csv").read_bytes() == before


def test_an_interrupted_run_goes_on_and_gives_the_same_files(done, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    save, saved = Results.save, []

    def interrupt(results, setting, index, picture):
        if len(saved) == CAPTIONS + 2:  # one device's are there, and the first batch of the next setting
            saved.append("interrupted")
            raise KeyboardInterrupt
        save(results, setting, index, picture)
        saved.append((grid.folder_name(setting), index))

    monkeypatch.setattr(Results, "save", interrupt)
    with pytest.raises(SystemExit) as end:
        run(tiny_checkpoint, tmp_path)
    assert end.value.code == 130 and capsys.readouterr().err.endswith("interrupted\n")
    assert [row["devices"] for row in read(tmp_path)] == ["1"]
    run(tiny_checkpoint, tmp_path)
    assert len(saved) == len(set(saved)) == len(SETTINGS) * CAPTIONS + 1
    assert (tmp_path / "fidelity.csv").read_bytes() == (done / "fidelity.csv").read_bytes()
    for setting in SETTINGS:
        assert np.array_equal(pictures(tmp_path, setting), pictures(done, setting))


OTHERS = {
    "steps": ("--num-inference-steps 4", r"other num_inference_steps \(3, now 4\)"),
    "prompts": ("--captions 2", "other prompts"),
    "scheduler": ("--scheduler euler", r"other scheduler \(ddim, now euler\)"),
    "size": ("--image-size 64 96", r"other width \(64, now 96\)"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_results_of_other_runs_are_not_mixed(kind, done, tiny_checkpoint, monkeypatch):
    flags, pattern = OTHERS[kind]
    before = {path: path.read_bytes() for path in done.glob("*.*")}
    monkeypatch.setattr(evaluate.DistriSDXLPipeline, "from_pretrained", refuse)
    with pytest.raises(SystemExit, match=rf"^error: --output .* was made with {pattern}; choose another folder"):
        run(tiny_checkpoint, done, *flags.split())
    assert {path: path.read_bytes() for path in done.glob("*.*")} == before


def test_a_table_with_other_columns_is_not_written_to(tmp_path):
    Results(tmp_path, {"model": "embedded"})
    (tmp_path / "fidelity.csv").write_text("mode,psnr\n")
    with pytest.raises(DistriError, match=r"has other columns .*; choose another --output"):
        Results(tmp_path, {"model": "embedded"})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(DistriError, match=r"does not say what it was made with; choose another --output"):
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
def painted(done, tmp_path) -> Path:
    """A folder that has the pictures and rows of `done`, to go on with."""
    for path in (path for path in done.rglob("*") if path.is_file()):
        copy = tmp_path / "fidelity" / path.relative_to(done)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path / "fidelity"


def test_rows_without_lpips_and_fid_get_them_once_they_can_be_had(painted, tiny_checkpoint, networks, monkeypatch):
    monkeypatch.setattr(evaluate.DistriSDXLPipeline, "from_pretrained", refuse)
    old = read(painted)
    run(tiny_checkpoint, painted)
    rows = read(painted)
    assert networks.read == ["devices=1", *SETTINGS]
    for before, row, setting in zip(old, rows, SETTINGS, strict=True):
        ours, theirs = (pictures(painted, name).astype(np.float64) for name in (setting, "devices=1"))
        assert float(row["lpips"]) == pytest.approx(np.abs(ours - theirs).mean() / 255, rel=1e-4)
        expected = np.square((ours - theirs).mean((0, 1, 2))).sum()
        assert float(row["fid"]) == pytest.approx(expected, rel=1e-4)
        assert {**row, "lpips": "", "fid": ""} == {**before, "lpips": "", "fid": ""}


def test_a_missing_network_is_told_once_in_one_line(painted, tiny_checkpoint, networks, monkeypatch, capsys):
    def download(*_, **__):
        raise OSError("<urlopen error [Errno -2] Name or service not known>\nand more")

    monkeypatch.setattr(networks, "build_feature_extractor", download)
    run(tiny_checkpoint, painted)
    printed = capsys.readouterr()
    assert re.fullmatch(r"FID: not available \(<urlopen error .* known>\); it needs [^\n]*\n", printed.err)
    assert {row["fid"] for row in read(painted)} == {"not available"}
    assert all(float(row["lpips"]) >= 0 for row in read(painted))
    assert printed.out.count("| not available |") == len(SETTINGS) - 1


def test_a_metric_that_breaks_down_does_not_end_the_run(tmp_path, networks, capsys):
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "00000.png")
    fid = metrics.Optional(metrics.Fid)
    assert fid(tmp_path, tmp_path) == fid(tmp_path, tmp_path) == "not available" and not fid.available
    assert capsys.readouterr().err == "FID: not available (one picture has no spread; paint at least 2)\n"


# What is shown ---------------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_mode(painted, tiny_checkpoint, monkeypatch, capsys):
    run(tiny_checkpoint, painted, "--devices", "2", "4", "--parallelism", "naive_patch")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| on 2 / 4 devices | ")
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "`corrected_async_gn`",
        "`full_sync`",
        "`naive_patch, row`",
    ]
    assert len({line.count("|") for line in lines}) == 1
    two, four = (f"{float(row['psnr']):.1f}" for row in read(painted)[3:])
    assert f"| lossy | {two} / {four} |" in lines[4]
    assert f"| {float(read(painted)[1]['psnr']):.1f} / - |" in lines[2]


def test_the_sheet_has_every_mode_below_one_device_with_its_errors(done):
    sheet = np.asarray(Image.open(done / "sheet.png"))
    assert sheet.shape == (6 + 4 * (SIZE + 34), 6 + CAPTIONS * 2 * (SIZE + 6), 3)
    ours, theirs = (pictures(done, setting)[1] for setting in (LOSSY, "devices=1"))
    top, left = 6 + (SIZE + 34) + 28, 6 + 2 * (SIZE + 6)
    assert np.array_equal(sheet[top : top + SIZE, left : left + SIZE], ours)
    left += SIZE + 6
    error = np.minimum(np.abs(np.int16(ours) - theirs) * 4, 255)
    assert error.max() > 0 and np.array_equal(sheet[top : top + SIZE, left : left + SIZE], error)


def test_the_plot_is_there(done):
    plot = Image.open(done / "plot.png")
    assert plot.size == (1080, 660)
    assert len(plot.convert("RGB").getcolors(2**20)) > 20


def test_without_matplotlib_the_table_is_still_printed(painted, tiny_checkpoint, monkeypatch, capsys):
    (painted / "plot.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(tiny_checkpoint, painted)
    printed = capsys.readouterr()
    assert "plot.png: not available" in printed.err and "| `full_sync` |" in printed.out
    assert not (painted / "plot.png").exists()


# Grid, prompts and flags -----------------------------------------------------------------------------------------------


def test_the_grid_has_every_mode_once():
    found = grid.settings({"warmup_steps": (0, 4)})
    assert len({grid.folder_name(setting) for setting in found}) == len(found)
    assert {setting.get("sync_mode") for setting in found} == {None, *SyncMode}
    assert {setting.get("split_scheme") for setting in found} == {None, *SplitScheme}
    assert {setting.get("parallelism") for setting in found} == {None, *Parallelism}
    displaced = len(SyncMode) - 1
    assert len(found) == 1 + 3 * (2 * displaced + 1 + len(SplitScheme))
    assert all(DistriConfig(**setting) for setting in found)


def coco(folder: Path, *, karpathy: bool, pictures: int = 3) -> Path:
    """A made-up COCO folder: pictures 70, 60, 50 with two captions each; Karpathy's file has one more, for training."""
    ids = [70 - 10 * index for index in range(3)]
    files = {ids[index]: f"COCO_val2014_{ids[index]:012}.jpg" for index in range(3)}
    captions = [{"id": 9 - 2 * n + k, "image_id": i, "caption": f"{i} {k}"} for n, i in enumerate(ids) for k in (1, 0)]
    official = {"images": [{"id": i, "file_name": file} for i, file in files.items()], "annotations": captions}
    split = [{"split": "restval", "filename": "other.jpg", "sentences": [{"raw": "no"}]}]
    split += [
        {"split": "val", "filename": file, "sentences": [{"raw": f"K {i} {k} "} for k in (0, 1)]}
        for i, file in files.items()
    ]
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(official))
    if karpathy:
        (folder / "annotations" / "dataset_coco.json").write_text(json.dumps({"images": split}))
    (folder / "val2014").mkdir()
    for file in list(files.values())[:pictures]:
        Image.new("RGB", (40, 30), "red").save(folder / "val2014" / file)
    return folder


def test_coco_captions_are_those_of_the_papers_script(tmp_path):
    official = prompts.coco_prompts(coco(tmp_path / "official", karpathy=False), 3)
    assert official.texts == ["70 0", "60 1", "50 0"]
    karpathy = prompts.coco_prompts(coco(tmp_path / "karpathy", karpathy=True), 2)
    assert karpathy.texts == ["K 70 0", "K 60 1"]
    assert [path.name[-6:] for path in karpathy.pictures] == ["70.jpg", "60.jpg"]


def test_a_coco_folder_with_pictures_gives_the_fid_against_them(tmp_path, tiny_checkpoint, networks, capsys):
    folder = coco(tmp_path / "coco", karpathy=False)
    run(tiny_checkpoint, tmp_path / "out", "--coco", str(folder), "--parallelism", "naive_patch")
    real = tmp_path / "out" / "pictures" / "real"
    assert sorted(path.name for path in real.iterdir()) == ["00000.jpg", "00001.jpg", "00002.jpg"]
    assert real.joinpath("00001.jpg").resolve().name == "COCO_val2014_000000000060.jpg"
    for row in read(tmp_path / "out"):
        ours = pictures(tmp_path / "out", grid.folder_name(row)).mean((0, 1, 2))
        assert float(row["fid_real"]) == pytest.approx(np.square(ours - (254, 0, 0)).sum(), rel=1e-4)
    assert "FID, real pictures" in (printed := capsys.readouterr().out) and "| one device |" in printed


BAD_COCO = {
    "nothing": (lambda folder: folder.mkdir(), "has neither .* nor annotations/captions_val2014.json; unpack"),
    "too few": (lambda folder: coco(folder, karpathy=False), "has captions of 3 pictures; lower --captions"),
    "no picture": (lambda folder: coco(folder, karpathy=True, pictures=1), "2 pictures are not there, .*; unpack"),
    "other file": (
        lambda folder: (coco(folder, karpathy=False) / "annotations/captions_val2014.json").write_text("[]"),
        "is not COCO's file of captions .*; download",
    ),
}


@pytest.mark.parametrize("kind", BAD_COCO)
def test_a_folder_that_is_not_cocos_is_refused_in_one_sentence(kind, tmp_path):
    make, pattern = BAD_COCO[kind]
    make(tmp_path / "coco")
    with pytest.raises(DistriError, match=pattern) as error:
        prompts.coco_prompts(tmp_path / "coco", 4 if kind == "too few" else 3)
    assert "\n" not in str(error.value)


WRONG = {
    "one device": ("--devices 1", "--devices is 1; one device is always painted, so give 2 or more"),
    "too many devices": ("--devices 2 9", r"--devices is 9 and this machine shows 8 \(virtual CPU\); use"),
    "unknown mode": ("--sync-mode fast", "argument --sync-mode: invalid .*choose from"),
    "no captions": ("--captions 0", "--captions is 0; give a whole number of at least 1"),
    "no steps": ("--num-inference-steps 0", "--num-inference-steps is 0; give a whole number of at least 1"),
    "odd size": ("--devices 8 --image-size 64", "height is 64 and 8 patches need a multiple of 256; use 256"),
    "three sizes": ("--image-size 64 64 64", "--image-size takes H or H W, not 3 numbers"),
    "warm-up": ("--warmup-steps -1", "warmup_steps is -1; give a whole number of at least 0"),
    "no file": ("--prompts nowhere.txt", "--prompts nowhere.txt cannot be read .*; give a text file"),
    "short file": (
        "--prompts two.txt --captions 3",
        "--prompts two.txt has 2 prompts; give at least 3, or lower --captions",
    ),
    "two sources": ("--prompts two.txt --coco .", "argument --coco: not allowed with argument --prompts"),
    "a file for a folder": (
        "--output two.txt",
        r"--output two.txt cannot be made \(File exists\); choose another folder",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_flag_ends_in_one_line_before_anything_is_painted(kind, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    flags, pattern = WRONG[kind]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.DistriSDXLPipeline, "from_pretrained", refuse)
    (tmp_path / "two.txt").write_text("one\n\ntwo\n")
    with pytest.raises(SystemExit) as end:
        evaluate.main(
            ["--model", str(tiny_checkpoint), "--captions", "2", "--devices", "2", "--image-size", "64", *flags.split()]
        )
    printed = end.value.code + "\n" if isinstance(end.value.code, str) else capsys.readouterr().err
    assert re.fullmatch(rf"error: [^\n]*{pattern}[^\n]*\n", printed), printed
    assert [path.name for path in tmp_path.iterdir()] == ["two.txt"]


def test_prompts_of_a_file_are_its_lines(tmp_path):
    (tmp_path / "prompts.txt").write_text("a ★\n\n b \nc\n", encoding="utf-8")
    assert prompts.file_prompts(tmp_path / "prompts.txt", None).texts == ["a ★", "b", "c"]
    assert prompts.file_prompts(tmp_path / "prompts.txt", 2).texts == ["a ★", "b"]
