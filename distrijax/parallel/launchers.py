"""Detects the launchers of multi-process runs by their environment variables."""

from __future__ import annotations

import importlib.util
import os

LAUNCHERS: dict[str, tuple[str, ...]] = {
    "OMPI_MCA_orte_hnp_uri": ("OMPI_COMM_WORLD_SIZE",),
    "SLURM_STEP_NODELIST": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "JOB_COMPLETION_INDEX": (),
    "TPU_WORKER_HOSTNAMES": (),
}
"""A variable that each launcher sets, and the variables with its number of processes, in the order in which JAX asks launchers.

Open MPI (also within SLURM), SLURM, Kubernetes, and Google's for TPUs. A shell in an allocation often has a number of 1.
"""


def tasks() -> int | None:
    """Number of processes that a launcher has started, with this one; None if only JAX can find out, 1 without a launcher."""
    for variable, counts in LAUNCHERS.items():
        if variable in os.environ:
            return next((int(os.environ[count]) for count in counts if count in os.environ), None)
    return None if importlib.util.find_spec("libtpu") is not None else 1
