"""Compile-only targets: GPUs and TPUs that XLA compiles for on a machine without any, and the peak rates of the GPUs.

TPUs need no peak rates here: libtpu writes its own estimate of each kernel's cycles into a compiled program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from distrijax.errors import InvalidArgument


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU model, by its vendor's data sheet.

    Attributes:
        name: The device's own description.
        capability: CUDA compute capability, major and minor.
        cores: Streaming multiprocessors.
        lanes: Floating-point units of one multiprocessor.
        clock: GHz.
        l2: Bytes of the L2 cache.
        shared_memory: Bytes of each multiprocessor, and the most that one block may use.
        memory: Bytes.
        bandwidth: Of the memory, bytes per second.
        flops: Of dense 16-bit matmuls, per second.
        link: Bytes per second received from the other GPUs of a host over NVLink.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    clock: float
    l2: int
    shared_memory: tuple[int, int]
    memory: int
    bandwidth: float
    flops: float
    link: float

    def as_text(self) -> str:
        """XLA's `GpuTargetConfigProto` in text form."""
        major, minor = self.capability
        per_core, per_block = self.shared_memory
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {per_core} shared_memory_per_block_optin: {per_block}
              core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              memory_bandwidth: {round(self.bandwidth)} l2_cache_size: {self.l2} device_memory_size: {self.memory}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{self.name}"
            """


_H100 = Gpu(
    "NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    cores=132,
    lanes=128,
    clock=1.98,
    l2=50 << 20,
    shared_memory=(233472, 232448),
    memory=84_978_434_048,
    bandwidth=3.352e12,
    flops=989e12,
    link=450e9,
)

GPUS = {
    "a100-sxm-80gb": Gpu(
        "NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        cores=108,
        lanes=64,
        clock=1.41,
        l2=40 << 20,
        shared_memory=(167936, 166912),
        memory=85_100_068_864,
        bandwidth=2.039e12,
        flops=312e12,
        link=300e9,
    ),
    "h100-sxm-80gb": _H100,
    "h200-sxm-141gb": dataclasses.replace(_H100, name="NVIDIA H200", memory=150_109_618_176, bandwidth=4.8e12),
}


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU model.

    Attributes:
        name: For people.
        memory: Bytes, by Google's documentation.
    """

    name: str
    memory: int


TPUS = {"v5e": Tpu("TPU v5e", memory=16 << 30)}
"""TPU models by libtpu's names."""

SLICES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
"""Topology of the TPU slices that Google offers, by their number of chips."""


def tpu_compiler_is_installed() -> bool:
    """Whether libtpu, which contains the compiler for TPUs, is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compiler_is_installed() -> bool:
    """Whether JAX's CUDA plugin, which contains the compiler for GPUs, is installed; importing it would look for CUDA."""
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda12") is not None
    except ModuleNotFoundError:  # no plugin at all
        return False


def compile_only_devices(target: str, count: int) -> list[jax.Device]:
    """Devices to build a mesh from and to compile for; nothing can run on them.

    Args:
        target: A key of `GPUS` or `TPUS`.
        count: Number of devices.

    Raises:
        InvalidArgument: For another target, for a number of TPUs that no slice has, and where the compiler (JAX's CUDA plugin, or
            libtpu) is not installed.
    """
    return _tpus(target, count) if target in TPUS else _gpus(target, count)


def _gpus(gpu: str, count: int) -> list[jax.Device]:
    if gpu not in GPUS:
        raise InvalidArgument(f"gpu is {gpu!r}; use one of: {', '.join(GPUS)}")
    if not compiler_is_installed():
        raise InvalidArgument(f"compiling for {gpu} needs JAX's CUDA plugin and cuDNN; install the extra `plan`")
    # the plugin looks for CUDA's libraries when it is loaded; compiling needs none of them
    with _environment(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1"):
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=gpu, target_config=GPUS[gpu].as_text(), topology=f"1x1x{count}"
        )
    return topology.devices


def _tpus(tpu: str, count: int) -> list[jax.Device]:
    if count not in SLICES:
        raise InvalidArgument(f"no slice of TPU {tpu} has {count} chips; use one of: {', '.join(map(str, SLICES))}")
    if not tpu_compiler_is_installed():
        raise InvalidArgument(f"compiling for TPU {tpu} needs libtpu; install the extra `tpu`")
    # when loaded, libtpu asks Google's metadata server what machine this is, and locks the chips for one process: without a
    # TPU there is neither
    here = dict(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE=f"v5litepod-{count}", TPU_WORKER_HOSTNAMES="localhost")
    with _environment(**here, ALLOW_MULTIPLE_LIBTPU_LOAD="1"):
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{tpu}:{SLICES[count]}")
    return topology.devices


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets environment variables within a `with` block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
