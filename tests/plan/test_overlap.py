"""What hides what: the reading of HLO in closed form, and the displaced step compiled for GPUs and TPUs that are not here.

The former need the extra `plan`, the latter libtpu, which the extra `tpu` brings.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import pytest
from facts import refuses, says
from PIL import Image

from distrijax import DEFAULT_MODEL, DistriConfig, load_scheduler
from distrijax.convert.sources import open_checkpoint
from distrijax.models.unet_config import SDXL_BASE
from distrijax.models.vae import SDXL_VAE
from distrijax.parallel.programs import OPTIONS
from distrijax.pipelines.loading import read_configs
from distrijax.plan import __main__ as plan_command
from distrijax.plan import projection, targets
from distrijax.plan.overlap import HloProgram, Instruction, Transfer, array_bytes
from distrijax.plan.projection import CompiledStep, compile_decoder, compile_step, total_seconds, waiting_seconds
from distrijax.plan.targets import GPUS, compile_only_devices, compiler_is_installed, tpu_compiler_is_installed
from distrijax.plan.traffic import traffic
from distrijax.weights.dtypes import DTYPES

CONVOLUTION = 'window={size=3x3}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"'

HLO = """
HloModule jit_step, is_scheduled=true

%product (a: bf16[8,32], b: bf16[32,16]) -> bf16[8,16] {
  %a = bf16[8,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%wrapped (c: f32[4,4]) -> f32[4,4] {
  %c = f32[4,4]{1,0} parameter(0)
  ROOT %exchange = f32[4,4]{1,0} all-to-all(%c), replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (x: bf16[8,32], y: bf16[32,16], z: f32[4,4]) -> (bf16[8,16], f32[4,4]) {
  %x = bf16[8,32]{1,0} parameter(0)
  %y = bf16[32,16]{1,0} parameter(1)
  %z = f32[4,4]{1,0} parameter(2)
  %all-gather-start = (bf16[8,32]{1,0}, bf16[64,32]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %one = bf16[8,16]{1,0} fusion(%x, %y), kind=kCustom, calls=%product
  %sum = f32[4,4]{1,0} all-reduce(%z), replica_groups={{0,1},{2,3}}, to_apply=%add
  %async = ((f32[4,4]{1,0}), f32[4,4]{1,0}) async-start(%sum), calls=%wrapped
  %back = f32[4,4]{1,0} async-done(%async)
  %two = (bf16[2,16,8,6]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), CONVOLUTION
  %all-gather-done = bf16[64,32]{1,0} all-gather-done(%all-gather-start)
  %image = bf16[2,16,8,4]{3,2,1,0} bitcast(%x)
  %kernel = bf16[6,3,3,4]{3,2,1,0} bitcast(%y)
  %query = bf16[2,10,3,64]{3,2,1,0} bitcast(%x)
  %key = bf16[2,50,3,64]{3,2,1,0} bitcast(%x)
  %three = (bf16[2,3,10,64]{3,1,2,0}, u8[0]{0}) custom-call(%query, %key, %key), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %out = (bf16[8,16]{1,0}, f32[4,4]{1,0}) tuple(%one, %back)
}
""".replace("CONVOLUTION", CONVOLUTION)

CUBLAS = (
    'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
)

PRODUCT = f"""
ENTRY %main (x: bf16[8,32], y: bf16[32,16], b: bf16[16]) -> bf16[8,16] {{
  %x = bf16[8,32]{{1,0}} parameter(0)
  %y = bf16[32,16]{{1,0}} parameter(1)
  %b = bf16[16]{{0}} parameter(2)
  ROOT %product = (bf16[8,16]{{1,0}}, s8[4194304]{{0}}) custom-call(%x, %y, %b), {CUBLAS}
}}
"""

LOOP = """
%four (i: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4), metadata={op_name="lt"}
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%turn (i: (s32[], f32[8])) -> (s32[], f32[8]) {
  %i = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %square = f32[8,8]{1,0} bitcast(%i)
  %product = f32[8,8]{1,0} dot(%square, %square), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[8]{0:T(128)} fusion(%i), kind=kLoop, calls=%add, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %next = (s32[], f32[8]{0}) tuple(%i, %sum)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  %one = f32[8]{0:T(128)} fusion(%x), kind=kLoop, calls=%add, backend_config={"window_config":{"estimated_cycles":"30"}}
  %free = f32[8]{0:T(128)} bitcast(%one)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%one), condition=%four, body=%turn, metadata={op_name="while"}
  ROOT %out = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
}
"""

GATHER = 'all-gather(%own), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="4"}'

CHAIN = """
HloModule jit_step, is_scheduled=true

%begin (own: bf16[2,32]) -> (bf16[2,32], bf16[16,32]) {
  %own = bf16[2,32]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} GATHER
  ROOT %call = (bf16[2,32]{1,0}, bf16[16,32]{1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%carry (own: bf16[2,32], a: bf16[8,32], b: bf16[32,16]) -> bf16[8,16] {
  %own.2 = bf16[2,32]{1,0} parameter(0)
  %a = bf16[8,32]{1,0} parameter(1)
  %b = bf16[32,16]{1,0} parameter(2)
  %gather.2 = bf16[16,32]{1,0} GATHER
  ROOT %convolution.1 = bf16[8,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%plain (a: bf16[8,32], b: bf16[32,16]) -> bf16[8,16] {
  %a.2 = bf16[8,32]{1,0} parameter(0)
  %b.2 = bf16[32,16]{1,0} parameter(1)
  ROOT %convolution.2 = bf16[8,16]{1,0} convolution(%a.2, %b.2), dim_labels=bf_io->bf
}

%end (own: bf16[2,32]) -> bf16[16,32] {
  %own.3 = bf16[2,32]{1,0} parameter(0)
  %gather.3 = bf16[16,32]{1,0} GATHER
  ROOT %call.2 = bf16[16,32]{1,0} custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[2,32], y: bf16[8,32], z: bf16[32,16], s: f32[4,4]) -> bf16[8,16] {
  %x = bf16[2,32]{1,0} parameter(0)
  %y = bf16[8,32]{1,0} parameter(1)
  %z = bf16[32,16]{1,0} parameter(2)
  %s = f32[4,4]{1,0} parameter(3)
  %many = bf16[4,5,3]{2,1,0} bitcast(%y)
  %kernels = bf16[5,6,3]{2,1,0} bitcast(%z)
  %row = bf16[2,8,1]{2,1,0} bitcast(%y)
  %taps = bf16[3,1,7]{2,1,0} bitcast(%z)
  %start = (bf16[2,32]{1,0}, bf16[16,32]{1,0}) fusion(%x), kind=kCustom, calls=%begin
  %first = bf16[8,16]{1,0} fusion(%x, %y, %z), kind=kOutput, calls=%carry
  %between = bf16[8,16]{1,0} fusion(%y, %z), kind=kOutput, calls=%plain
  %second = bf16[8,16]{1,0} fusion(%x, %y, %z), kind=kOutput, calls=%carry
  %done = bf16[16,32]{1,0} fusion(%x), kind=kCustom, calls=%end
  %sum = f32[4,4]{1,0} all-reduce(%s), replica_groups={{0,1},{2,3}}, to_apply=%add
  %batch = bf16[4,6,3]{2,1,0} convolution(%many, %kernels), window={size=3 stride=2 lhs_dilate=3}, dim_labels=bf0_io0->bf0
  ROOT %padded = bf16[2,8,7]{2,1,0} convolution(%row, %taps), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
}
""".replace("GATHER", GATHER)


def test_transfers_are_read_from_the_schedule():
    gather, total, exchange = sorted(HloProgram(HLO).transfers, key=lambda transfer: transfer.start)
    assert (gather.kind, gather.received, gather.asynchronous) == ("all-gather", 7 * 8 * 32 * 2, True)
    assert gather.hidden_by == ("one", "two")
    assert (total.kind, total.received, total.asynchronous, total.hidden_by) == ("all-reduce", 64, False, ())
    assert (exchange.kind, exchange.received, exchange.asynchronous) == ("all-to-all", 48, True)
    assert exchange.hidden_by == ()


def test_groups_may_be_written_as_axes_of_a_mesh():
    hlo = HLO.replace("replica_groups=[1,8]<=[8]", "replica_groups=mesh['data'=1,'patch'=4,'cfg'=2] {'patch','cfg'}")
    assert HloProgram(hlo).transfers == HloProgram(HLO).transfers


def test_a_gather_that_kernels_carry_is_hidden_behind_their_products():
    """As XLA writes it for TPUs: a start, two kernels of products with a part of it, one between that has none, and a done."""
    carried, alone = HloProgram(CHAIN).transfers
    assert (carried.kind, carried.received, carried.asynchronous) == ("all-gather", 7 * 2 * 32 * 2, True)
    assert carried.hidden_by == ("first", "second")
    assert (alone.kind, alone.received, alone.asynchronous, alone.hidden_by) == ("all-reduce", 64, False, ())


def test_convolutions_count_neither_padding_nor_holes():
    """A batch of three products of 4x5 and 5x6, as XLA writes it for TPUs; and a border of zeros that costs nothing."""
    program = HloProgram(CHAIN)
    batch, padded = (next(each for each in program.step if each.name == name) for name in ("batch", "padded"))
    assert program.flops(batch) == 3 * 2 * 4 * 5 * 6
    assert program.flops(padded) == 2 * 2 * 7 * (3 * 8 - 2)


def test_what_is_in_a_loop_counts_as_often_as_it_runs():
    program = HloProgram(LOOP)
    assert program.cycles("main") == 30 + 4 * 100
    (loop,) = (each for each in program.computations["main"] if each.opcode == "while")
    assert program.flops(loop) == 4 * 2 * 8 * 8 * 8


def test_operations_and_bytes_of_kernels():
    program = HloProgram(HLO)
    by_name = {instruction.name: instruction for instruction in program.step}
    flops = {name: program.flops(instruction) for name, instruction in by_name.items()}
    assert flops.pop("one") == 2 * 8 * 16 * 32
    assert flops.pop("two") == 2 * (2 * 16 * 8 * 6) * (3 * 3 * 4)
    assert flops.pop("three") == 2 * 2 * (2 * 3 * 10 * 50 * 64)
    assert set(flops.values()) == {0}
    assert program.moved(by_name["one"]) == 2 * (8 * 32 + 32 * 16 + 8 * 16)
    assert program.moved(by_name["query"]) == program.moved(by_name["all-gather-start"]) == 0
    assert [array_bytes(array) for array in ("f32[]", "pred[3]", "bf16[2,5]", "s8[7]")] == [4, 3, 20, 7]


def test_a_product_of_cublas_has_its_operations_and_its_scratch_memory_no_traffic():
    program = HloProgram(PRODUCT)
    (product,) = (each for each in program.step if each.opcode == "custom-call")
    assert program.flops(product) == 2 * 8 * 16 * 32
    assert program.moved(product) == 2 * (8 * 32 + 32 * 16 + 16 + 8 * 16)


def test_projected_times_follow_the_model():
    """Everything takes its bytes; the gather is over before the second product, and the sum keeps everything waiting."""
    gpu = dataclasses.replace(GPUS["a100-sxm-80gb"], flops=1e30, bandwidth=1e30, link=1e30)
    events = CompiledStep(gpu, None, HloProgram(HLO), {}, {}).events()
    transfers = [event for event in events if event.transfer]
    assert [event.name for event in transfers] == ["all-gather", "all-reduce", "all-to-all"]
    assert [event.end - event.start for event in transfers] == pytest.approx([15e-6] * 3)
    assert [event.name for event in events if event.matmul] == ["one", "two", "three"]
    assert waiting_seconds(events) == pytest.approx(45e-6 - 3e-6)  # all but the first product wait
    assert total_seconds(events) == pytest.approx(45e-6 + 2 * 3e-6)


def test_a_gpu_that_is_not_known_is_refused():
    with refuses("gpu", "'a100'", "a100-sxm-80gb", "h100-sxm-80gb", "h200-sxm-141gb"):
        compile_only_devices("a100", 8)


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(targets, "compiler_is_installed", lambda: False)
    with refuses("CUDA", "cuDNN", "`plan`"):
        compile_only_devices("a100-sxm-80gb", 8)


def test_a_slice_of_tpus_that_is_not_lent_is_refused():
    with refuses("TPU v5e", "6 chips", "1, 4, 8, 16, 32, 64"):
        compile_only_devices("v5e", 6)


def test_a_compiler_for_tpus_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(targets, "tpu_compiler_is_installed", lambda: False)
    with refuses("TPU v5e", "libtpu", "`tpu`"):
        compile_only_devices("v5e", 8)


# Compiled for GPUs ------------------------------------------------------------------------------------------------------

compiler = pytest.mark.skipif(not compiler_is_installed(), reason="needs the extra `plan`")
SHALLOW = dataclasses.replace(SDXL_BASE, transformer_layers_per_block=1)
"""SDXL's widths, every block and every kind of exchange, but one transformer layer where there are two or ten."""
DDIM = load_scheduler({"_class_name": "DDIMScheduler"})


@functools.cache
def step(gpu: str, side: int, split_batch: bool, unet=SHALLOW, **options) -> CompiledStep:
    config, latent = DistriConfig(split_batch=split_batch), (side // 8, side // 8)
    return compile_step(config, unet, DDIM, gpu, devices=8, latent=latent, options=options)


EVERY = [
    ("a100-sxm-80gb", 1024, False),
    ("a100-sxm-80gb", 1024, True),
    ("a100-sxm-80gb", 3840, False),
    ("h100-sxm-80gb", 1024, False),
    ("h200-sxm-141gb", 3840, True),
]


@compiler
@pytest.mark.parametrize("setting", EVERY, ids=str)
def test_every_transfer_of_a_displaced_step_is_hidden(setting):
    """But for the named exceptions, all is asynchronous, with products between start and done."""
    _, side, split_batch = setting
    transfers = step(*setting).program.transfers
    exposed = [transfer for transfer in transfers if not (transfer.asynchronous and transfer.hidden_by)]
    assert {(transfer.kind, transfer.received) for transfer in exposed} <= exceptions(side, split_batch)
    kinds = {transfer.kind for transfer in transfers}
    assert kinds == {"all-gather", "collective-permute"} | ({"all-reduce"} if split_batch else set())


def exceptions(side: int, split_batch: bool) -> set[tuple[str, int]]:
    """What nothing may hide, in bytes: a fresh row of the latent from each neighbour, which the first convolution needs, and
    the guidance's sum of the UNet's outputs, which the next latents need."""
    columns = side // 8
    branches, patches = (1, 4) if split_batch else (2, 8)
    row = ("collective-permute", branches * columns * 4 * 2)
    return {row, ("all-reduce", columns // patches * columns * 4 * 4)} if split_batch else {row}


@compiler
def test_the_compiled_step_receives_what_the_plan_says():
    latent = (128, 128)
    planned = traffic(DistriConfig(split_batch=False), SHALLOW, DDIM, devices=8, latent=latent)
    assert step("a100-sxm-80gb", 1024, False).received == sum(planned.received.values())


@compiler
def test_without_the_options_the_test_above_would_fail():
    """XLA's defaults: nothing is hidden, so what the test looks for can be missed."""
    options = {"xla_gpu_enable_latency_hiding_scheduler": False}
    transfers = step("a100-sxm-80gb", 1024, False, **options).program.transfers
    gathers = [transfer for transfer in transfers if transfer.kind == "all-gather"]
    assert not all(transfer.asynchronous and transfer.hidden_by for transfer in gathers)
    assert OPTIONS["gpu"]["xla_gpu_enable_latency_hiding_scheduler"]


@compiler
def test_tokens_are_published_as_soon_as_the_stale_ones_have_been_read():
    """Each layer's are written before its attention; at the end of the step they would all have been kept until then."""
    program = step("a100-sxm-80gb", 3840, False).program
    places = {instruction.name: place for place, instruction in enumerate(program.step)}
    attentions = [place for place, each in enumerate(program.step) if "fmha" in each.rest]

    def written(name: str) -> int:
        instruction = program.step[places[name]]
        return written(instruction.operands[0]) if instruction.opcode == "bitcast" else places[name]

    outputs = [name for name in program.step[-1].operands if is_tokens(program.step[places[name]].arrays[0])]
    assert len(outputs) == len(attentions) / 2 == 11  # every other attention is of the prompt
    assert all(any(written(name) < place for place in attentions[-2:]) for name in outputs)


@compiler
def test_kernels_of_the_same_input_are_not_put_together_in_every_step():
    """Queries, keys and values are one product of one array, which is read and never made."""
    made = {
        instruction.opcode for instruction in step("a100-sxm-80gb", 1024, False).program.step if is_joined(instruction)
    }
    assert made == {"parameter"}


def is_joined(instruction: Instruction) -> bool:
    return instruction.arrays == ["bf16[1280,3840]"]


def is_tokens(array: str) -> bool:
    """Whether an array of the stale state is keys and values at 3840x3840, and not moments or boundary rows."""
    return array.count(",") == 2 and array_bytes(array) > 1e6


@compiler
@pytest.mark.parametrize(("split_batch", "most"), [(False, 8.5e9), (True, 7.5e9)])
def test_the_whole_of_sdxl_at_3840_fits_in_less_than_the_originals_buffers(split_batch, most):
    """Weights included, while a step runs and while the image is decoded; the original's exchange buffers alone are 11.4 GiB."""
    whole = step("a100-sxm-80gb", 3840, split_batch, SDXL_BASE)
    assert sum(whole.memory.values()) < most
    once = 2 * sum(
        2048 * channels * depth for channels, depth in ((640, 10), (1280, 60))
    )  # keys and values of the prompt
    assert whole.memory["weights"] == 2 * (2_567_463_684 - once + once // 8)
    exposed = [transfer for transfer in whole.program.transfers if not (transfer.asynchronous and transfer.hidden_by)]
    assert {(transfer.kind, transfer.received) for transfer in exposed} <= exceptions(3840, split_batch)
    decoding, _ = compile_decoder(
        DistriConfig(split_batch=split_batch), SDXL_BASE, SDXL_VAE, "a100-sxm-80gb", devices=8, latent=(480, 480)
    )
    assert decoding["weights"] == 2 * 83_653_863
    assert whole.memory["weights"] + sum(decoding.values()) < most


@compiler
def test_weights_that_are_shared_out_are_gathered_a_layer_at_a_time():
    """Nearly all behind products; and of what the devices share, none ever holds more than a small part."""
    config = DistriConfig(split_batch=False, shard_weights=True)
    shared = compile_step(config, SHALLOW, DDIM, "a100-sxm-80gb", devices=8, latent=(128, 128))
    whole = step("a100-sxm-80gb", 1024, False)
    transfers = shared.program.transfers
    hidden = sum(transfer.received for transfer in transfers if transfer.asynchronous and transfer.hidden_by)
    assert hidden > 0.95 * shared.received > 0.95 * 7 / 8 * whole.memory["weights"]
    assert sum(shared.memory.values()) < 0.45 * sum(whole.memory.values())
    planned = traffic(config, SHALLOW, DDIM, devices=8, latent=(128, 128))
    assert shared.received == sum(planned.received.values())


@compiler
def test_the_command_tells_what_a_step_would_take(tmp_path, capsys):
    hlo, plot = tmp_path / "step.hlo", tmp_path / "timeline.png"
    files = ["--hlo", str(hlo), "--timeline", str(plot)]
    plan_command.main(["--model", str(DEFAULT_MODEL), "--devices", "4", "--image-size", "256", "512", *files])
    mesh, compiling, memory, decoding, work, received, *hidden, step_time, baseline = (
        capsys.readouterr().out.splitlines()
    )
    says(mesh, "data 1", "cfg 2", "patch 2", "NVIDIA A100-SXM4-80GB", "bfloat16")
    assert re.fullmatch(r"compil\w+ +\S+ s: tracing \S+ s, lowering \S+ s, XLA \S+ s", compiling)
    says(memory, "85.1 GB", "8.34 MB")
    says(decoding, "8.34 MB", re.compile("decod"))
    says(work, re.compile(r"FLOP"))
    says(received, re.compile(r"\d [kM]?B\b"))
    assert any(re.search("all-gather.* async", line) for line in hidden)
    says(step_time, re.compile(r"\d ms\b"))
    says(baseline, re.compile(r"\d ms\b"))
    assert HloProgram(hlo.read_text()).transfers
    with Image.open(plot) as image:
        assert image.width > 1000


@pytest.mark.parametrize("force_upcast", [False, True])
def test_a_decoder_is_compiled_in_the_precision_it_will_have(force_upcast, monkeypatch):
    monkeypatch.setattr(projection, "compile_only_devices", lambda _, count: jax.devices()[:count])
    configs = read_configs(open_checkpoint(DEFAULT_MODEL, weights=False))
    vae = dataclasses.replace(configs.vae, force_upcast=force_upcast)
    half, full = (
        compile_decoder(
            DistriConfig(), configs.unet, vae, "a100-sxm-80gb", devices=1, latent=(8, 8), dtype=DTYPES[dtype]
        )[0]
        for dtype in ("float16", "float32")
    )
    assert half["weights"] * (1 if force_upcast else 2) == full["weights"]


# Compiled for TPUs ------------------------------------------------------------------------------------------------------

tpu_compiler = pytest.mark.skipif(not tpu_compiler_is_installed(), reason="needs libtpu, of the extra `tpu`")
LEAN = dataclasses.replace(SHALLOW, layers_per_block=1)
"""SDXL's widths, every kind of block and exchange, and least of each: libtpu takes long where images are large."""
NARROW = dataclasses.replace(
    LEAN, block_out_channels=(128, 256, 512), attention_head_dim=(2, 4, 8), cross_attention_dim=256
)
FLAT = dataclasses.replace(
    NARROW,
    block_out_channels=(64, 128),
    attention_head_dim=(1, 2),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)


def transfers_on_tpus(unet, side: int, config: DistriConfig, **options) -> tuple[list[Transfer], list[Transfer]]:
    """Of a displaced step on eight TPU v5e: all, and those that are not asynchronous, or that no product hides."""
    latent = (side // 8, side // 8)
    program = compile_step(config, unet, DDIM, "v5e", devices=8, latent=latent, options=options).program
    planned = traffic(config, unet, DDIM, devices=8, latent=latent)
    assert sum(transfer.received for transfer in program.transfers) == sum(planned.received.values())
    exposed = [transfer for transfer in program.transfers if not (transfer.asynchronous and transfer.hidden_by)]
    return program.transfers, exposed


@tpu_compiler
@pytest.mark.parametrize(
    ("unet", "side", "split_batch"), [(SDXL_BASE, 1024, False), (LEAN, 3840, False), (FLAT, 256, True)]
)
def test_every_transfer_of_a_displaced_step_is_hidden_on_tpus(unet, side, split_batch):
    """But for the named exceptions, of which the fresh rows may be hidden, too."""
    _, exposed = transfers_on_tpus(unet, side, DistriConfig(split_batch=split_batch))
    assert {(transfer.kind, transfer.received) for transfer in exposed} <= exceptions(side, split_batch)


@tpu_compiler
def test_weights_that_are_shared_out_are_mostly_gathered_behind_products_on_tpus():
    transfers, exposed = transfers_on_tpus(NARROW, 512, DistriConfig(split_batch=False, shard_weights=True))
    assert sum(transfer.received for transfer in exposed) < 0.06 * sum(transfer.received for transfer in transfers)


@tpu_compiler
def test_the_command_tells_what_a_step_would_take_on_tpus(capsys):
    plan_command.main(["--tpu", "v5e", "--model", str(DEFAULT_MODEL), "--devices", "4", "--image-size", "256"])
    mesh, _, memory, *_, step, baseline = capsys.readouterr().out.splitlines()
    says(mesh, "data 1", "cfg 2", "patch 2", "TPU v5e", "bfloat16")
    says(memory, "17.2 GB", "8.34 MB")
    cycles = r"\b([\d.]+) million cycles\b"
    few, many = (float(re.search(cycles, line).group(1)) for line in (step, baseline))
    assert few < many


@tpu_compiler
def test_a_user_may_override_the_options_for_tpus():
    """With one permute at a time, most of these are exposed: what the test above looks for can be missed."""
    one = {"xla_max_concurrent_async_collective_permutes": 1}
    transfers, exposed = transfers_on_tpus(FLAT, 256, DistriConfig(split_batch=False), **one)
    assert {transfer.kind for transfer in transfers} == {"collective-permute"}
    assert len(exposed) > len(transfers) / 2
    assert max(transfer.received for transfer in exposed) == max(transfer.received for transfer in transfers)  # tokens
    assert OPTIONS["tpu"].keys() >= one.keys()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--gpu", "v100"], ["gpu", "'v100'", "a100-sxm-80gb", "h100-sxm-80gb", "h200-sxm-141gb"]),
        (["--devices", "0"], ["--devices", 0, 1]),
        (["--image-size", "1001"], ["height", 1001, 8, 1000, 1008]),
        (["--image-size", "8", "8", "8"], ["--image-size", "H W", 3]),
        (["--tpu", "v5e", "--link", "pcie"], ["--link", "--timeline", "--gpu", "--tpu"]),
        (["--link", "fast"], ["--link", "'fast'", "nvlink", "pcie", "network", "GB/s"]),
        (["--hlo", "nowhere/x.hlo"], ["--hlo", "nowhere/x.hlo", "No such file or directory"]),
        (["--timeline", "."], ["--timeline", "folder", "file"]),
        (["--link", "-3"], ["--link", "'-3'", "nvlink", "pcie", "network", "GB/s"]),
    ],
)
def test_the_command_refuses_wrong_flags_in_one_line(flags, told):
    with refuses(*told, error=SystemExit):
        plan_command.main(flags)
