"""Encodes prompts with a tokenizer and a text encoder, or two of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from distrijax.errors import InvalidArgument, warn
from distrijax.models.tokenizer import CLIPTokenizer
from distrijax.parallel.programs import Stage
from distrijax.parallel.stages import On
from distrijax.validate import host_array
from distrijax.weights.sharding import Model

Prompt = str | Sequence[str]
"""One prompt, or a list of them."""

Prompts = tuple[Prompt | None, ...]
"""A caller's prompts for each encoder, such as SDXL's `prompt` and `prompt_2`. As in diffusers, None or "" after the first means
the first's."""

Texts = tuple[list[str], ...]
"""A list of prompts for each encoder, all of the same length."""


class Embeddings(NamedTuple):
    """What the UNet reads of prompts, on the host: on the devices every operation between programs would be compiled, too.

    Attributes:
        tokens: Token embeddings of all encoders, concatenated.
        pooled: Pooled embeddings of the last encoder; None for models that read none.
    """

    tokens: Float[np.ndarray, "b t e"]
    pooled: Float[np.ndarray, "b p"] | None = None


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
    """The text encoders of a model.

    Attributes:
        tokenizers: One for each encoder.
        encoders: In the order in which their embeddings are concatenated.
        pooled: Whether the UNet reads the last encoder's pooled embedding.
        zeros_for_empty: Whether embeddings of a missing negative prompt are zeros instead of those of "" (SDXL's
            `force_zeros_for_empty_prompt`).
        everywhere: The replicated sharding.
    """

    tokenizers: tuple[CLIPTokenizer, ...]
    encoders: tuple[Model, ...]
    pooled: bool
    zeros_for_empty: bool
    everywhere: NamedSharding

    def __call__(self, on: On, texts: Texts, *, clip_skip: int = 0) -> Embeddings:
        """The embeddings of prompts.

        Args:
            on: Where the encoders run.
            texts: The prompts for each encoder.
            clip_skip: Last layers that are skipped.
        """
        outputs = []
        for tokenizer, encoder, prompts in zip(self.tokenizers, self.encoders, texts, strict=True):
            static = encoder.form, self.everywhere.mesh, clip_skip
            outputs.append(on.run(ENCODE, static, encoder.params, on.put(tokenizer(prompts), self.everywhere)))
        tokens, pooled = zip(*(map(on.get, output) for output in outputs), strict=True)
        return Embeddings(np.concatenate(tokens, -1), pooled[-1] if self.pooled else None)

    def given(self, tokens: Any, pooled: Any, name: str, dtype: Any) -> Embeddings | None:
        """Embeddings of a caller, checked and cast; None if there are none.

        Args:
            tokens: Token embeddings [prompts, tokens, width], or None.
            pooled: Pooled embeddings [prompts, width], or None.
            name: "" or "negative_", the prefix of the arguments' names in errors.
            dtype: To cast to.

        Raises:
            InvalidArgument: For embeddings of the wrong shape, and if one of two is missing.
        """
        if tokens is None and pooled is None:
            return None
        if self.pooled and (tokens is None or pooled is None):
            raise InvalidArgument(
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
            raise InvalidArgument(f"{' and '.join(got)}; give {' and '.join(forms)}")
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
        """The prompts of each branch of guidance, checked and not encoded yet.

        Args:
            prompts: Of the call.
            negative_prompts: Of the call.
            given: Embeddings in place of prompts.
            given_negative: Embeddings in place of negative prompts.
            guided: Whether there is an unconditional branch.

        Returns:
            The unconditional branch, if any, then the conditional one. None stands for embeddings of zeros.

        Raises:
            InvalidArgument: For prompts that are missing or contradict each other. Those without effect raise a DistriWarning.
        """
        prompts, negative_prompts = _without_empty(prompts), _without_empty(negative_prompts)
        for name, ones, other in (("prompt", prompts, given), ("negative_prompt", negative_prompts, given_negative)):
            for label, one in zip(_labels(name, ones), ones, strict=True):
                if one is not None and other is not None:
                    raise InvalidArgument(f"both {label} and {name}_embeds are given; give one of them")
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
                    "negative_prompt_2 has no effect: without negative_prompt the embeddings of both encoders are zeros; "
                    "give negative_prompt, which may be ''"
                )
            return None, text
        return _line_up("negative_prompt", (first or "", *others), len(text[0])), text

    def encode(
        self, on: On, branches: Sequence[Texts | Embeddings | None], *, clip_skip: int = 0
    ) -> tuple[Embeddings, ...]:
        """The embeddings of each branch.

        Args:
            on: Where the encoders run.
            branches: Of `read`.
            clip_skip: Last layers that are skipped for the conditional branch; as in diffusers, for no other.

        Raises:
            InvalidArgument: If the shapes of the branches' embeddings differ.
        """

        def embed(branch: Texts | Embeddings, clip_skip: int = 0) -> Embeddings:
            return branch if isinstance(branch, Embeddings) else self(on, branch, clip_skip=clip_skip)

        *others, text = branches
        text = embed(text, clip_skip)
        if not others:
            return (text,)
        negative = jax.tree.map(np.zeros_like, text) if others[0] is None else embed(others[0])
        _check_alike(negative, text)
        return negative, text


def as_list(value: Prompt, name: str) -> list[str]:
    """One prompt or several as a list.

    Args:
        value: One prompt or several.
        name: The argument's name, for errors.

    Raises:
        InvalidArgument: For an empty list and for what is not text.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InvalidArgument(f"{name} is {value!r}; give a string or a list of strings")
    if not texts:
        raise InvalidArgument(f"{name} is an empty list; give at least one string")
    return list(texts)


def _without_empty(prompts: Prompts) -> Prompts:
    """Replaces empty prompts after the first by None."""
    first, *others = prompts
    return first, *(None if isinstance(other, str) and not other else other for other in others)


def _check_alike(negative: Embeddings, text: Embeddings) -> None:
    if negative.tokens.shape != text.tokens.shape:
        raise InvalidArgument(
            f"the negative embeddings are {list(negative.tokens.shape)} and the prompt's are {list(text.tokens.shape)}; "
            "give both in the same shape"
        )


def _line_up(name: str, prompts: Prompts, count: int | None = None) -> Texts:
    """A list of prompts for each encoder, all of `count` entries (default: of the longest); None means the first encoder's."""
    first, labels = prompts[0], _labels(name, prompts)
    if first is None:
        raise InvalidArgument(f"{name} is missing; give a string, a list of strings, or {name}_embeds")
    texts = [as_list(first if one is None else one, label) for label, one in zip(labels, prompts, strict=True)]
    count = count or max(map(len, texts))
    for label, values in zip(labels, texts, strict=True):
        if len(values) not in (1, count):
            raise InvalidArgument(
                f"{label} has {len(values)} entries for {count} prompts; give one, or as many as prompts"
            )
    return tuple(values * count if len(values) == 1 else values for values in texts)


def _labels(name: str, prompts: Prompts) -> list[str]:
    """The argument of each encoder's prompts: prompt, prompt_2."""
    return [name if number == 1 else f"{name}_{number}" for number in range(1, len(prompts) + 1)]


def encode_text(static, params, ids):
    """Encodes all prompts on every device: they are few, and all devices of a branch need them.

    Args:
        static: The encoder's layout, the mesh, and the number of last layers to skip.
        params: The encoder's parameters.
        ids: Token ids, `[prompts, length]`.

    Returns:
        What the encoder returns, the same on every device.
    """
    form, mesh, clip_skip = static

    def local(params, ids):
        return form.module(params)(ids, clip_skip=clip_skip)

    return jax.shard_map(local, mesh=mesh, in_specs=(form.specs, P()), out_specs=P())(params, ids)


ENCODE = Stage(encode_text, lambda static: NamedSharding(static[1], P()))
