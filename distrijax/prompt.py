"""Prompts become embeddings: two tokenizers, two text encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from distrijax.clip import CLIPTextEncoder
from distrijax.config import DistriError
from distrijax.programs import Programs
from distrijax.tokenizer import CLIPTokenizer

Prompt = str | Sequence[str]


Texts = tuple[list[str], list[str]]
"""Prompts for the first and for the second encoder, equally many."""


class Embeddings(NamedTuple):
    """What the UNet reads of prompts: each token's embedding from both encoders, and the second one's pooled one."""

    tokens: Float[Array, "b t e"]
    pooled: Float[Array, "b p"]


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
    """SDXL's two text encoders side by side.

    zeros_for_empty: whether a missing negative prompt is all zeros instead of the embedding of "" (SDXL's
    `force_zeros_for_empty_prompt`). everywhere: how the embeddings lie on the mesh (replicated).
    """

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    encoders: tuple[CLIPTextEncoder, CLIPTextEncoder]
    zeros_for_empty: bool
    everywhere: NamedSharding
    programs: Programs

    def __call__(self, prompt: Sequence[str], prompt_2: Sequence[str], *, clip_skip: int = 0) -> Embeddings:
        """Embeddings of as many prompts; `prompt_2` goes to the second encoder."""
        outputs = []
        for tokenizer, encoder, texts in zip(self.tokenizers, self.encoders, (prompt, prompt_2), strict=True):
            ids = jax.device_put(tokenizer(texts), self.everywhere)
            leaves, structure = jax.tree.flatten(encoder)
            outputs.append(self.programs(_encode, (structure, self.everywhere, clip_skip), tuple(leaves), ids))
        (first, _), (second, pooled) = outputs
        return Embeddings(jnp.concatenate([first, second], -1), pooled)

    def given(self, tokens: Any, pooled: Any, name: str, dtype: Any) -> Embeddings | None:
        """Embeddings that a caller passes in, checked and placed; None when there are none."""
        if tokens is None and pooled is None:
            return None
        if tokens is None or pooled is None:
            raise DistriError(
                f"only one of {name}prompt_embeds and {name}pooled_prompt_embeds is given; give both or none"
            )
        tokens, pooled = np.asarray(tokens), np.asarray(pooled)
        width = sum(encoder.config.hidden_size for encoder in self.encoders)
        pooled_width = self.encoders[1].config.projection_dim
        ranks = tokens.ndim == 3 and pooled.ndim == 2
        if not ranks or len(tokens) != len(pooled) or tokens.shape[2] != width or pooled.shape[1] != pooled_width:
            raise DistriError(
                f"{name}prompt_embeds is {list(tokens.shape)} and {name}pooled_prompt_embeds {list(pooled.shape)}; "
                f"give [prompts, tokens, {width}] and [prompts, {pooled_width}]"
            )
        return Embeddings(*(jax.device_put(value.astype(dtype), self.everywhere) for value in (tokens, pooled)))

    def read(
        self,
        prompt: Prompt | None,
        prompt_2: Prompt | None,
        negative_prompt: Prompt | None,
        negative_prompt_2: Prompt | None,
        given: Embeddings | None,
        given_negative: Embeddings | None,
        *,
        guided: bool,
    ) -> tuple[Texts | Embeddings | None, ...]:
        """The branches of guidance, checked but not encoded, unconditional first; without guidance the text branch alone.

        given, given_negative: embeddings that take the place of prompts. None among the branches stands for zeros. Raises
        DistriError for prompts that contradict each other or are missing.
        """
        for name, ones, other in (
            ("", (prompt, prompt_2), given),
            ("negative_", (negative_prompt, negative_prompt_2), given_negative),
        ):
            for suffix, one in zip(("", "_2"), ones, strict=True):
                if one is not None and other is not None:
                    raise DistriError(f"both {name}prompt{suffix} and {name}prompt_embeds are given; give one of them")
        text = given or _pair_up("prompt", prompt, prompt_2)
        if not guided:
            return (text,)
        if given_negative is not None:
            if given is not None:
                _check_alike(given_negative, given)
            return given_negative, text
        if negative_prompt is None and self.zeros_for_empty:
            return None, text
        return _pair_up("negative_prompt", negative_prompt or "", negative_prompt_2, len(text[0])), text

    def encode(self, branches: Sequence[Texts | Embeddings | None], *, clip_skip: int = 0) -> tuple[Embeddings, ...]:
        """The embeddings of what `read` returned; raises DistriError where those of the branches differ in shape.

        clip_skip: last layers that the text branch leaves out; the negative prompt never does, as in diffusers.
        """

        def embed(branch: Texts | Embeddings, clip_skip: int = 0) -> Embeddings:
            return branch if isinstance(branch, Embeddings) else self(*branch, clip_skip=clip_skip)

        *others, text = branches
        text = embed(text, clip_skip)
        if not others:
            return (text,)
        negative = jax.tree.map(jnp.zeros_like, text) if others[0] is None else embed(others[0])
        _check_alike(negative, text)
        return negative, text


def as_list(value: Prompt, name: str) -> list[str]:
    """One prompt or several, as a list; raises DistriError for none at all or for what is no text."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise DistriError(f"{name} is {value!r}; give a string or a list of strings")
    if not texts:
        raise DistriError(f"{name} is an empty list; give at least one string")
    return list(texts)


def _check_alike(negative: Embeddings, text: Embeddings) -> None:
    if negative.tokens.shape != text.tokens.shape:
        raise DistriError(
            f"the negative embeddings are {list(negative.tokens.shape)} and the prompt's are {list(text.tokens.shape)}; "
            "give both in one shape"
        )


def _pair_up(name: str, first: Prompt | None, second: Prompt | None, count: int | None = None) -> tuple[list, list]:
    """Texts for both encoders, as many as `count` (or as the first has); the second encoder reads the first's unless told."""
    if first is None:
        raise DistriError(f"{name} is missing; give a string, a list of strings, or {name}_embeds")
    texts = as_list(first, name)
    texts_2 = texts if second is None else as_list(second, f"{name}_2")
    count = count or max(len(texts), len(texts_2))
    for label, values in ((name, texts), (f"{name}_2", texts_2)):
        if len(values) not in (1, count):
            raise DistriError(f"{label} has {len(values)} entries for {count} prompts; give one, or as many as prompts")
    return tuple(values * count if len(values) == 1 else values for values in (texts, texts_2))


def _encode(static, params, ids):
    """Every device encodes all prompts: they are few, and all devices of a branch need them."""
    structure, everywhere, clip_skip = static
    outputs = jax.tree.unflatten(structure, params)(ids, clip_skip=clip_skip)
    return jax.lax.with_sharding_constraint(outputs, everywhere)
