"""Adapters merged by distrijax.convert.adapters.lora, against torch diffusers with the same adapter loaded by PEFT."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from adapters import (
    ATTENTION,
    CONVOLUTIONS,
    LINEAR,
    TEXT,
    add_adapter,
    changed,
    checkpoint_of,
    file_tensors,
    fused,
    largest_difference,
    merged_by_peft,
    save_adapter,
    tensors_of,
)
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_state_dict_to_kohya
from facts import refuses, warns
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from original_layouts import original, unread
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_pipeline import load_torch_pipeline
from torch.nn.functional import conv2d

from distrijax.convert.adapters.lora import Lora, with_loras
from distrijax.convert.adapters.lora_names import spellings
from distrijax.convert.adapters.merging import LORA, Change, merged
from distrijax.convert.cache import fingerprint
from distrijax.convert.checkpoint import Checkpoint
from distrijax.convert.layouts.family import UNET
from distrijax.convert.layouts.original import from_original
from distrijax.convert.layouts.original_unet import UNetLayout, unet_table
from distrijax.convert.sources import Found, Recipe, assemble
from distrijax.convert.tensors import Tensor, Tensors, of_array
from distrijax.weights import hub

Weights = dict[str, dict[str, np.ndarray]]
CLOSE = 5e-6
"""Largest difference of weights near 1, both merged in float32."""


@pytest.fixture(scope="module")
def xl(tiny_checkpoint) -> Checkpoint:
    return checkpoint_of(tiny_checkpoint)


@pytest.fixture(scope="module")
def sd(tiny_sd_checkpoints) -> Checkpoint:
    return checkpoint_of(tiny_sd_checkpoints[1])


def unet_lora(**options) -> LoraConfig:
    modules = ATTENTION + LINEAR + (CONVOLUTIONS if options.pop("convolutions", False) else [])
    return LoraConfig(r=4, target_modules=modules, **{"lora_alpha": 6, **options})


def text_lora(**options) -> LoraConfig:
    return LoraConfig(r=3, target_modules=TEXT, **{"lora_alpha": 2, **options})


def saved(checkpoint: Path, folder: Path, configs: dict[str, LoraConfig], seed: int) -> tuple[Path, Weights]:
    """An adapter as diffusers saves it, and the weights that it leads to: the UNet as diffusers loads it from the file, the
    text encoders as PEFT merges them where they were made."""
    pipe = load_torch_pipeline(checkpoint)
    torch.manual_seed(seed)
    add_adapter(pipe, "one", configs)
    file = save_adapter(pipe, "one", list(configs), folder)
    expected = fused(pipe, [part for part in configs if part != "unet"])
    return file, {"unet": merged_by_peft(loaded_unet(checkpoint, {file: 1.0}))} | expected


def loaded_unet(checkpoint: Path, files: dict[Path, float]) -> torch.nn.Module:
    """The UNet of a pipeline with adapters that diffusers has loaded, with their weights."""
    pipe = load_torch_pipeline(checkpoint)
    for number, file in enumerate(files):
        metadata = json.loads(file_tensors(file)[1]["lora_adapter_metadata"])
        state = {name: tensor for name, tensor in load_file(file).items() if name.startswith("unet.")}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the second adapter is meant
            pipe.load_lora_into_unet(
                state, network_alphas=None, unet=pipe.unet, adapter_name=f"n{number}", metadata=metadata
            )
    pipe.unet.set_adapters([f"n{number}" for number in range(len(files))], list(files.values()))
    return pipe.unet


@pytest.fixture(scope="module")
def xl_saved(tiny_checkpoint, tmp_path_factory) -> tuple[Path, Weights]:
    """A LoCon of all three models of SDXL."""
    configs = {
        "unet": unet_lora(convolutions=True, alpha_pattern={"to_q": 3, "attn2.to_k": 11}),
        "text_encoder": text_lora(),
        "text_encoder_2": text_lora(lora_alpha=5),
    }
    return saved(tiny_checkpoint, tmp_path_factory.mktemp("xl_lora"), configs, 1)


@pytest.fixture(scope="module")
def xl_file(xl_saved) -> Path:
    return xl_saved[0]


@pytest.fixture(scope="module")
def xl_expected(xl_saved) -> Weights:
    return xl_saved[1]


def to_kohya(file: Path, prefixes: dict[str, str]) -> Tensors:
    """A file of diffusers in kohya's naming, by diffusers' converter; alpha as its metadata says, DoRA's lengths dropped."""
    state = {name: tensor for name, tensor in load_file(file).items() if "magnitude" not in name}
    state = convert_state_dict_to_kohya(state)
    settings = json.loads(file_tensors(file)[1]["lora_adapter_metadata"])
    named = {}
    for name, tensor in state.items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        if name.endswith(".alpha"):
            tensor = torch.tensor(float(alpha_of(name, prefixes[prefix], settings)))
        named[name] = tensor
    return tensors_of(named)


def alpha_of(name: str, part: str, settings: dict) -> float:
    module = name.removesuffix(".alpha")
    ends = {key.replace(".", "_"): value for key, value in (settings.get(f"{part}.alpha_pattern") or {}).items()}
    return next((value for end, value in ends.items() if module.endswith(f"_{end}")), settings[f"{part}.lora_alpha"])


KOHYA = {"lora_te2_": "text_encoder_2", "lora_te1_": "text_encoder", "lora_unet_": "unet"}


def test_diffusers_file_of_three_models_merges_as_by_peft(xl, xl_file, xl_expected):
    tensors, metadata = file_tensors(xl_file)
    ours = with_loras(xl, [Lora(tensors, "a LoRA", metadata=metadata)])
    assert len(changed(xl, ours)) == sum(name.endswith("lora_A.weight") for name in tensors) > 150
    assert largest_difference(ours, xl_expected) < CLOSE


def test_kohya_file_merges_as_the_diffusers_one(xl, xl_file, xl_expected):
    ours = with_loras(xl, [Lora(to_kohya(xl_file, KOHYA), "a LoRA")])
    assert largest_difference(ours, xl_expected) < CLOSE


def test_sgm_block_names_merge_as_the_diffusers_ones(xl, xl_file, xl_expected):
    table = unet_table(UNetLayout.of_ours(xl.tensors["unet"], "tiny"))
    renamed = {}
    for name in xl.tensors["unet"]:
        module = name.removesuffix(".weight")
        theirs = table.from_ours(name).theirs.removesuffix(".weight")
        renamed["lora_unet_" + module.replace(".", "_")] = "lora_unet_" + theirs.replace(".", "_")
    kohya = {
        ".".join([renamed.get(name.split(".")[0], name.split(".")[0]), *name.split(".")[1:]]): tensor
        for name, tensor in to_kohya(xl_file, KOHYA).items()
    }
    assert any(name.startswith("lora_unet_input_blocks_3_1_") for name in kohya)
    assert not any("down_blocks" in name for name in kohya)
    assert largest_difference(with_loras(xl, [Lora(kohya, "a LoRA")]), xl_expected) < CLOSE


def test_sgm_names_of_sdxl_in_full_size_mean_what_they_mean_to_diffusers():
    held = unread(original("sdxl"))
    known = spellings(from_original(held, "SDXL"))
    modules = [name.removeprefix(UNET).removesuffix(".weight") for name in held if name.startswith(UNET)]
    modules = [
        name for name in modules if not re.search(r"bias|norm|layers\.0|^out\.0", name)
    ]  # a LoRA changes no norm
    assert len(modules) == 794
    for module in modules:
        key = "lora_unet_" + module.replace(".", "_")
        state = {f"{key}.lora_{side}.weight": torch.zeros(1) for side in ("down", "up")}
        mapped, _ = _convert_non_diffusers_lora_to_diffusers(
            _maybe_map_sgm_blocks_to_diffusers(state, SimpleNamespace(layers_per_block=2))
        )
        theirs = re.sub(
            r"^unet\.|\.processor|[._]lora\.down\.weight", "", next(name for name in mapped if "down.w" in name)
        )
        (found,) = known[key, "weight"]
        assert found.name == re.sub(r"to_out$", "to_out.0", theirs) + ".weight" and found.original


def test_a_module_in_both_layouts_counts_once_and_diffusers_name_wins(xl):
    place = "transformer_blocks_0_attn1_to_k"
    wins, loses = (
        random_lora(f"lora_unet_{block}_{place}", 64, 64) for block in ("mid_block_attentions_0", "middle_block_1")
    )
    alone, both = (with_loras(xl, [Lora(tensors, "a LoRA")]) for tensors in (wins, loses | wins))
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    assert changed(xl, both) == {f"unet.{name}"}
    np.testing.assert_array_equal(both.tensors["unet"][name].read(), alone.tensors["unet"][name].read())


@pytest.fixture(scope="module")
def dora(tiny_checkpoint, tmp_path_factory) -> tuple[Path, Weights]:
    """DoRA of linear layers and convolutions."""
    configs = {"unet": unet_lora(convolutions=True, use_dora=True), "text_encoder": text_lora(use_dora=True)}
    return saved(tiny_checkpoint, tmp_path_factory.mktemp("xl_dora"), configs, 2)


def test_dora_merges_as_by_peft(xl, dora):
    file, expected = dora
    tensors, metadata = file_tensors(file)
    assert sum("lora_magnitude_vector" in name for name in tensors) > 100
    ours = with_loras(xl, [Lora(tensors, "a DoRA", metadata=metadata)])
    assert largest_difference(ours, expected) < CLOSE


def test_lycoris_dora_of_the_outputs_merges_as_by_peft(xl, dora):
    file, expected = dora
    named = to_kohya(file, KOHYA)
    parts = {part: prefix for prefix, part in KOHYA.items()}
    for name, tensor in file_tensors(file)[0].items():
        if "magnitude" in name:
            part, *module, _ = name.removesuffix(".weight").split(".")
            module = parts[part] + "_".join(module)
            ones = (1,) * (len(named[f"{module}.lora_down.weight"].shape) - 1)
            named[f"{module}.dora_scale"] = of_array(tensor.read().reshape(-1, *ones))
    assert sum(name.endswith("dora_scale") for name in named) > 100
    assert largest_difference(with_loras(xl, [Lora(named, "a DoRA")]), expected) < CLOSE


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_lycoris_dora_of_the_inputs_gives_each_input_its_length(kernel):
    rng = np.random.default_rng(0)
    base, down = (rng.normal(size=(size, 4, *kernel)).astype(np.float32) for size in (6, 2))
    up, lengths = rng.normal(size=(6, 2, *(1 for _ in kernel))), 1 + rng.random((1, 4, *(1 for _ in kernel)))
    factors = {"down": down, "up": up, "dora_scale": lengths}
    change = Change(LORA, {role: of_array(value.astype(np.float32)) for role, value in factors.items()}, 1.0)
    result = merged(of_array(base), [change]).read()
    norms = np.linalg.norm(np.moveaxis(result, 1, 0).reshape(4, -1), axis=1)
    np.testing.assert_allclose(norms, lengths.reshape(-1), rtol=1e-5)
    changed_base = base + np.einsum("or,ri...->oi...", up.reshape(6, 2), down)
    factor = (result / changed_base).swapaxes(0, 1).reshape(4, -1)  # one for each input
    np.testing.assert_allclose(factor, np.broadcast_to(factor[:, :1], factor.shape), rtol=1e-3)


def test_two_adapters_with_weights_of_their_own_add_up_as_in_diffusers(tiny_checkpoint, xl, xl_file, tmp_path):
    other, _ = saved(tiny_checkpoint, tmp_path, {"unet": unet_lora(lora_alpha=2)}, 3)
    expected = {"unet": merged_by_peft(loaded_unet(tiny_checkpoint, {xl_file: 0.6, other: -1.3}))}
    loras = []
    for file, weight in ((xl_file, 0.6), (other, -1.3)):
        tensors, metadata = file_tensors(file)
        loras.append(Lora({n: t for n, t in tensors.items() if n.startswith("unet.")}, file.name, weight, metadata))
    ours = with_loras(xl, loras)
    assert largest_difference(ours, expected) < CLOSE
    again = with_loras(xl, loras[::-1])
    assert largest_difference(again, expected) < CLOSE


def test_dora_of_half_weight_paints_as_in_diffusers(tiny_checkpoint, xl, dora, xl_file):
    """Two adapters, one of them DoRA, that diffusers has not merged: each acts on the weights as they were."""
    unet = loaded_unet(tiny_checkpoint, {dora[0]: 0.5, xl_file: 0.7})
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    with torch.no_grad():
        expected = layer(torch.eye(layer.in_features)).numpy().T  # it has no bias
    files = {dora[0]: 0.5, xl_file: 0.7}
    ours = with_loras(xl, [Lora(file_tensors(f)[0], f.name, w, file_tensors(f)[1]) for f, w in files.items()])
    held = ours.tensors["unet"]["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].read()
    np.testing.assert_allclose(held, expected, atol=CLOSE)


def test_sd1_kohya_file_merges_as_by_peft(tiny_sd_checkpoints, sd, tmp_path):
    """Its transformers begin and end with convolutions of 1x1; its text encoder is `lora_te_`."""
    file, expected = saved(tiny_sd_checkpoints[1], tmp_path, {"unet": unet_lora(), "text_encoder": text_lora()}, 4)
    kohya = {
        name.replace("lora_te1_encoder", "lora_te_text_model_encoder"): tensor
        for name, tensor in to_kohya(file, KOHYA).items()
    }
    assert any(name.startswith("lora_te_text_model_encoder") for name in kohya)
    assert largest_difference(with_loras(sd, [Lora(kohya, "a LoRA")]), expected) < CLOSE


def test_names_of_old_diffusers_files_find_their_place(xl, xl_file, xl_expected):
    """As `save_attn_procs` and `save_lora_weights` wrote them before PEFT; alpha was the rank."""
    tensors = {name: tensor for name, tensor in file_tensors(xl_file)[0].items() if "attn" in name}
    old = {}
    for name, tensor in tensors.items():
        name = name.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up")
        if name.startswith("unet."):
            name = re.sub(r"\.(to_q|to_k|to_v|to_out)(\.0)?\.lora_linear_layer", r".processor.\1_lora", name)
        old[name] = tensor
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight" in old
    now, then = (with_loras(xl, [Lora(named, "a LoRA")]) for named in (tensors, old))
    assert changed(xl, then) == changed(xl, now) and len(changed(xl, now)) > 40
    assert not changed(now, then)
    bare = {name.removeprefix("unet."): tensor for name, tensor in old.items() if name.startswith("unet.")}
    assert {name for name in changed(xl, now) if name.startswith("unet.")} == changed(
        xl, with_loras(xl, [Lora(bare, "old")])
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_names_and_settings_find_their_part(sd, tiny_sd_checkpoints):
    pipe = load_torch_pipeline(tiny_sd_checkpoints[1])
    for part, config in {"unet": unet_lora(use_rslora=True), "text_encoder": text_lora()}.items():
        model = get_peft_model(getattr(pipe, part), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn_like(parameter))
        state = tensors_of(get_peft_model_state_dict(model))
        named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in state.items()}
        settings = json.loads(json.dumps(config.to_dict(), default=list))
        expected = {part: merged_by_peft(getattr(pipe, part))}
        for tensors in (state, named):
            assert all(name.startswith("base_model.model.") for name in tensors)
            assert largest_difference(with_loras(sd, [Lora(tensors, part, metadata=settings)]), expected) < CLOSE


@pytest.fixture(scope="module")
def peft_adapter(tiny_sd_checkpoints, tmp_path_factory) -> tuple[Path, Weights]:
    """A folder that PEFT saved, and the weights that it merges; copy it before changing it."""
    unet = load_torch_pipeline(tiny_sd_checkpoints[1]).unet
    model = get_peft_model(
        unet, LoraConfig(r=4, lora_alpha=32, target_modules=["to_q", "to_k"], alpha_pattern={"to_k": 3})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("peft") / "style"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder, {"unet": {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}}


def assembled(model: Path, *loras: Path | str) -> Checkpoint:
    recipe = Recipe(str(model), loras=tuple((str(lora), 1.0) for lora in loras))
    return assemble(recipe, Found.of(recipe))[0]


@pytest.mark.parametrize("file", ["", "adapter_model.safetensors"])
def test_pefts_folder_merges_as_by_peft(tiny_sd_checkpoints, peft_adapter, file):
    folder, expected = peft_adapter
    assert largest_difference(assembled(tiny_sd_checkpoints[1], folder / file), expected) < CLOSE


@pytest.mark.parametrize("file", ["", "/adapter_model.safetensors"])
def test_pefts_settings_are_fetched_with_its_file(tiny_sd_checkpoints, peft_adapter, tmp_path, monkeypatch, file):
    folder, expected = peft_adapter

    def download(repository: str, name: str, **_) -> str:
        if not (folder / name).exists():
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return shutil.copy(folder / name, tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert largest_difference(assembled(tiny_sd_checkpoints[1], f"owner/style{file}"), expected) < CLOSE


def test_the_hub_is_waited_for_once_where_it_can_not_be_asked(tiny_sd_checkpoints, monkeypatch):
    asked = []

    def download(repository: str, name: str, *, local_files_only: bool, **_) -> str:
        asked.append((name, local_files_only))
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "constants", SimpleNamespace(HF_HUB_OFFLINE=False))
    with refuses("owner/style", "hub"):
        assembled(tiny_sd_checkpoints[1], "owner/style")
    assert asked == [("pytorch_lora_weights.safetensors", False), ("adapter_model.safetensors", True)]


def test_pefts_adapter_without_alpha_is_merged_with_a_warning(tiny_sd_checkpoints, peft_adapter, tmp_path):
    file = shutil.copy(peft_adapter[0] / "adapter_model.safetensors", tmp_path)
    with warns("adapter_model.safetensors", "PEFT", "adapter_config.json", "alpha"):
        assembled(tiny_sd_checkpoints[1], file)


def test_a_folder_without_a_lora_is_refused(tiny_sd_checkpoints, tmp_path):
    with refuses(str(tmp_path), "pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        assembled(tiny_sd_checkpoints[1], tmp_path)


def test_another_alpha_is_another_model_in_the_cache(tiny_sd_checkpoints, peft_adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(peft_adapter[0], tmp_path / "style")
    recipe = Recipe(str(tiny_sd_checkpoints[1]), loras=((str(folder / "adapter_model.safetensors"), 1.0),))
    before = fingerprint(recipe, Found.of(recipe))
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 32', '"lora_alpha": 16'))
    assert fingerprint(recipe, Found.of(recipe)) != before


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=3, alpha=5, target_modules=["to_k", "conv1"]),
        LoHaConfig(r=3, alpha=5, target_modules=["to_k", "conv1"], use_effective_conv2d=True),
        LoKrConfig(r=2, alpha=5, target_modules=["to_k", "conv1"], decompose_both=True),
        LoKrConfig(r=2, alpha=5, target_modules=["to_k", "conv1"], use_effective_conv2d=True, decompose_factor=4),
    ],
    ids=["loha", "loha with cores", "lokr", "lokr with cores"],
)
def test_loha_and_lokr_merge_as_by_peft(tiny_checkpoint, xl, config):
    pipe = load_torch_pipeline(tiny_checkpoint)
    add_adapter(pipe, "one", {"unet": config}, scale=0.5)
    state = get_peft_model_state_dict(pipe.unet, adapter_name="one")
    tensors = {
        "lora_unet_" + "_".join(name.split(".")[:-1]) + "." + name.split(".")[-1]: t for name, t in state.items()
    }
    alphas = {f"{name.split('.')[0]}.alpha": torch.tensor(5.0) for name in tensors}
    ours = with_loras(xl, [Lora(tensors_of(tensors | alphas), "a LyCORIS")])
    assert any(re.search(r"_t[12]?$|_t2$", name) for name in tensors) == bool(config.use_effective_conv2d)
    assert largest_difference(ours, {"unet": merged_by_peft(pipe.unet)}) < CLOSE


def random_lora(module: str, outer: int, inner: int, *, kernel: tuple[int, ...] = (), rank: int = 2) -> Tensors:
    ones = (1,) * len(kernel)
    shapes = {"lora_down": (rank, inner, *kernel), "lora_up": (outer, rank, *ones)}
    return tensors_of({f"{module}.{role}.weight": torch.randn(shape) for role, shape in shapes.items()})


def test_locon_with_a_core_is_the_chain_of_its_three_convolutions(xl):
    name, module = "mid_block.resnets.0.conv1.weight", "lora_unet_mid_block_resnets_0_conv1"
    down, mid, up = torch.randn(3, 64, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(64, 3, 1, 1)
    state = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
    ours = with_loras(xl, [Lora(tensors_of({f"{module}.{role}": t for role, t in state.items()}), "a LoCon", 0.8)])
    x, base = torch.randn(1, 64, 8, 8), torch.from_numpy(xl.tensors["unet"][name].read())
    chain = conv2d(conv2d(conv2d(x, down), mid, padding=1), up)
    result = conv2d(x, torch.from_numpy(ours.tensors["unet"][name].read()), padding=1)
    torch.testing.assert_close(result, conv2d(x, base, padding=1) + 0.8 * 1.5 / 3 * chain, atol=1e-3, rtol=1e-4)


def test_whole_differences_change_weights_biases_and_norms(xl):
    module, rng = "mid_block.resnets.0.", np.random.default_rng(0)
    places = {
        "conv1.diff": "conv1.weight",
        "conv1.diff_b": "conv1.bias",
        "norm1.w_norm": "norm1.weight",
        "norm1.b_norm": "norm1.bias",
    }
    held = xl.tensors["unet"]
    diffs = {key: rng.normal(size=held[module + name].shape).astype(np.float32) for key, name in places.items()}
    tensors = {f"lora_unet_mid_block_resnets_0_{key}": of_array(diff) for key, diff in diffs.items()}
    ours = with_loras(xl, [Lora(tensors, "full", 0.5)])
    for key, name in places.items():
        expected = held[module + name].read() + 0.5 * diffs[key]
        np.testing.assert_allclose(ours.tensors["unet"][module + name].read(), expected, rtol=1e-6)


def test_half_precision_is_merged_in_float32_and_read_only_when_asked(xl):
    name = "mid_block.attentions.0.proj_in.weight"
    reads = []

    def read() -> np.ndarray:
        reads.append(name)
        return xl.tensors["unet"][name].read().astype(ml_dtypes.bfloat16)

    lazy = Tensor((64, 64), np.dtype(ml_dtypes.bfloat16), read)
    base = xl.with_tensors("unet", {**xl.tensors["unet"], name: lazy})
    lora = random_lora("lora_unet_mid_block_attentions_0_proj_in", 64, 64)
    half = {key: of_array(tensor.read().astype(np.float16)) for key, tensor in lora.items()}
    tensor = with_loras(base, [Lora(half, "a LoRA")]).tensors["unet"][name]
    assert not reads
    down, up = (half[f"lora_unet_mid_block_attentions_0_proj_in.lora_{role}.weight"].read() for role in ("down", "up"))
    exact = lazy.read().astype(np.float32) + up.astype(np.float32) @ down.astype(np.float32)
    assert tensor.dtype == tensor.read().dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensor.read(), exact.astype(ml_dtypes.bfloat16))


def test_lora_of_another_model_is_refused_with_its_tensors(xl, sd):
    kohya = random_lora("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 64, 32)
    with refuses("style.safetensors", 1, next(iter(kohya)).split(".")[0], "[64, 32]", "[64, 64]"):
        with_loras(xl, [Lora(kohya, "style.safetensors")])
    assert len(changed(sd, with_loras(sd, [Lora(kohya, "style.safetensors")]))) == 1
    for module in ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "lora_unet_mid_block_attentions_7_proj_in"):
        with refuses("style", f"1 unknown ({module})"):
            with_loras(sd, [Lora(random_lora(module, 64, 32), "style")])


@pytest.mark.parametrize(
    "edit, told",
    [
        (lambda t: t.pop("m.lora_up.weight"), r"\b1 incomplete \(\w+ .*\bup\)"),
        (lambda t: t.pop("m.lora_down.weight"), r"\b1 incomplete \(\w+ .*\bdown\)"),
        (lambda t: t.update({"m.lora_x.weight": t["m.lora_up.weight"]}), r"\b1 unknown \(\w+\.lora_x\.weight\)"),
        (lambda t: t.update({"m.lora_A.weight": t["m.lora_down.weight"]}), r"\b1 duplicate"),
        (lambda t: t.update({"m.hada_w1_a": t["m.lora_up.weight"]}), r"\b1 [^;(]*methods"),
        (lambda t: t.update({"m.alpha": t["m.lora_up.weight"]}), r"\b1 [^;(]*shape[^;(]* \([^)]*\balpha\b.*\[64, 2\]"),
        (lambda t: t.update({"m.dora_scale": of_array(np.ones((7, 1), np.float32))}), r"\b1 [^;(]*shape"),
        (lambda t: t.update({"m.lora_up.weight": of_array(np.ones((64, 5), np.float32))}), r"\b1 [^;(]*shape.*\bdown\b.*\bup\b"),
        (lambda t: t.update({"other.alpha": of_array(np.float32(1).reshape(()))}), r"\b1 [^;(]*factors \(other\)"),
        (lambda t: t.update({"m.oft_blocks": t["m.lora_up.weight"]}), r"\bOFT or BOFT \(.*\bLoRA\b"),
    ],
)  # fmt: skip
def test_each_tensor_without_a_place_is_named(xl, edit, told):
    module = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {name.replace(module, "m"): tensor for name, tensor in random_lora(module, 64, 64).items()}
    edit(tensors)
    tensors = {re.sub("^m[.]", f"{module}.", name): tensor for name, tensor in tensors.items()}
    with refuses("broken", re.compile(told)):
        with_loras(xl, [Lora(tensors, "broken")])


def test_what_is_no_lora_and_what_is_no_weight_is_refused(xl):
    with refuses("vae.safetensors", "VAE", "LoRA", "LoCon"):
        with_loras(xl, [Lora(xl.tensors["vae"], "vae.safetensors")])
    lora = random_lora("lora_unet_mid_block_attentions_0_proj_in", 64, 64)
    for weight in (float("nan"), "1", True):
        with refuses("weight", "style", repr(weight)):
            Lora(lora, "style", weight)
    for metadata in ({"lora_adapter_metadata": "{"}, {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(": 1}}'}):
        with refuses("style", re.compile("PEFT|diffusers")):
            with_loras(xl, [Lora(lora, "style", metadata=metadata)])


@pytest.mark.parametrize("begun", ["pissa_niter_16", "olora"])
def test_adapters_that_began_by_changing_the_models_weights_are_refused(xl, begun):
    lora = random_lora("lora_unet_mid_block_attentions_0_proj_in", 64, 64)
    settings = {"peft_type": "LORA", "init_lora_weights": begun}
    for metadata in (settings, {"lora_adapter_metadata": json.dumps({"unet.init_lora_weights": begun})}):
        with refuses("style", begun, "PEFT", "LoRA"):
            with_loras(xl, [Lora(lora, "style", metadata=metadata)])
    with_loras(xl, [Lora(lora, "style", metadata=settings | {"init_lora_weights": "gaussian"})])


def test_peft_name_that_two_encoders_have_is_refused_as_ambiguous(xl):
    module = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    with refuses("style", "1 ambiguous", "text_encoder", "text_encoder_2"):
        with_loras(xl, [Lora(random_lora(module, 64, 32), "style")])
