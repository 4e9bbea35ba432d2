"""What `evaluate.py` is asked for: the grid of settings, prompts from files and from COCO, and flags that are refused."""

from __future__ import annotations

import os
import re

import jax
import numpy as np
import pytest
from coco_folder import coco
from facts import refuses, says
from safetensors.numpy import save_file
from tiny_pipeline import TEXT_WIDTH

from distrijax import DistriConfig, Parallelism, SplitScheme, SyncMode
from distrijax.cli import evaluate
from distrijax.cli.fidelity import grid, prompts
from distrijax.cli.fidelity.results import Results
from distrijax.cli.fidelity.versions import version_of


def test_the_grid_has_every_mode_once():
    found = grid.settings({"warmup_steps": (0, 4)})
    assert len({grid.folder_name(setting) for setting in found}) == len(found)
    assert {setting.get("sync_mode") for setting in found} == {None, *SyncMode}
    assert {setting.get("split_scheme") for setting in found} == {None, *SplitScheme}
    assert {setting.get("parallelism") for setting in found} == {None, *Parallelism}
    displaced, without_modes = len(SyncMode) - 1, len(Parallelism) - 2
    assert len(found) == 1 + 3 * (2 * displaced + 1 + len(SplitScheme) + without_modes)
    assert all(DistriConfig(**setting) for setting in found)


def test_compression_by_itself_is_int8_and_several_are_several_settings():
    def asked(*flags: str) -> list:
        chosen = {"parallelism": ["patch"], "sync_mode": ["async_tokens"], "devices": [8]}
        chosen["compress"] = evaluate.parse(["--compress", *flags] if flags != ("",) else []).compress
        return [setting["compress"] for setting in grid.settings(chosen)[1:]]

    assert asked("") == [None]
    assert asked() == ["int8"]
    assert asked("none", "int8", "int4") == [None, "int8", "int4"]


def test_coco_captions_are_those_of_the_papers_script(tmp_path):
    official = prompts.coco_prompts(coco(tmp_path / "official", karpathy=False), 3)
    assert official.texts == ["70 0", "60 1", "50 0"]
    karpathy = prompts.coco_prompts(coco(tmp_path / "karpathy", karpathy=True), 2)
    assert karpathy.texts == ["K 70 0", "K 60 1"]
    assert [path.name[-6:] for path in karpathy.images] == ["70.jpg", "60.jpg"]


BAD_COCO = {
    "nothing": (lambda folder: folder.mkdir(), ["annotations/captions_val2014.json"]),
    "too few": (lambda folder: coco(folder, karpathy=False), [3, "--captions"]),
    "no image": (lambda folder: coco(folder, karpathy=True, images=1), [2, re.compile(r"COCO_val2014_\d+\.jpg")]),
    "other file": (
        lambda folder: (coco(folder, karpathy=False) / "annotations/captions_val2014.json").write_text("[]"),
        ["captions_val2014.json", "COCO"],
    ),
}


@pytest.mark.parametrize("kind", BAD_COCO)
def test_a_folder_that_is_not_cocos_is_refused_in_one_sentence(kind, tmp_path):
    make, told = BAD_COCO[kind]
    make(tmp_path / "coco")
    with refuses(*told):
        prompts.coco_prompts(tmp_path / "coco", 4 if kind == "too few" else 3)


WRONG = {
    "one device": ("--devices 1", ["--devices", 1, 2]),
    "too many devices": ("--devices 2 9", ["--devices", 9, 8, "virtual CPU"]),
    "unknown mode": ("--sync-mode fast", ["--sync-mode", "fast", "no_sync"]),
    "no captions": ("--captions 0", ["--captions", 0, 1]),
    "no steps": ("--num-inference-steps 0", ["--num-inference-steps", 0, 1]),
    "odd size": ("--devices 8 --image-size 65", ["height", 65, 8, 64, 72]),
    "three sizes": ("--image-size 64 64 64", ["--image-size", "H W", 3]),
    "warm-up": ("--warmup-steps -1", ["warmup_steps", -1, 0]),
    "no file": ("--prompts nowhere.txt", ["--prompts", "nowhere.txt", "file"]),
    "short file": ("--prompts two.txt --captions 3", ["--prompts", "two.txt", 2, 3, "--captions"]),
    "two sources": ("--prompts two.txt --coco .", ["--coco", "--prompts"]),
    "a file for a folder": ("--output two.txt", ["--output", "two.txt", "File exists"]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_flag_ends_in_one_line_before_anything_is_generated(
    kind, shallow_checkpoint, tmp_path, monkeypatch, capsys
):
    flags, told = WRONG[kind]
    assert len(jax.devices()) == 8  # else the script would have as many as it asks for
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(evaluate, "load_pipeline", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "two.txt").write_text("one\n\ntwo\n")
    with pytest.raises(SystemExit) as end:
        evaluate.main(
            [
                "--model",
                str(shallow_checkpoint),
                "--captions",
                "2",
                "--devices",
                "2",
                "--image-size",
                "64",
                *flags.split(),
            ]
        )
    printed = end.value.code + "\n" if isinstance(end.value.code, str) else capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]*\n", printed), printed
    says(printed, *told)
    assert [path.name for path in tmp_path.iterdir()] == ["two.txt"]


def test_prompts_of_a_file_are_its_lines(tmp_path):
    (tmp_path / "prompts.txt").write_text("a ★\n\n b \nc\n", encoding="utf-8")
    assert prompts.file_prompts(tmp_path / "prompts.txt", None).texts == ["a ★", "b", "c"]
    assert prompts.file_prompts(tmp_path / "prompts.txt", 2).texts == ["a ★", "b"]


@pytest.fixture
def adapted(tiny_sd_checkpoints, tmp_path) -> list[str]:
    """Flags of a model with an embedding and a VAE on top; the embedding's file is `tmp_path / "word.safetensors"`."""
    save_file({"<thing>": np.ones((1, TEXT_WIDTH), np.float32)}, tmp_path / "word.safetensors")
    model = tiny_sd_checkpoints[1]
    return ["--model", str(model), "--embedding", f"{tmp_path / 'word.safetensors'}:<thing>", "--vae", f"{model}/vae"]


def open_results(folder, *flags: str) -> None:
    Results(folder, evaluate._common(evaluate.read_job(evaluate.parse(flags), prompts.scene_prompts(1))))


def test_results_of_an_adapted_model_are_gone_on_with_and_not_mixed_with_others(adapted, tmp_path):
    output, word = tmp_path / "results", tmp_path / "word.safetensors"
    open_results(output, *adapted)
    open_results(output, *adapted)
    for fewer, told in ((adapted[:-2], "vae"), ([*adapted[:2], *adapted[4:]], "embeddings")):
        with refuses("--output", told):
            open_results(output, *fewer)
    os.utime(word, (1, 1))
    with refuses("--output", "version of embedding", str(word), "1970"):
        open_results(output, *adapted)


def test_the_version_of_a_model_is_the_hubs_commit_or_the_state_of_its_files(tmp_path):
    commit = tmp_path / "models--owner--name" / "snapshots" / "0123abcd"
    model = tmp_path / "model"
    for folder in (commit, model):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "weights").write_bytes(b"1234")
    assert version_of(commit) == version_of(commit / "unet" / "weights") == "commit 0123abcd"
    before = version_of(model)
    (model / "results").mkdir()
    (model / "results" / "picture").write_bytes(b"1")
    assert version_of(model) == before
    (model / "unet" / "weights").write_bytes(b"123")
    assert version_of(model) != before
