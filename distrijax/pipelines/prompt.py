"""Prompts become embeddings: a tokenizer and a text encoder, or two of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from distrijax.errors import DistriError, warn
from distrijax.models.tokenizer import CLIPTokenizer
from distrijax.parallel.processes import to_devices, to_host
from distrijax.parallel.programs import Programs
from distrijax.validate import host_array
from distrijax.weights.sharding import Model

Prompt = str | Sequence[str]

Prompts = tuple[Prompt | None, ...]
"""What a caller gives for each encoder: SDXL's prompt and prompt_2, the prompt alone of a model with one encoder. Those after the
first are the first's where they are None or "", as in diffusers."""

Texts = tuple[list[str], ...]
"""Prompts for each encoder, equally many."""


class Embeddings(NamedTuple):
    """What the UNet reads of prompts: each token's embedding from all encoders, and the last one's pooled one, if any.

    On the host: on an accelerator every operation between programs would be one more to compile.
    """

    tokens: Float[np.ndarray, "b t e"]
    pooled: Float[np.ndarray, "b p"] | None = None


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
    """The text encoders of a model side by side.

    pooled: whether the UNet reads the last encoder's pooled embedding, too. zeros_for_empty: whether a missing negative
    prompt is all zeros instead of the embedding of "" (SDXL's `force_zeros_for_empty_prompt`). everywhere: how the
    embeddings lie on the mesh (replicated).
    """

    tokenizers: tuple[CLIPTokenizer, ...]
    encoders: tuple[Model, ...]
    pooled: bool
    zeros_for_empty: bool
    everywhere: NamedSharding
    programs: Programs

    def __call__(self, texts: Texts, *, clip_skip: int = 0) -> Embeddings:
        """Embeddings of as many prompts as each encoder is given."""
        outputs = []
        for tokenizer, encoder, prompts in zip(self.tokenizers, self.encoders, texts, strict=True):
            ids = to_devices(tokenizer(prompts), self.everywhere)
            outputs.append(self.programs(_encode, self._static(encoder, clip_skip), encoder.params, ids))
        tokens, pooled = zip(*((to_host(part) for part in output) for output in outputs), strict=True)
        return Embeddings(np.concatenate(tokens, -1), pooled[-1] if self.pooled else None)

    def _static(self, encoder: Model, clip_skip: int) -> tuple:
        return encoder.form, self.everywhere.mesh, clip_skip

    def given(self, tokens: Any, pooled: Any, name: str, dtype: Any) -> Embeddings | None:
        """Embeddings that a caller passes in, checked, in `dtype`; None when there are none.

        pooled: None where the model reads none. name: "" or "negative_", before the arguments' names in errors.
        """
        if tokens is None and pooled is None:
            return None
        if self.pooled and (tokens is None or pooled is None):
            raise DistriError(
                f"only one of {name}prompt_embeds and {name}pooled_prompt_embeds is given; give both or none"
            )
        needed = {"prompt_embeds": ("prompts", "tokens", sum(encoder.config.hidden_size for encoder in self.encoders))}
        if self.pooled:
            needed["pooled_prompt_embeds"] = ("prompts", self.encoders[-1].config.projection_dim)
        values = [host_array(*pair) for pair in zip((tokens, pooled), (name + label for label in needed), strict=False)]
        fits = [
            v.size and v.ndim == len(form) and v.shape[-1] == form[-1]
            for v, form in zip(values, needed.values(), strict=True)
        ]
        if not all(fits) or len({len(value) for value in values}) > 1:
            got = (f"{name}{label} is {list(value.shape)}" for label, value in zip(needed, values, strict=True))
            forms = (f"[{', '.join(map(str, form))}]" for form in needed.values())
            raise DistriError(f"{' and '.join(got)}; give {' and '.join(forms)}")
        return Embeddings(*(value.astype(dtype) for value in values))

    def read(
        self,
        prompts: Prompts,
        negative_prompts: Prompts,
        given: Embeddings | None,
        given_negative: Embeddings | None,
        *,
        guided: bool,
    ) -> tuple[Texts | Embeddings | None, ...]:
        """The branches of guidance, checked but not encoded, unconditional first; without guidance the text branch alone.

        given, given_negative: embeddings that take the place of prompts. None among the branches stands for zeros. Raises
        DistriError for prompts that contradict each other or are missing, and warns (DistriWarning) of those that say nothing.
        """
        prompts, negative_prompts = _without_empty(prompts), _without_empty(negative_prompts)
        for name, ones, other in (("prompt", prompts, given), ("negative_prompt", negative_prompts, given_negative)):
            for label, one in zip(_labels(name, ones), ones, strict=True):
                if one is not None and other is not None:
                    raise DistriError(f"both {label} and {name}_embeds are given; give one of them")
        text = given or _line_up("prompt", prompts)
        if not guided:
            return (text,)
        if given_negative is not None:
            if given is not None:
                _check_alike(given_negative, given)
            return given_negative, text
        first, *others = negative_prompts
        if first is None and self.zeros_for_empty:
            if any(other is not None for other in others):
                warn(
                    "negative_prompt_2 changes nothing: without negative_prompt this model takes zeros for both encoders; "
                    "give negative_prompt, '' at least"
                )
            return None, text
        return _line_up("negative_prompt", (first or "", *others), len(text[0])), text

    def prepare(self, branches: Sequence[Texts | Embeddings | None], *, clip_skip: int = 0) -> None:
        """Begins to compile what `encode` runs."""
        skips = [*[0] * (len(branches) - 1), clip_skip]
        for branch, skip in zip(branches, skips, strict=True):
            if branch is None or isinstance(branch, Embeddings):
                continue
            for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
                ids = jax.ShapeDtypeStruct((len(branch[0]), tokenizer.length), np.int32, sharding=self.everywhere)
                self.programs.prepare(_encode, self._static(encoder, skip), encoder.params, ids)

    def encode(self, branches: Sequence[Texts | Embeddings | None], *, clip_skip: int = 0) -> tuple[Embeddings, ...]:
        """The embeddings of what `read` returned; raises DistriError where those of the branches differ in shape.

        clip_skip: last layers that the text branch leaves out; the negative prompt never does, as in diffusers.
        """

        def embed(branch: Texts | Embeddings, clip_skip: int = 0) -> Embeddings:
            return branch if isinstance(branch, Embeddings) else self(branch, clip_skip=clip_skip)

        *others, text = branches
        text = embed(text, clip_skip)
        if not others:
            return (text,)
        negative = jax.tree.map(np.zeros_like, text) if others[0] is None else embed(others[0])
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


def _without_empty(prompts: Prompts) -> Prompts:
    """None in the place of an empty prompt after the first."""
    first, *others = prompts
    return first, *(None if isinstance(other, str) and not other else other for other in others)


def _check_alike(negative: Embeddings, text: Embeddings) -> None:
    if negative.tokens.shape != text.tokens.shape:
        raise DistriError(
            f"the negative embeddings are {list(negative.tokens.shape)} and the prompt's are {list(text.tokens.shape)}; "
            "give both in one shape"
        )


def _line_up(name: str, prompts: Prompts, count: int | None = None) -> Texts:
    """Texts for each encoder, as many as `count` (or as one of them has); the others read the first's unless told."""
    first, labels = prompts[0], _labels(name, prompts)
    if first is None:
        raise DistriError(f"{name} is missing; give a string, a list of strings, or {name}_embeds")
    texts = [as_list(first if one is None else one, label) for label, one in zip(labels, prompts, strict=True)]
    count = count or max(map(len, texts))
    for label, values in zip(labels, texts, strict=True):
        if len(values) not in (1, count):
            raise DistriError(f"{label} has {len(values)} entries for {count} prompts; give one, or as many as prompts")
    return tuple(values * count if len(values) == 1 else values for values in texts)


def _labels(name: str, prompts: Prompts) -> list[str]:
    """What a caller calls the prompts of each encoder: prompt, prompt_2."""
    return [name if number == 1 else f"{name}_{number}" for number in range(1, len(prompts) + 1)]


def _encode(static, params, ids):
    """Every device encodes all prompts: they are few, and all devices of a branch need them."""
    form, mesh, clip_skip = static

    def local(params, ids):
        return form.module(params)(ids, clip_skip=clip_skip)

    return jax.shard_map(local, mesh=mesh, in_specs=(form.specs, P()), out_specs=P())(params, ids)
