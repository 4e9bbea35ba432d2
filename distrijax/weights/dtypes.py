"""The dtypes that models can compute in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from distrijax.errors import InvalidArgument

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def resolve_dtype(dtype: Any, platform: str) -> jnp.dtype:
    """The dtype to compute in.

    Args:
        dtype: A name, or a dtype of JAX, NumPy or torch; None is bfloat16 on accelerators and float32 on CPUs.
        platform: JAX's name for the devices' platform.

    Raises:
        InvalidArgument: For a dtype that is not in `DTYPES`.
    """
    if dtype is None:
        return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    try:
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        kind = type(dtype)
        name = str(dtype).removeprefix("torch.") if kind.__module__ == "torch" else kind.__name__
    if name not in DTYPES:
        raise InvalidArgument(f"dtype is {name!r}; use one of: {', '.join(DTYPES)}")
    return jnp.dtype(DTYPES[name])
