"""Adapters merged by distrijax.convert.adapters.lora, against torch diffusers with the same adapter loaded by PEFT."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
import torch
from adapters import add_adapter, changed, file_tensors, largest_difference, merged_by_peft, tensors_of
from lora_files import CLOSE, KOHYA, loaded_unet, random_lora, saved, to_kohya, unet_lora
from peft import LoHaConfig, LoKrConfig
from peft.utils import get_peft_model_state_dict
from tiny_pipeline import load_torch_pipeline
from torch.nn.functional import conv2d

from distrijax.convert.adapters.lora import Lora, with_loras
from distrijax.convert.adapters.merging import LORA, Change, merged
from distrijax.weights.tensors import Tensor, of_array


def test_diffusers_file_of_three_models_merges_as_by_peft(xl, xl_file, xl_expected):
    tensors, metadata = file_tensors(xl_file)
    ours = with_loras(xl, [Lora(tensors, "a LoRA", metadata=metadata)])
    assert len(changed(xl, ours)) == sum(name.endswith("lora_A.weight") for name in tensors) > 150
    assert largest_difference(ours, xl_expected) < CLOSE


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
