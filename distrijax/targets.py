"""GPUs that a program can be compiled for where there is none: what XLA must know of them, and what they can do at best."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from distrijax.config import DistriError


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A model of GPU, by its vendor's data sheet.

    memory: bytes. bandwidth: of the memory, bytes per second. flops: of 16-bit matrix products without sparsity, per second.
    link: bytes per second that come in from the other GPUs of a host over NVLink. cores: streaming multiprocessors.
    shared_memory: bytes for each of them, and for each block at most. capability: CUDA's.
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
        """XLA's GpuTargetConfigProto, in text form."""
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


def compiler_is_installed() -> bool:
    """Whether JAX's plugin for CUDA is there, which has the compiler; it is not imported, for that would look for CUDA."""
    try:
        return importlib.util.find_spec("jax_plugins.xla_cuda12") is not None
    except ModuleNotFoundError:  # no plugin at all
        return False


def compile_only_devices(gpu: str, count: int) -> list[jax.Device]:
    """Devices to build a mesh from, and to compile for; nothing can be run on them.

    Raises DistriError for an unknown GPU, and where JAX's plugin for CUDA is not installed.
    """
    if gpu not in GPUS:
        raise DistriError(f"gpu is {gpu!r}; use one of: {', '.join(GPUS)}")
    if not compiler_is_installed():
        raise DistriError(f"compiling for {gpu} needs JAX's CUDA plugin and cuDNN; install the extra `plan`")
    with _without_a_gpu():
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=gpu, target_config=GPUS[gpu].as_text(), topology=f"1x1x{count}"
        )
    return topology.devices


@contextlib.contextmanager
def _without_a_gpu() -> Iterator[None]:
    """The plugin looks for CUDA's libraries when it is loaded; to compile, it needs none of them."""
    name = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
