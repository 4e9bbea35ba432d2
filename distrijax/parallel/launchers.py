"""What starts several processes, and how it tells each of them of the others."""

from __future__ import annotations

import importlib.util
import os

LAUNCHERS: dict[str, tuple[str, ...]] = {
    "OMPI_MCA_orte_hnp_uri": ("OMPI_COMM_WORLD_SIZE",),
    "SLURM_STEP_NODELIST": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "JOB_COMPLETION_INDEX": (),
    "TPU_WORKER_HOSTNAMES": (),
}
"""Variables that those who start several processes set, and those in which they tell how many; a shell in an allocation is
often one of one. Open MPI (also within SLURM), SLURM, Kubernetes, and Google's for TPUs: JAX asks them in this order."""


def tasks() -> int | None:
    """How many processes a launcher has started, this one among them: None where JAX has yet to find out, 1 without a launcher."""
    for variable, counts in LAUNCHERS.items():
        if variable in os.environ:
            return next((int(os.environ[count]) for count in counts if count in os.environ), None)
    return None if importlib.util.find_spec("libtpu") is not None else 1
