"""Single files in the original layouts: every tensor finds its place, in full size, and diffusers reads the same from them."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from facts import refuses, says, warns
from original_layouts import averages, clip, open_clip, original, prefixed, unet, unread, vae
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from distrijax.convert.checkpoint import Checkpoint
from distrijax.convert.complete import check_complete
from distrijax.convert.layouts.original import convert_original, from_original, to_original, unet_from, vae_from
from distrijax.convert.tensors import Tensors, of_array
from distrijax.models.clip import CLIPTextConfig as OurTextConfig
from distrijax.models.unet_config import UNetConfig
from distrijax.models.vae import VAEConfig
from distrijax.schedulers import load_scheduler

FAMILIES = ("sd1", "sd2", "sdxl", "refiner")

HUB = {  # of the hub's stable-diffusion-v1-5, -2-1, -xl-base-1.0 and -xl-refiner-1.0
    "sd1": {
        "model_index": "StableDiffusionPipeline",
        "scheduler": ("PNDMScheduler", "epsilon"),
        "unet": {
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "sample_size": 64,
            "use_linear_projection": False,
        },
        "vae": {"scaling_factor": 0.18215, "sample_size": 512},
        "text_encoder": {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_act": "quick_gelu",
        },
    },
    "sd2": {
        "model_index": "StableDiffusionPipeline",
        "scheduler": ("DDIMScheduler", "v_prediction"),
        "unet": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "sample_size": 96},
        "vae": {"scaling_factor": 0.18215, "sample_size": 768},
        "text_encoder": {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"},
    },
    "sdxl": {
        "model_index": "StableDiffusionXLPipeline",
        "scheduler": ("EulerDiscreteScheduler", "epsilon"),
        "unet": {
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
        "vae": {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True},
        "text_encoder": {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_act": "quick_gelu",
        },
        "text_encoder_2": {
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
        },
    },
    "refiner": {
        "model_index": "StableDiffusionXLImg2ImgPipeline",
        "scheduler": ("EulerDiscreteScheduler", "epsilon"),
        "unet": {
            "attention_head_dim": [6, 12, 24, 24],
            "transformer_layers_per_block": 4,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
        },
        "vae": {"scaling_factor": 0.13025},
        "text_encoder_2": {
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "hidden_act": "gelu",
        },
    },
}

NOT_WRITTEN = (
    r"position_ids$|logit_scale$|^betas$|alphas_cumprod|^posterior_|^denoiser\.sigmas$|^model_ema\."
    r"|^cond_stage_model\.model\.(text_projection$|transformer\.resblocks\.23\.)"
)
"""What follows from the config, or is used by no model of the family."""


@pytest.fixture(scope="module")
def converted() -> dict[str, Checkpoint]:
    """A whole file of each family, in full size, of which no tensor may be read."""
    return {family: from_original(unread(original(family)), family) for family in FAMILIES}


def meta_model(part: str, config: dict) -> torch.nn.Module:
    """The model of diffusers or transformers that a config describes, without memory for its weights."""
    with torch.device("meta"):
        if part in ("unet", "vae"):
            return {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(config)
        kind = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
        return kind[config["architectures"][0]](CLIPTextConfig.from_dict(config))


def state_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of its weights, as checkpoints have them: transformers has dropped a prefix since."""
    bare = isinstance(model, CLIPTextModel) and not hasattr(model, "text_model")
    prefix = "text_model." if bare else ""
    return {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_the_name_and_shape_that_torch_gives_it(converted, family):
    checkpoint = converted[family]
    assert set(checkpoint.tensors) == HUB[family].keys() - {"model_index", "scheduler"}
    for part, tensors in checkpoint.tensors.items():
        wanted = state_shapes(meta_model(part, checkpoint.configs[part]))
        wanted = {name: shape for name, shape in wanted.items() if not name.endswith("position_ids")}
        assert {name: tensor.shape for name, tensor in tensors.items()} == wanted, part


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_are_those_of_the_hub_and_are_understood_here(converted, family):
    configs, wanted = converted[family].configs, HUB[family]
    for part in wanted.keys() - {"model_index", "scheduler"}:
        assert {key: configs[part][key] for key in wanted[part]} == wanted[part]
    assert converted[family].index["_class_name"] == wanted["model_index"]
    assert (configs["scheduler"]["_class_name"], configs["scheduler"]["prediction_type"]) == wanted["scheduler"]
    UNetConfig.from_dict(configs["unet"])
    VAEConfig.from_dict(configs["vae"])
    load_scheduler(configs["scheduler"])
    for part in configs.keys() & {"text_encoder", "text_encoder_2"}:
        OurTextConfig.from_dict(configs[part])


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_own_converter_reads_the_same_names_from_the_same_file(converted, family):
    """So the lists of tensors in full size, which are built here, are those that diffusers expects of such files."""
    checkpoint = converted[family]
    placed = {name: torch.empty(shape, device="meta") for name, shape in original(family).items()}
    theirs = convert_ldm_unet_checkpoint(dict(placed), checkpoint.configs["unet"])
    theirs |= convert_ldm_vae_checkpoint(dict(placed), checkpoint.configs["vae"])
    ours = {**checkpoint.tensors["unet"], **checkpoint.tensors["vae"]}
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == {
        name: tensor.shape for name, tensor in ours.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_goes_back_to_the_same_names_and_shapes(converted, family):
    back = to_original(converted[family])
    wanted = {name: shape for name, shape in original(family).items() if not re.search(NOT_WRITTEN, name)}
    assert {name: tensor.shape for name, tensor in back.items()} == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_file_makes_whole_models_and_another_does_not(converted, family):
    checkpoint = converted[family]
    check_complete(checkpoint, family)
    tensors = dict(checkpoint.tensors["vae"])
    tensors["odd"] = tensors.pop("decoder.conv_out.bias")
    tensors["quant_conv.bias"] = of_array(np.zeros(3))
    shape = re.compile(r"\b1 [^;(]*shape[^;(]* \(vae\.quant_conv\.bias")
    with refuses("1 missing (vae.decoder.conv_out.bias)", "1 unexpected (vae.odd)", shape):
        check_complete(checkpoint.with_tensors("vae", tensors), family)


CONFIG = {
    "unet": {"attention_head_dim": 4, "norm_num_groups": 8},
    "vae": {"norm_num_groups": 8},
    "text_encoder": {"num_attention_heads": 4},
    "text_encoder_2": {"num_attention_heads": 4},
}
"""What the shapes of a small model do not tell."""

FILES = {"tokenizer/vocab.json": b"{}"}
LOSSES = ("--config FOLDER",)
"""What a warning of them tells at least."""


def small(family: str) -> Tensors:
    """A small file of the family, of random weights."""
    sizes = {"width": 32, "multipliers": (1, 2), "middle_depth": 2, "linear_projection": family != "sd1"}
    label = {"sdxl": 80 + 6 * 8, "refiner": 80 + 5 * 8}.get(family)
    context = {"sd1": 48, "sd2": 64, "sdxl": 128, "refiner": 80}[family]
    shapes = prefixed("model.diffusion_model.", unet(depths=(1, 2), context=context, label=label, **sizes))
    shapes |= prefixed("first_stage_model.", vae(32, (1, 2)))
    shapes |= {
        "sd1": prefixed("cond_stage_model.transformer.", clip(48, 2, 100)),
        "sd2": prefixed("cond_stage_model.model.", open_clip(64, 3, 100)),
        "sdxl": prefixed("conditioner.embedders.0.transformer.", clip(48, 2, 100))
        | prefixed("conditioner.embedders.1.model.", open_clip(80, 2, 100)),
        "refiner": prefixed("conditioner.embedders.0.model.", open_clip(80, 2, 100)),
    }[family]
    rng = np.random.default_rng(0)
    return {name: of_array(rng.normal(size=shape).astype(np.float16)) for name, shape in shapes.items()}


def convert(tensors: Tensors, **options) -> Checkpoint:
    return from_original(tensors, "file", **{"config": CONFIG, "files": FILES} | options)


def same_bytes(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        read = other[name].read()
        assert tensor.dtype == other[name].dtype == read.dtype and tensor.shape == other[name].shape == read.shape
        assert tensor.read().tobytes() == read.tobytes(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_bytes_both_ways(family):
    file = small(family)
    checkpoint = convert(file)
    with warns(*LOSSES):
        back = to_original(checkpoint)
    same_bytes({name: file[name] for name in back}, back)
    again = convert(back)
    for part, tensors in checkpoint.tensors.items():
        same_bytes(tensors, again.tensors[part])
    assert (again.index, again.configs, again.files) == (checkpoint.index, checkpoint.configs, FILES)


def test_the_last_layer_of_sd2_is_left_out_and_so_told():
    file = small("sd2")
    text = {"num_attention_heads": 4, "num_hidden_layers": 2}
    checkpoint, mapping = convert_original(file, "file", config={**CONFIG, "text_encoder": text}, files=FILES)
    assert checkpoint.configs["text_encoder"]["num_hidden_layers"] == 2
    assert not any("layers.2." in name for name in checkpoint.tensors["text_encoder"])
    dropped = {mapped.theirs for mapped in mapping if not mapped.ours}
    layer = {name for name in file if ".resblocks.2." in name}
    assert dropped == {*layer, "cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale"}


def test_the_mapping_tells_of_every_tensor_of_the_file():
    file = {**small("sd1"), "betas": of_array(np.zeros(3))}
    _, mapping = convert_original(file, "file", config=CONFIG, files=FILES)
    assert {mapped.theirs for mapped in mapping} == file.keys()
    goes = {mapped.theirs: mapped for mapped in mapping}
    assert goes["betas"].ours == ()
    query = goes["first_stage_model.decoder.mid.attn_1.q.weight"]
    assert query.ours == ("vae.decoder.mid_block.attentions.0.to_q.weight",)
    says(str(query), query.theirs, *query.ours, re.compile(r"\[.+\]"))  # and what is done to it


def test_averaged_weights_are_taken_when_asked_for():
    file = small("sd1")
    names = [name for name in file if name.startswith("model.diffusion_model.")]
    flat = averages({name.removeprefix("model.diffusion_model."): file[name].shape for name in names})
    rng = np.random.default_rng(1)
    file |= {name: of_array(rng.normal(size=shape).astype(np.float32)) for name, shape in flat.items()}
    plain = convert(file).tensors["unet"]
    averaged, mapping = convert_original(file, "file", ema=True, config=CONFIG, files=FILES)
    averaged = averaged.tensors["unet"]
    np.testing.assert_array_equal(
        averaged["mid_block.resnets.1.conv2.bias"].read(),
        file["model_ema.diffusion_modelmiddle_block2out_layers3bias"].read(),
    )
    np.testing.assert_array_equal(
        plain["mid_block.resnets.1.conv2.bias"].read(),
        file["model.diffusion_model.middle_block.2.out_layers.3.bias"].read(),
    )
    assert {name: tensor.shape for name, tensor in averaged.items()} == {n: t.shape for n, t in plain.items()}
    assert all(tensor.dtype == np.float32 for tensor in averaged.values())
    assert sorted(mapped.theirs for mapped in mapping) == sorted(file)
    used = {mapped.theirs: mapped.ours for mapped in mapping}
    assert used["model_ema.diffusion_modelout2bias"] == ("unet.conv_out.bias",)
    assert used["model.diffusion_model.out.2.bias"] == ()


def test_averaged_weights_that_are_not_there_are_an_error():
    with refuses("file", re.compile("EMA|moving average")):
        convert(small("sd1"), ema=True)
    with refuses("missing", "model_ema.diffusion_modeltime_embed0weight"):
        convert({**small("sd1"), "model_ema.decay": of_array(np.zeros(()))}, ema=True)


def test_what_a_file_predicts_is_asked_for_or_marked_or_usual():
    def predicted(family: str, extra: Tensors | None = None, **options) -> dict:
        return convert({**small(family), **(extra or {})}, **options).configs["scheduler"]

    marked = {name: of_array(np.zeros(0, np.float32)) for name in ("v_pred", "ztsnr")}
    assert predicted("sd2")["prediction_type"] == "v_prediction"
    assert predicted("sdxl")["prediction_type"] == "epsilon"
    assert "rescale_betas_zero_snr" not in predicted("sdxl")
    assert predicted("sd1", prediction_type="v_prediction")["prediction_type"] == "v_prediction"
    zero = predicted("sdxl", marked)
    assert (zero["prediction_type"], zero["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert load_scheduler(zero).rescale_betas_zero_snr
    step = {"global_step": of_array(np.asarray(875_000))}
    assert predicted("sd2", step)["prediction_type"] == "epsilon"
    given = {**CONFIG, "scheduler": {"prediction_type": "epsilon", "timestep_spacing": "trailing"}}
    assert predicted("sdxl", marked, config=given)["timestep_spacing"] == "trailing"
    with refuses("prediction_type", "'velocity'"):
        predicted("sd2", prediction_type="velocity")


def test_sd2_in_512_is_the_hubs_base_model():
    checkpoint = convert(small("sd2"), prediction_type="epsilon")
    assert checkpoint.configs["unet"]["sample_size"] == 64
    assert checkpoint.index["scheduler"] == ["diffusers", "PNDMScheduler"]


@pytest.mark.parametrize("markers", [("v_pred",), ("v_pred", "ztsnr")])
def test_v_prediction_of_sdxl_travels_in_the_file(markers):
    """And so nothing is warned of."""
    file = unread(original("sdxl")) | {name: of_array(np.zeros(0, np.float32)) for name in markers}
    checkpoint = from_original(file, "file")
    back = to_original(checkpoint)
    assert back.keys() & {"v_pred", "ztsnr"} == set(markers)
    assert from_original(back, "file").configs["scheduler"] == checkpoint.configs["scheduler"]


DDIM = {"_class_name": "DDIMScheduler"}
EULER = {"_class_name": "EulerDiscreteScheduler"}
UNI_PC = {"_class_name": "UniPCMultistepScheduler"}


@pytest.mark.parametrize(
    ("family", "scheduler", "lost"),
    [
        ("sd2", {"prediction_type": "epsilon"}, "prediction_type 'epsilon'"),
        (
            "sd2",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "rescale_betas_zero_snr True, scheduler: timestep_spacing 'trailing'",
        ),
        ("sd2", {"rescale_betas_zero_snr": None, "timestep_spacing": "leading"}, None),
        ("sd1", {"set_alpha_to_one": True, "steps_offset": 0}, "set_alpha_to_one True, scheduler: steps_offset 0"),
        ("sd1", EULER, "timestep_spacing 'linspace'"),  # by its class, and PNDM's is another
        ("sd1", {"_class_name": "LCMScheduler", "timestep_spacing": "trailing"}, None),  # which LCM does not heed
        ("sd1", UNI_PC | {"timestep_spacing": "trailing"}, "timestep_spacing 'trailing'"),
        ("sd1", UNI_PC | {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        ("sdxl", {"timestep_spacing": "trailing"}, "timestep_spacing 'trailing'"),
        ("sdxl", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),  # no marker says it of epsilon
        ("sdxl", {"set_alpha_to_one": True}, None),  # which Euler does not heed
        ("sdxl", DDIM | {"set_alpha_to_one": True}, "set_alpha_to_one True"),
    ],
)
def test_what_the_original_layout_can_not_say_is_warned_of(family, scheduler, lost, recwarn):
    checkpoint = from_original(unread(original(family)), "file")
    given = checkpoint.configs | {"scheduler": checkpoint.configs["scheduler"] | scheduler}
    to_original(dataclasses.replace(checkpoint, configs=given))
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (0 if lost is None else 1)
    for each in said:
        says(each, "--config FOLDER")
        assert re.findall(r"\w+: \w+ [\w']+", each) == f"scheduler: {lost}".split(", ")


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_is_unknown_is_listed(family):
    extra = ("model.diffusion_model.input_blocks.1.0.in_layers.9.weight", "first_stage_model.encoder.odd", "odd.weight")
    with refuses("file", "3 unknown", *extra):
        convert({**small(family), **dict.fromkeys(extra, of_array(np.zeros(1)))})


def test_a_quantised_file_is_not_taken_for_a_plain_one():
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight.absmax"
    with refuses(f"1 unknown ({name}"):
        convert({**small("sd1"), name: of_array(np.zeros(1))})


def test_heads_that_no_shape_tells_have_to_be_given():
    with refuses("attention_head_dim", "unet", "--config FOLDER"):
        convert(small("sdxl"), config={})
    with refuses("num_attention_heads", "text_encoder", "--config FOLDER"):
        convert(small("sd1"), config={"unet": CONFIG["unet"]})


def test_a_config_of_another_model_is_refused():
    wrong = {**CONFIG, "unet": {"attention_head_dim": 4, "block_out_channels": [32, 96]}}
    with refuses("block_out_channels", "unet", "[32, 64]", "[32, 96]"):
        convert(small("sd1"), config=wrong)


def test_a_whole_config_does_not_take_values_of_the_family():
    whole = {"_class_name": "AutoencoderKL", "norm_num_groups": 8}
    assert "scaling_factor" not in convert(small("sdxl"), config={**CONFIG, "vae": whole}).configs["vae"]
    assert convert(small("sdxl")).configs["vae"]["scaling_factor"] == 0.13025


def test_a_small_vocabulary_needs_its_own_tokenizer():
    with refuses("text_encoder", 100, 49408, "--config FOLDER"):
        convert(small("sd1"), files=None)


@pytest.mark.parametrize(
    "left_out, part",
    [
        ("first_stage_model.", "vae"),
        ("conditioner.embedders.0.", "text_encoder"),
    ],
)
def test_a_part_that_is_not_there_is_named(left_out, part):
    file = {name: tensor for name, tensor in small("sdxl").items() if not name.startswith(left_out)}
    with refuses("file", part):
        convert(file)


def test_parts_of_different_models_are_refused():
    file = {name: tensor for name, tensor in small("sd1").items() if not name.startswith("cond_stage_model.")}
    text = {name: tensor for name, tensor in small("sd2").items() if name.startswith("cond_stage_model.")}
    with refuses("file", "UNet", 48, 64):
        convert(file | text)
    wide = prefixed("first_stage_model.", vae(32, (1, 2), latent=16))
    with refuses("VAE", 16, 4):
        convert({**small("sd1"), **{name: of_array(np.zeros(shape, np.float16)) for name, shape in wide.items()}})


def test_old_names_of_the_text_encoder_are_understood():
    file = small("sd1")
    old = {name.replace(".text_model.", "."): tensor for name, tensor in file.items()}
    assert old.keys() != file.keys()
    same_bytes(convert(old).tensors["text_encoder"], convert(file).tensors["text_encoder"])


def test_a_projection_stored_as_a_linear_layer_is_not_transposed():
    file, name = small("sdxl"), "conditioner.embedders.1.model.text_projection"
    stored = {**file, f"{name}.weight": of_array(file[name].read().T)}
    del stored[name]
    same_bytes(convert(stored).tensors["text_encoder_2"], convert(file).tensors["text_encoder_2"])


def test_attention_of_the_vae_may_be_linear_already():
    file = small("sd1")
    linear = {
        name: of_array(tensor.read()[:, :, 0, 0])
        if re.search(r"attn_1\.\w+\.weight", name) and tensor.shape[2:]
        else tensor
        for name, tensor in file.items()
    }
    same_bytes(convert(linear).tensors["vae"], convert(file).tensors["vae"])


def test_names_of_diffusers_and_transformers_old_and_new_are_written_alike():
    checkpoint = convert(small("sd1"))
    text = {name.removeprefix("text_model."): tensor for name, tensor in checkpoint.tensors["text_encoder"].items()}
    text["embeddings.position_ids"] = of_array(np.zeros((1, 77), np.int64))
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    vae = {}
    for name, tensor in checkpoint.tensors["vae"].items():
        for new, before in old.items():
            name = name.replace(new, before)
        vae[name] = tensor
    with warns(*LOSSES):
        same_bytes(
            to_original(checkpoint), to_original(checkpoint.with_tensors("text_encoder", text).with_tensors("vae", vae))
        )


def test_what_the_original_layout_has_no_name_for_is_refused():
    checkpoint = convert(small("sd1"))
    guided = {**checkpoint.tensors["unet"], "time_embedding.cond_proj.weight": of_array(np.zeros((32, 16), np.float16))}
    with refuses("latent consistency model", "time_embedding.cond_proj.weight"):
        to_original(checkpoint.with_tensors("unet", guided))
    linear = dataclasses.replace(checkpoint, configs={**checkpoint.configs, "text_encoder": {"hidden_act": "gelu"}})
    with refuses("text_encoder", "'gelu'", "'quick_gelu'"):
        to_original(linear)
    with refuses("unet, vae"):
        to_original(
            dataclasses.replace(checkpoint, tensors={part: checkpoint.tensors[part] for part in ("unet", "vae")})
        )


PARTS = ("model.diffusion_model.", "diffusion_model.", "")


@pytest.mark.parametrize("prefix", PARTS)
def test_a_unet_alone_is_taken_in_either_naming(prefix):
    file = small("sdxl")
    wanted = convert(file).tensors["unet"]
    bare = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in file.items()}
    alone = {prefix + name: bare[name] for name in bare if "model.diffusion_model." + name in file}
    told, tensors = unet_from(alone, "unet.safetensors")
    same_bytes(wanted, tensors)
    assert told["block_out_channels"] == [32, 64] and told["transformer_layers_per_block"] == [1, 2]
    assert told["use_linear_projection"] and told["cross_attention_dim"] == 128
    assert told["projection_class_embeddings_input_dim"] == 128
    assert "attention_head_dim" not in told
    told_again, again = unet_from(wanted, "unet.safetensors")
    same_bytes(wanted, again)
    assert told_again == told


def test_a_whole_file_gives_its_unet_and_its_vae():
    file = small("sd2")
    checkpoint = convert(file)
    same_bytes(checkpoint.tensors["unet"], unet_from(file, "file")[1])
    same_bytes(checkpoint.tensors["vae"], vae_from(file, "file")[1])


def test_a_latent_consistency_unet_is_told():
    held = {**convert(small("sd1")).tensors["unet"], "time_embedding.cond_proj.weight": of_array(np.zeros((32, 256)))}
    assert unet_from(held, "lcm.safetensors")[0]["time_cond_proj_dim"] == 256


@pytest.mark.parametrize("prefix", ("first_stage_model.", "vae.", ""))
def test_a_vae_alone_is_taken_in_either_naming(prefix):
    file = small("sdxl")
    wanted = convert(file).tensors["vae"]
    start = "first_stage_model."
    alone = {prefix + name.removeprefix(start): tensor for name, tensor in file.items() if name.startswith(start)}
    alone |= {f"{prefix}loss.logvar": of_array(np.zeros(())), f"{prefix}model_ema.decay": of_array(np.zeros(()))}
    told, tensors = vae_from(alone, "vae.ckpt")
    same_bytes(wanted, tensors)
    assert told["block_out_channels"] == [32, 64] and told["layers_per_block"] == 2 and told["latent_channels"] == 4
    old = {name.replace(".to_q.", ".query."): tensor for name, tensor in wanted.items()}
    assert old.keys() != wanted.keys()
    same_bytes(wanted, vae_from(old, "vae.safetensors")[1])


def test_parts_with_unknown_tensors_or_of_other_models_are_refused():
    checkpoint = convert(small("sd1"))
    odd = {"down_blocks.0.resnets.0.odd.weight": of_array(np.zeros(1))}
    with refuses("unet.bin", "1 unknown (down_blocks.0.resnets.0.odd.weight"):
        unet_from(checkpoint.tensors["unet"] | odd, "unet.bin")
    with refuses("vae.bin", "1 unknown (odd"):
        vae_from({**checkpoint.tensors["vae"], "odd": of_array(np.zeros(1))}, "vae.bin")
    with refuses("vae.bin", "VAE", "UNet"):
        unet_from(checkpoint.tensors["vae"], "vae.bin")
    with refuses("unet.bin", "VAE", "UNet"):
        vae_from(checkpoint.tensors["unet"], "unet.bin")
    with refuses("flux-vae.safetensors", "VAE", 16, 4):
        vae_from(unread(vae(latent=16)), "flux-vae.safetensors")
