"""Textual inversion: learned words added to a checkpoint's vocabulary, tokenizer and token embeddings.

    {"<cat>": [768]} or [n, 768]         diffusers: the name is the word
    {"emb_params": [n, 768]}, {"string_to_param.*": [n, 768], ...}       A1111: the word is the file's name
    {"clip_l": [n, 768], "clip_g": [n, 1280]}                            SDXL: for its two text encoders

A word of n vectors becomes the tokens word, word_1, ..., word_n-1; the tokenizer inserts all of them where a prompt has the word.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np

from distrijax.errors import CheckpointError
from distrijax.json_config import parse_json
from distrijax.models.tokenizer import CLIPTokenizer
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.names import current_name, shown
from distrijax.weights.tensors import FLOATS, Tensor, Tensors

TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.weight"

A1111 = ("string_to_param.*", "emb_params")
"""A1111's names of the vectors, in pickles and in safetensors; the rest of such a file is not needed."""

XL = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""The names of the vectors of each encoder in files for SDXL."""

NAMES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
"""Files of a tokenizer that list added tokens."""


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
    """Learned vectors of one word.

    what: the file, for errors. word: what stands for it in prompts; None takes the tensor's name, which is the word in
    diffusers' files only.
    """

    tensors: Tensors
    what: str
    word: str | None = None


def with_embeddings(checkpoint: Checkpoint, embeddings: Sequence[Embedding]) -> Checkpoint:
    """The checkpoint with new words: rows of the token embeddings, vocab_size, and the tokenizers' files.

    An encoder for which a file for SDXL has no vectors reads the word as ordinary text, as in diffusers.
    Raises CheckpointError for files of another kind, vectors of another width, and words that the vocabulary has.
    """
    for embedding in embeddings:
        for part, (word, vectors) in _read(embedding, checkpoint).items():
            tokens = [word, *(f"{word}_{n}" for n in range(1, vectors.shape[0]))]
            checkpoint = _with_tokens(checkpoint, part, tokens, vectors, embedding.what)
    return checkpoint


def _read(embedding: Embedding, checkpoint: Checkpoint) -> dict[str, tuple[str, Tensor]]:
    """The word and its vectors [n, width], by the text encoder that they are for."""
    tensors, what, word = embedding.tensors, embedding.what, embedding.word
    encoders = [part for part in XL.values() if part in checkpoint.tensors]
    names = f"{len(tensors)} tensors ({', '.join(map(shown, list(tensors)[:3]))}{', ...' if len(tensors) > 3 else ''})"
    if any(name in tensors for name in XL):
        found = {part: tensors[name] for name, part in XL.items() if name in tensors and part in encoders}
        if "text_encoder_2" not in encoders or not found or len(tensors) > len(XL):
            raise CheckpointError(
                f"{what} holds {names}, an embedding for Stable Diffusion XL; this model's text encoders are "
                f"{', '.join(encoders) or 'missing'}; give an embedding that was made for it"
            )
    else:
        name = next((name for name in A1111 if name in tensors), None)
        if name is None:
            if len(tensors) != 1:
                formats = f"one tensor named by its word, {' or '.join(A1111)}, or {' and '.join(XL)}"
                raise CheckpointError(f"{what} holds {names} and is no embedding; give a file with {formats}")
            name = next(iter(tensors))
            word = name if word is None else word
        if len(encoders) != 1:
            raise CheckpointError(
                f"{what} holds vectors for one text encoder and the model has {len(encoders)}; give an embedding for "
                f"Stable Diffusion XL, with {' and '.join(XL)}"
            )
        found = {encoders[0]: tensors[name]}
    if word is None:
        raise CheckpointError(f"{what} does not say which word it stands for; give the word")
    if not isinstance(word, str) or not word.strip() or word != word.strip():
        raise CheckpointError(f"the word of {what} is {word!r}; give a text that neither begins nor ends with a blank")
    return {part: (word, _vectors(tensor, checkpoint, part, what)) for part, tensor in found.items()}


def _vectors(tensor: Tensor, checkpoint: Checkpoint, part: str, what: str) -> Tensor:
    """As [n, width]; raises CheckpointError for another width than the text encoder's."""
    width = checkpoint.tensors[part][_table_name(checkpoint, part)].shape[1]
    shape = tensor.shape if len(tensor.shape) == 2 else (1, *tensor.shape)
    if len(shape) != 2 or shape[1] != width or not shape[0] or tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{what} has vectors of {list(tensor.shape)} ({tensor.dtype}) and the {part} reads floats of [n, {width}]; "
            "give an embedding that was made for this model"
        )
    return tensor.then(lambda array: array.reshape(shape), shape=shape)


def _table_name(checkpoint: Checkpoint, part: str) -> str:
    """The name of the token embeddings; text encoders come with and without a prefix."""
    names = (name for name in checkpoint.tensors[part] if current_name(name) == TOKEN_EMBEDDING)
    if (name := next(names, None)) is None:
        raise CheckpointError(f"the {part} of the checkpoint lacks {TOKEN_EMBEDDING}; give a whole model")
    return name


def _with_tokens(checkpoint: Checkpoint, part: str, tokens: list[str], vectors: Tensor, what: str) -> Checkpoint:
    """The checkpoint with tokens of one text encoder after all that its tokenizer has."""
    name = _table_name(checkpoint, part)
    table = checkpoint.tensors[part][name]
    folder = part.replace("text_encoder", "tokenizer")
    files, first = _add_tokens(checkpoint.files, folder, tokens, what)
    if first > table.shape[0]:
        raise CheckpointError(
            f"the {folder} has {first} tokens and the {part} embeddings for {table.shape[0]}; use parts of one model"
        )
    after = first + len(tokens)
    rows = max(after, table.shape[0])

    def put(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array[:first], vectors.read().astype(array.dtype), array[after:]])

    tensors = {**checkpoint.tensors[part], name: table.then(put, shape=(rows, table.shape[1]))}
    configs = {**checkpoint.configs, part: {**checkpoint.configs.get(part, {}), "vocab_size": rows}}
    return dataclasses.replace(checkpoint.with_tensors(part, tensors), configs=configs, files=files)


def _add_tokens(
    files: Mapping[str, bytes], folder: str, tokens: Sequence[str], what: str
) -> tuple[dict[str, bytes], int]:
    """The tokenizer's files with tokens added wherever it lists added tokens, and the first one's id."""
    inside = {name.removeprefix(f"{folder}/"): data for name, data in files.items() if name.startswith(f"{folder}/")}
    bpe = CLIPTokenizer.from_files(inside, folder).bpe
    held = {name: parse_json(inside[name], f"{folder}/{name}") for name in NAMES if name in inside}
    known = bpe.get_vocab(with_added_tokens=True)
    spelt = {token.content.lower() for token in bpe.get_added_tokens_decoder().values()}  # matched in either case
    if taken := [token for token in tokens if token in known or token.lower() in spelt]:
        raise CheckpointError(
            f"the word {tokens[0]!r} of {what} needs the tokens {', '.join(taken)}, which the {folder} has already; "
            "give another word"
        )
    first = 1 + max(known.values())
    ids = {token: first + n for n, token in enumerate(tokens)}
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
    entries = {index: {"content": token, **flags} for token, index in ids.items()}  # as transformers adds a word
    changed = {"added_tokens.json": {**held.get("added_tokens.json", {}), **ids}}
    if content := held.get("tokenizer.json"):
        listed = [{"id": index, **entry} for index, entry in entries.items()]
        changed["tokenizer.json"] = {**content, "added_tokens": [*(content.get("added_tokens") or ()), *listed]}
    settings = held.get("tokenizer_config.json", {})
    if "added_tokens_decoder" in settings:
        decoder = {**settings["added_tokens_decoder"], **{str(index): entry for index, entry in entries.items()}}
        changed["tokenizer_config.json"] = {**settings, "added_tokens_decoder": decoder}
    texts = {name: json.dumps(content, ensure_ascii=False, indent=2) for name, content in changed.items()}
    return {**files, **{f"{folder}/{name}": f"{text}\n".encode() for name, text in texts.items()}}, first
