"""Learned words put into a checkpoint by distrijax.convert.adapters.inversion, against diffusers' `load_textual_inversion`."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from facts import refuses, warns
from flax import nnx
from safetensors.numpy import save_file
from tensor_files import everything
from tiny_pipeline import TEXT_WIDTH, load_torch_pipeline
from transformers import CLIPTokenizer as TorchTokenizer

from distrijax.convert.adapters.inversion import Embedding, with_embeddings
from distrijax.convert.complete import check_complete
from distrijax.models.clip import CLIPTextConfig, CLIPTextEncoder
from distrijax.models.layers import abstract
from distrijax.models.tokenizer import CLIPTokenizer
from distrijax.weights.checkpoint import Checkpoint
from distrijax.weights.load import load_module
from distrijax.weights.tensors import Tensors, of_array

PROMPTS = [
    "a red <thing> on a table",
    "photo of <thing>, <thing>",
    "a <thing>.",
    "a red square",
    "two words-long circles",
]
"""The learned word is `<thing>`, of one or three vectors."""


def vectors(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def of(**arrays: np.ndarray) -> Tensors:
    return {name: of_array(array) for name, array in arrays.items()}


def written(checkpoint: Checkpoint, part: str, folder: Path) -> tuple[CLIPTokenizer, CLIPTextEncoder]:
    """The tokenizer and the text encoder as the package reads them from a folder."""
    names = {part: folder / part, "tokenizer": folder / part.replace("text_encoder", "tokenizer")}
    for path, content in checkpoint.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    names[part].mkdir()
    save_file({name: t.read() for name, t in checkpoint.tensors[part].items()}, names[part] / "model.safetensors")
    projected = part == "text_encoder_2"
    config = CLIPTextConfig.from_dict(checkpoint.configs[part])
    module = abstract(partial(CLIPTextEncoder, config, with_projection=projected, penultimate=projected))
    place = lambda _, values: jnp.asarray(everything(values))  # noqa: E731
    loaded = load_module(module, checkpoint.tensors[part], part, dtype=jnp.float32, place=place)
    return CLIPTokenizer.from_folder(names["tokenizer"]), loaded


def embeddings_of(tokenizer: CLIPTokenizer, encoder: CLIPTextEncoder, prompts: list[str]) -> np.ndarray:
    graph, state = nnx.split(encoder)
    return np.asarray(jax.jit(lambda state, ids: nnx.merge(graph, state)(ids)[0])(state, tokenizer(prompts)))


@pytest.mark.parametrize(
    "kind, shape",
    [
        ("diffusers", (TEXT_WIDTH,)),
        ("diffusers", (3, TEXT_WIDTH)),
        ("a1111", (3, TEXT_WIDTH)),
        ("pickle", (1, TEXT_WIDTH)),
    ],
)
def test_prompts_with_the_word_embed_as_in_diffusers(sd, tiny_sd_checkpoints, tmp_path, kind, shape):
    learned = vectors(*shape)
    tensors = {
        "diffusers": of(**{"<thing>": learned}),
        "a1111": of(emb_params=learned),
        "pickle": of(**{"string_to_param.*": learned, "string_to_token.*": np.asarray(265)}),
    }[kind]
    word = None if kind == "diffusers" else "<thing>"
    ours = with_embeddings(sd, [Embedding(tensors, "a file", word)])
    check_complete(ours)
    tokenizer, encoder = written(ours, "text_encoder", tmp_path)

    pipe = load_torch_pipeline(tiny_sd_checkpoints[1])
    pipe.load_textual_inversion({"<thing>": torch.from_numpy(learned)})
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
    np.testing.assert_allclose(embeddings_of(tokenizer, encoder, PROMPTS), expected.numpy(), atol=2e-5)


def test_words_for_both_encoders_of_sdxl_embed_as_in_diffusers(xl, tiny_checkpoint, tmp_path):
    learned = {"clip_l": vectors(2, TEXT_WIDTH), "clip_g": vectors(4, TEXT_WIDTH)}
    ours = with_embeddings(xl, [Embedding(of(**learned), "a file", "<thing>")])
    check_complete(ours)
    pipe = load_torch_pipeline(tiny_checkpoint)
    for (name, array), suffix in zip(learned.items(), ("", "_2"), strict=True):
        part = f"text_encoder{suffix}"
        torch_parts = {"tokenizer": getattr(pipe, f"tokenizer{suffix}"), "text_encoder": getattr(pipe, part)}
        pipe.load_textual_inversion({"<thing>": torch.from_numpy(array)}, **torch_parts)
        assert (
            ours.tensors[part]["text_model.embeddings.token_embedding.weight"].shape[0]
            == ours.configs[part]["vocab_size"]
        )
        assert ours.configs[part]["vocab_size"] == xl.configs[part]["vocab_size"] + len(array), name
    with torch.no_grad():
        expected = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)[0][..., TEXT_WIDTH:]
    tokenizer, encoder = written(ours, "text_encoder_2", tmp_path)
    np.testing.assert_allclose(embeddings_of(tokenizer, encoder, PROMPTS), expected.numpy(), atol=2e-5)


def test_several_words_get_rows_of_their_own(sd, tmp_path):
    words = {"<one>": vectors(2, TEXT_WIDTH), "<two>": vectors(TEXT_WIDTH)}
    ours = with_embeddings(sd, [Embedding(of(**{word: array}), word) for word, array in words.items()])
    tokenizer, _ = written(ours, "text_encoder", tmp_path)
    table = ours.tensors["text_encoder"]["text_model.embeddings.token_embedding.weight"].read()
    before = sd.tensors["text_encoder"]["text_model.embeddings.token_embedding.weight"].read()
    np.testing.assert_array_equal(table[: len(before)], before)
    for word, array in words.items():
        (ids,) = tokenizer([word])
        expected = np.atleast_2d(array)
        np.testing.assert_array_equal(table[ids[1 : 1 + len(expected)]], expected)
        assert ids[1 + len(expected)] == tokenizer.eos_token_id


@pytest.mark.parametrize("layout", ["vocabulary", "saved by transformers", "added before"])
def test_tokenizer_files_are_read_alike_by_transformers(sd, tiny_sd_checkpoints, tmp_path, layout):
    """The ids of transformers for the text that diffusers makes of the prompt."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_sd_checkpoints[1] / "tokenizer", folder)
    if layout != "vocabulary":
        tokenizer = TorchTokenizer.from_pretrained(folder)
        if layout == "added before":
            tokenizer.add_tokens(["<old>"])
        shutil.rmtree(folder)
        tokenizer.save_pretrained(folder)
    files = {f"tokenizer/{file.name}": file.read_bytes() for file in folder.iterdir()}
    rows = sd.configs["text_encoder"]["vocab_size"] + (layout == "added before")
    tensors = {**sd.tensors["text_encoder"], TABLE: of_array(vectors(rows, TEXT_WIDTH))}
    base = Checkpoint(sd.index, sd.configs, {**sd.tensors, "text_encoder": tensors}, files)
    ours = with_embeddings(base, [Embedding(of(**{"<thing>": vectors(3, TEXT_WIDTH)}), "a file")])
    for path, content in ours.files.items():
        (tmp_path / path).write_bytes(content)
    theirs, mine = TorchTokenizer.from_pretrained(folder), CLIPTokenizer.from_folder(folder)
    prompts = [*PROMPTS, "an <old> one"]
    plain = [prompt.replace("<thing>", "<thing> <thing>_1 <thing>_2") for prompt in prompts]
    expected = theirs(plain, padding="max_length", max_length=77, truncation=True).input_ids
    assert mine(prompts).tolist() == expected
    assert mine.vocab_size == rows + 3 == len(theirs)


TABLE = "text_model.embeddings.token_embedding.weight"


def test_word_is_found_in_any_case_and_counts_all_its_vectors_against_the_limit(sd, tmp_path):
    ours = with_embeddings(sd, [Embedding(of(emb_params=vectors(30, TEXT_WIDTH)), "a file", "EasyThing")])
    tokenizer, _ = written(ours, "text_encoder", tmp_path)
    first = sd.configs["text_encoder"]["vocab_size"]
    (ids,) = tokenizer(["easything"])
    assert ids[1:31].tolist() == list(range(first, first + 30))
    with warns(91, 75, "'EasyThing red'"):
        (ids,) = tokenizer(["EasyThing EasyThing EasyThing red"])
    assert ids[61:76].tolist() == list(range(first, first + 15)) and ids[76] == tokenizer.eos_token_id


def test_rows_that_no_token_uses_are_filled_before_the_table_grows(sd):
    held = sd.tensors["text_encoder"]
    padded = np.concatenate([held[TABLE].read(), vectors(2, TEXT_WIDTH)])
    base = sd.with_tensors("text_encoder", {**held, TABLE: of_array(padded.astype(np.float16))})
    learned = vectors(3, TEXT_WIDTH)
    table = with_embeddings(base, [Embedding(of(word=learned), "a file", "<w>")]).tensors["text_encoder"][TABLE]
    assert table.shape == (len(padded) + 1, TEXT_WIDTH) and table.read().dtype == np.float16
    np.testing.assert_array_equal(table.read()[-3:], learned.astype(np.float16))
    short = with_embeddings(base, [Embedding(of(word=learned[:1]), "a file", "<w>")]).tensors["text_encoder"][TABLE]
    np.testing.assert_array_equal(short.read()[-2:], [learned[0].astype(np.float16), padded[-1].astype(np.float16)])


def test_words_that_can_not_be_added_are_refused(sd, xl):
    one = of(emb_params=vectors(2, TEXT_WIDTH))
    known = next(iter(json.loads(sd.files["tokenizer/vocab.json"])))
    twice = [Embedding(one, "a file", "<w>"), Embedding(one, "a file", "<W>")]
    two = of(clip_l=vectors(2, TEXT_WIDTH), clip_g=vectors(2, TEXT_WIDTH))
    for checkpoint, embeddings, told in [
        (sd, [Embedding(one, "a file")], ["a file", "word"]),
        (sd, [Embedding(one, "a file", " w ")], ["a file", "word", "' w '"]),
        (sd, [Embedding(one, "a file", known)], ["a file", repr(known), "tokenizer"]),
        (sd, twice, ["a file", "<W>, <W>_1", "tokenizer"]),
        (sd, [Embedding(of(emb_params=vectors(2, 7)), "a file", "<w>")], ["a file", "[2, 7]", "[n, 32]"]),
        (sd, [Embedding(of(a=vectors(1, 32), b=vectors(1, 32)), "a file", "<w>")], ["a file", "2 tensors (a, b)"]),
        (sd, [Embedding(two, "a file", "<w>")], ["a file", "Stable Diffusion XL", "text_encoder"]),
        (xl, [Embedding(one, "a file", "<w>")], ["a file", 2, "Stable Diffusion XL", "clip_l", "clip_g"]),
    ]:
        with refuses(*told):
            with_embeddings(checkpoint, embeddings)
