"""CLIP's tokenizer, read from the files of a diffusers folder through the `tokenizers` library.

    prompt -> NFC, one space for any whitespace, lower case -> split into words -> bytes -> BPE with "</w>" at word ends
           -> <|startoftext|> ids <|endoftext|> padding

The ids equal those of transformers' CLIPTokenizer, for every text and every folder that it reads. A word with several vectors
(textual inversion) becomes the tokens word, word_1, word_2, ... as by diffusers' `maybe_convert_prompt`. The one difference:
the tokenizer finds such a word whole and in upper or lower case, where diffusers replaces the exact spelling, even within
other words.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Int32
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from distrijax.errors import CheckpointError, InvalidArgument, warn
from distrijax.json_config import parse_json
from distrijax.validate import check_choice, positive

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
WORD_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""A word of CLIP's: a contraction, a run of letters, a digit, or a run of other characters."""

DEFAULT_LENGTH = 77
"""Length of CLIP's input in tokens, where the folder gives none."""

SPECIAL_TOKENS = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
"""Defaults of the special tokens, in the order in which transformers adds them."""

FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "added_tokens.json", "vocab.json", "merges.txt"
)  # fmt: skip
"""The files of a tokenizer that are read, as far as they are there."""

Vocabulary = tuple[dict[str, int], list[tuple[str, str]], dict[int, AddedToken]]
"""Ids by token; merges, in order of priority; added tokens by id."""


@dataclasses.dataclass(frozen=True)
class CLIPTokenizer:
    """Turns prompts into ids, as transformers' CLIPTokenizer; `from_folder` and `from_files` read one.

    Attributes:
        bpe: The pipeline from text to ids, without start, end and padding.
        bos_token_id: Id of the start of text.
        eos_token_id: Id of the end of text.
        pad_token_id: Id of padding.
        length: Number of ids of every prompt, start and end of text included.
    """

    bpe: Tokenizer
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    length: int = DEFAULT_LENGTH

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Reads `tokenizer.json`, or `vocab.json` and `merges.txt`, and the special tokens that the folder names.

        Args:
            folder: A tokenizer of transformers, as in the diffusers layout.

        Raises:
            CheckpointError: For missing and corrupt files, and for a vocabulary that lacks the special tokens.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; give a tokenizer in the diffusers layout")
        try:
            files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
        except OSError as error:
            raise CheckpointError(f"{folder} is not readable ({error}); fetch its files again") from None
        return cls.from_files(files, str(folder))

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], folder: str) -> Self:
        """Reads the same files by name.

        Args:
            files: Their content.
            folder: Where they come from, for errors.

        Raises:
            CheckpointError: As `from_folder`.
        """
        settings = _read_settings(files, folder)
        special = {key: _added_token(settings[key], folder) for key in SPECIAL_TOKENS}
        reserved = {token.content for token in special.values()}
        vocabulary, merges, added = _read_vocabulary(files, folder, settings, reserved)
        try:
            bpe = byte_pair_encoder(vocabulary, merges, special["unk_token"].content)
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{folder} holds no usable vocabulary ({error}); fetch its files again") from None
        _add_tokens(bpe, added, list(special.values()), folder)
        ids = {key: bpe.token_to_id(token.content) for key, token in special.items()}
        length = settings.get("model_max_length", DEFAULT_LENGTH)
        if isinstance(length, int | float) and length > 2**31:  # transformers writes 10**30 for "unknown"
            length = DEFAULT_LENGTH
        positive(length, f"model_max_length of {folder}", least=3)
        return cls(bpe, ids["bos_token"], ids["eos_token"], ids["pad_token"], length)

    @property
    def vocab_size(self) -> int:
        """Number of ids; a text encoder needs at least as many embeddings."""
        return self.bpe.get_vocab_size()

    def __call__(self, prompts: Sequence[str]) -> Int32[np.ndarray, "b length"]:
        """Ids of prompts, each cut or padded to `length`; a DistriWarning names the words that are cut off.

        Raises:
            CheckpointError: For what is not a list of texts.
        """
        if not isinstance(prompts, list | tuple) or not prompts:
            raise InvalidArgument(f"prompts is {prompts!r}; give a list of at least one string")
        return np.asarray(list(map(self._ids, prompts)), np.int32)

    def _ids(self, prompt: str) -> list[int]:
        if not isinstance(prompt, str):
            raise InvalidArgument(f"a prompt is {prompt!r}, of type {type(prompt).__name__}; give a string")
        try:
            encoding = self.bpe.encode(prompt, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise InvalidArgument(f"the prompt {prompt!r} is not valid Unicode; write it in UTF-8") from None
        tokens = [
            (index, begin)
            for token, (begin, _) in zip(encoding.ids, encoding.offsets, strict=True)
            for index in self._runs.get(token, (token,))
        ]
        room = self.length - 2
        if len(tokens) > room:
            lost = prompt[tokens[room][1] :].strip()
            warn(f"the prompt has {len(tokens)} tokens and the text encoder reads {room}; it does not see: {lost!r}")
        ids = [self.bos_token_id, *(index for index, _ in tokens[:room]), self.eos_token_id]
        return ids + [self.pad_token_id] * (self.length - len(ids))

    @functools.cached_property
    def _runs(self) -> dict[int, tuple[int, ...]]:
        """The ids that words with several vectors become, by the id of the word itself."""
        added = {token.content: index for index, token in self.bpe.get_added_tokens_decoder().items()}
        runs = {}
        for word, index in added.items():
            run = [index]
            while (following := added.get(f"{word}_{len(run)}")) is not None:
                run.append(following)
            if len(run) > 1:
                runs[index] = tuple(run)
        return runs


def byte_pair_encoder(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], unknown: str = EOS
) -> Tokenizer:
    """CLIP's pipeline (normalisation, splitting, byte-pair encoding) for a vocabulary.

    Args:
        vocabulary: Token to id.
        merges: Pairs of tokens, the first to be merged first.
        unknown: Token for what the vocabulary lacks.

    Raises:
        Exception: Of `tokenizers`, which has no narrower class, for merges outside the vocabulary.
    """
    bpe = Tokenizer(BPE(dict(vocabulary), list(merges), end_of_word_suffix=WORD_END, unk_token=unknown))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return bpe


def _object(files: Mapping[str, bytes], folder: str, name: str) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no such file."""
    return parse_json(files[name], f"{folder}/{name}") if name in files else {}


def _read_settings(files: Mapping[str, bytes], folder: str) -> dict[str, Any]:
    """The settings of tokenizer_config.json and special_tokens_map.json, merged as in transformers."""
    names = ("tokenizer_config.json", "special_tokens_map.json")
    if not any(name in files for name in names):
        raise CheckpointError(f"{folder} has no tokenizer_config.json, which names the padding; fetch the whole folder")
    settings, special = (_object(files, folder, name) for name in names)
    settings = SPECIAL_TOKENS | settings | ({} if "added_tokens_decoder" in settings else special)
    check_choice(settings.get("padding_side", "right"), ("right",), f"padding_side of {folder}")
    return settings


def _read_vocabulary(
    files: Mapping[str, bytes], folder: str, settings: Mapping[str, Any], special: Collection[str]
) -> Vocabulary:
    """Reads the vocabulary's files; tokens in `special` are matched in the text before it is normalised."""
    content = _object(files, folder, "tokenizer.json")
    vocabulary, merges = _from_tokenizer_json(content, folder) if content else _from_vocab_and_merges(files, folder)
    if not all(isinstance(index, int) for index in vocabulary.values()):
        raise CheckpointError(f"{folder}: the vocabulary has ids that are not integers; fetch its files again")
    added = settings.get("added_tokens_decoder")
    if added is None:
        added = {}
        for text, index in _object(files, folder, "added_tokens.json").items():
            added[index] = {"content": text, "normalized": text not in special}
        added |= {token.get("id"): token for token in content.get("added_tokens", [])}
    try:
        return vocabulary, merges, {int(index): _added_token(added[index], folder) for index in sorted(added, key=int)}
    except (TypeError, ValueError):
        raise CheckpointError(
            f"{folder}: an added token has an id that is not an integer; fetch the files again"
        ) from None


def _from_tokenizer_json(content: Mapping[str, Any], folder: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model:
        raise CheckpointError(
            f"{folder}/tokenizer.json holds no byte pair encoding; use the tokenizer of a Stable Diffusion model"
        )
    check_choice(model.get("end_of_word_suffix"), (WORD_END,), f"end_of_word_suffix of {folder}/tokenizer.json")
    return model["vocab"], [_pair(merge, folder) for merge in model["merges"]]


def _from_vocab_and_merges(files: Mapping[str, bytes], folder: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    missing = [name for name in ("vocab.json", "merges.txt") if name not in files]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {' and '.join(missing)} (and has no tokenizer.json); fetch the whole folder"
        )
    try:
        lines = files["merges.txt"].decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder}/merges.txt is not readable ({error}); fetch the file again") from None
    merges = [_pair(line, folder) for line in lines if line.strip() and not line.startswith("#version")]
    return _object(files, folder, "vocab.json"), merges


def _pair(merge: str | list[str], folder: str) -> tuple[str, str]:
    parts = merge.split() if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2:
        raise CheckpointError(f"{folder}: the merge {merge!r} is not a pair of tokens; fetch the file again")
    return tuple(parts)


def _added_token(token: Any, folder: str) -> AddedToken:
    """A token that is matched in the prompt before that is split into words."""
    settings = {"content": token} if isinstance(token, str) else token
    if not isinstance(settings, dict) or not isinstance(settings.get("content"), str):
        raise CheckpointError(
            f"{folder} names the special token {token!r}, which is not a string; fetch its files again"
        )
    flags = {key: bool(settings[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in settings}
    return AddedToken(settings["content"], special=True, **flags)


def _add_tokens(bpe: Tokenizer, added: Mapping[int, AddedToken], special: Sequence[AddedToken], folder: str) -> None:
    """Adds tokens in transformers' order; one that is added twice with different flags keeps the later ones."""
    bpe.add_tokens(list(added.values()))
    for index, token in added.items():
        if bpe.token_to_id(token.content) != index:
            raise CheckpointError(
                f"{folder} gives {token.content!r} the id {index} and its vocabulary the id "
                f"{bpe.token_to_id(token.content)}; use files of one tokenizer"
            )
    lost = sorted({token.content for token in special if bpe.token_to_id(token.content) is None})
    if lost:
        raise CheckpointError(f"{folder}: the vocabulary lacks {', '.join(lost)}; use files of one tokenizer")
    declared = {token.content for token in added.values()}
    bpe.add_tokens([token for token in special if token.content not in declared])
