"""Modules of a LoRA are found by the names of kohya, sgm, PEFT and older diffusers."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapters import changed, file_tensors, largest_difference, merged_by_peft, tensors_of
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from lora_files import CLOSE, KOHYA, random_lora, saved, text_lora, to_kohya, unet_lora
from original_layouts import original, unread
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from tiny_pipeline import load_torch_pipeline

from distrijax.convert.adapters.lora import Lora, with_loras
from distrijax.convert.adapters.lora_names import spellings
from distrijax.convert.layouts.family import UNET
from distrijax.convert.layouts.original import from_original
from distrijax.convert.layouts.original_unet import UNetLayout, unet_table


def test_kohya_file_merges_as_the_diffusers_one(xl, xl_file, xl_expected):
    ours = with_loras(xl, [Lora(to_kohya(xl_file, KOHYA), "a LoRA")])
    assert largest_difference(ours, xl_expected) < CLOSE


def test_sgm_block_names_merge_as_the_diffusers_ones(xl, xl_file, xl_expected):
    table = unet_table(UNetLayout.of_diffusers(xl.tensors["unet"], "tiny"))
    renamed = {}
    for name in xl.tensors["unet"]:
        module = name.removesuffix(".weight")
        theirs = table.from_diffusers(name).source.removesuffix(".weight")
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
