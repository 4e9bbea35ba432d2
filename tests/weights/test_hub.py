"""Of a model on the hub only what is needed is fetched; what can't be had is told in a sentence. No test asks the hub."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from facts import refuses
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from distrijax.models.families import PARTS
from distrijax.weights import hub
from distrijax.weights.hub import Remote, find, parse_remote

STEM = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "safety_checker/model")
TEXTS = ["unet/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"]
SD15 = [
    *(stem + end for stem in STEM for end in (".safetensors", ".fp16.safetensors")),
    *(
        stem.replace("text_encoder/model", "text_encoder/pytorch_model") + end
        for stem in STEM
        for end in (".bin", ".fp16.bin")
    ),
    *TEXTS,
    "model_index.json",
    "v1-5-pruned.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/openvino_model.bin",
    "unet/sub/config.json",
    "README.md",
]
"""Of what the hub has of Stable Diffusion 1.5."""


@pytest.fixture
def repository(monkeypatch):
    """Makes the hub a repository of some files, and collects what is fetched of it."""
    fetched: list[str] = []

    def install(files: list[str]) -> list[str]:
        def download(name, *, allow_patterns, revision, token, **_) -> str:
            fetched.extend(filter_repo_objects(files, allow_patterns=allow_patterns))
            return "somewhere"

        monkeypatch.setattr(hub, "constants", SimpleNamespace(HF_HUB_OFFLINE=False))
        monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda self, *_, **__: files)
        monkeypatch.setattr(hub, "snapshot_download", download)
        return fetched

    return install


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_of_a_pipeline_only_what_is_needed_is_fetched(repository, variant):
    fetched = repository(SD15)
    assert find("owner/model", parts=PARTS, variant=variant) == Path("somewhere")
    end = f".{variant}.safetensors" if variant else ".safetensors"
    assert sorted(fetched) == sorted([*TEXTS, "model_index.json", *[stem + end for stem in STEM[:3]]])


def test_of_parts_without_the_variant_the_plain_weights_are_fetched(repository):
    files = [f"unet/{STEM[0][5:]}.{end}" for end in ("safetensors", "fp16.safetensors", "fp16.bin")]
    files += [f"vae/diffusion_pytorch_model.{end}" for end in ("safetensors", "bin", "fp16.bin")]
    files += ["text_encoder/model.safetensors", "text_encoder/config.json", "model_index.json"]
    fetched = repository(files)
    find("owner/model", parts=PARTS, variant="fp16")
    both = {"model_index.json", "text_encoder/config.json", "text_encoder/model.safetensors", files[1]}
    assert set(fetched) == {*both, "vae/diffusion_pytorch_model.fp16.bin"}


@pytest.mark.parametrize(
    ("files", "variant", "told"),
    [
        (SD15, "fp8", ["owner/model", "safetensors", "'fp8'", "model.safetensors", "2 more"]),
        (
            ["vae/config.json", "vae/model.fp16.safetensors", "model_index.json"],
            None,
            ["owner/model/vae", "safetensors", "model.fp16.safetensors"],
        ),
        (
            ["vae/config.json", "vae/model.fp16.safetensors", "unet/model.bf16.safetensors", "model_index.json"],
            "bf16",
            ["owner/model/vae", "safetensors", "'bf16'", "model.fp16.safetensors"],
        ),
        (["unet/config.json", "model_index.json"], "fp16", ["owner/model/unet", "safetensors", "no weights"]),
    ],
)
def test_weights_that_are_not_there_are_told_before_any_is_fetched(repository, files, variant, told):
    fetched = repository(files)
    with refuses(*told):
        find("owner/model", parts=PARTS, variant=variant)
    assert not fetched


def test_configurations_are_fetched_without_weights(repository):
    fetched = repository(SD15)
    assert find("owner/model", parts=PARTS, variant="fp16", weights=False) == Path("somewhere")
    assert sorted(fetched) == sorted([*TEXTS, "model_index.json"])


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors"])
def test_shards_of_the_variant_are_fetched_with_their_index(repository, name):
    variant = "fp16" if "fp16" in name else None
    others = ["text_encoder/model-00001-of-00002.safetensors", "text_encoder/model.fp16-00001-of-00002.safetensors"]
    index = "text_encoder/model.safetensors.index.json"
    fetched = repository(["model_index.json", index, *others])
    find("owner/model", parts=PARTS, variant=variant)
    assert sorted(fetched) == sorted(["model_index.json", index, f"text_encoder/{name}"])


def test_other_formats_are_fetched_where_there_is_no_better_one(repository):
    files = ["model_index.json", "unet/diffusion_pytorch_model.bin", "vae/diffusion_flax_model.msgpack"]
    files += ["vae/diffusion_pytorch_model.bin"]
    fetched = repository(files)
    find("owner/model", parts=PARTS)
    assert sorted(fetched) == sorted(file for file in files if "flax" not in file)


def test_a_repository_of_single_files_says_how_to_name_one(repository):
    repository(["README.md", "dream.safetensors"])
    with refuses("owner/model", "owner/model/dream.safetensors"):
        find("owner/model", parts=PARTS)


@pytest.mark.parametrize(
    "name, remote",
    {
        "owner/model": Remote("owner/model", None, None),
        "owner/model/a.safetensors": Remote("owner/model", None, "a.safetensors"),
        "hf://owner/model": Remote("owner/model", None, None),
        "hf://owner/model@v2/sub/a.ckpt": Remote("owner/model", "v2", "sub/a.ckpt"),
        "https://huggingface.co/owner/model/blob/main/a.safetensors": Remote("owner/model", "main", "a.safetensors"),
        "https://huggingface.co/owner/model": Remote("owner/model", None, None),
        "./owner/model": None,
        "/owner/model": None,
        "model": None,
        "https://example.org/owner/model": None,
    }.items(),
)
def test_names_on_the_hub_are_told_from_paths(name, remote):
    assert parse_remote(name) == remote


@pytest.mark.parametrize(
    "name",
    [
        "./nowhere",
        "nowhere",
        "nowhere/a.safetensors",
        "nowhere/a.ckpt",
        "nowhere/a.bin",
        "~/nowhere",
        "https://example.org/owner/model",
    ],
)
def test_what_is_neither_here_nor_a_name_on_the_hub_is_refused(name):
    with refuses(name, "file", "folder", "hub"):
        find(name, parts=PARTS)


def test_a_hub_id_whose_owner_is_also_a_folder_here_is_told_how_to_be_fetched(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    fetched = repository(["model_index.json"])
    with refuses("owner", "model", "hf://owner/model"):
        find("owner/model", parts=PARTS)
    assert not fetched
    find("hf://owner/model", parts=PARTS)
    assert fetched == ["model_index.json"]


def test_a_file_is_fetched_alone(monkeypatch):
    monkeypatch.setattr(hub, "hf_hub_download", lambda repository, file, **_: f"/cache/{repository}/{file}")
    assert find("hf://owner/model/a.safetensors", parts=PARTS) == Path("/cache/owner/model/a.safetensors")


@pytest.mark.parametrize(
    "kind, told",
    {
        GatedRepoError: ["gated", "hub", "`hf auth login`", "HF_TOKEN"],
        RepositoryNotFoundError: ["public", "private", "hub", "token"],
        HFValidationError: ["name", "hub"],
        EntryNotFoundError: ["files"],
        LocalEntryNotFoundError: ["hub", "path"],
        ConnectionError: ["hub", "no network"],
    }.items(),
)
def test_the_hubs_refusals_are_sentences(monkeypatch, kind, told):
    error = kind.__new__(kind)  # the HTTP client's response, which some want, depends on the library's version
    error.args = ("no network",)

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with refuses("owner/model", *told):
        find("owner/model/a.safetensors", parts=PARTS)


def test_offline_takes_what_was_fetched_before():
    """The tests run with HF_HUB_OFFLINE."""
    with refuses("owner/model", "hub") as caught:
        find("owner/model", parts=PARTS)
    assert "local_files_only" not in str(caught.value)
