"""The encoders give the rows that the upstream scripts recorded, in any company."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from kcache.config import BuildConfig
from kcache.disk.memo import DigestMemo
from kcache.encoders.frozen import Encoder, load_encoder
from kcache.encoders.recipes import table_recipe
from kcache.encoders.repositories import Repository
from kcache.errors import InputRejected, ModelError
from kcache.store.recipe import Recipe, kind_of

CPU = torch.device("cpu")
AS_UPSTREAM = BuildConfig(batch_size=2, alpha="drop", resolution=(64,))


def repository(path: Path) -> Repository:
    return Repository(name=str(path), path=path, revision=None)


def recipe_of(table: str, oracle: Path, config: BuildConfig = AS_UPSTREAM) -> Recipe:
    with DigestMemo(oracle / "digests.sqlite") as memo:
        return table_recipe(table, config, repository(oracle / kind_of(table).role), memo)


def encoder_of(table: str, oracle: Path, config: BuildConfig = AS_UPSTREAM) -> Encoder:
    return load_encoder(recipe_of(table, oracle, config), repository(oracle / kind_of(table).role), CPU)


def recorded(oracle: Path, stage: str, name: str) -> np.ndarray:
    """An array of all recorded steps, batches joined: (20, …)."""
    with np.load(oracle / f"upstream_{stage}.npz") as steps:
        return np.concatenate([steps[f"{i}/{name}"] for i in range(int(steps["n"]))])


def samples(oracle: Path) -> list[tuple[bytes, str]]:
    lines = (oracle / "data" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [((oracle / "data" / row["file_name"]).read_bytes(), row["text"]) for row in rows]


def encode_each(encoder: Encoder, inputs: list) -> list[dict[str, torch.Tensor]]:
    return [encoder.encode([encoder.prepare(content)]) for content in inputs]


def distance_to_nearest(row: torch.Tensor, recorded_rows: np.ndarray) -> float:
    """Largest difference between a row and the recorded row that is most like it."""
    return float(np.abs(recorded_rows - row.numpy()).reshape(len(recorded_rows), -1).max(1).min())


def seen_in(oracle: Path, stage: str) -> list[int]:
    """Which samples the recorded run drew: those whose image_embeds it has."""
    rows = encode_each(encoder_of("image_embeds", oracle), [image for image, _ in samples(oracle)])
    known = recorded(oracle, stage, "image_embeds")
    return [i for i, row in enumerate(rows) if distance_to_nearest(row["image_embeds"][0], known) < 1e-5]


def test_image_embeds_are_those_of_the_upstream_scripts(oracle: Path) -> None:
    seen = set(seen_in(oracle, "prior")) | set(seen_in(oracle, "decoder"))
    # The two recorded runs drew every sample at least once.
    assert seen == set(range(10))


def test_latents_are_those_of_the_upstream_scripts(oracle: Path) -> None:
    seen = seen_in(oracle, "decoder")
    rows = encode_each(encoder_of("latents-64", oracle), [samples(oracle)[i][0] for i in seen])
    known = recorded(oracle, "decoder", "latents")
    assert len(rows) >= 8
    for row in rows:
        assert row["latents"].shape == (1, 4, 8, 8)
        assert distance_to_nearest(row["latents"][0], known) < 1e-5


def test_text_rows_are_those_of_the_upstream_scripts(oracle: Path) -> None:
    encoder = encoder_of("text", oracle)
    ids, mask = recorded(oracle, "prior", "text_input_ids"), recorded(oracle, "prior", "text_mask")
    embeds, states = recorded(oracle, "prior", "text_embeds"), recorded(oracle, "prior", "last_hidden_state")
    compared = 0
    for _, caption in samples(oracle):
        prepared = encoder.prepare(caption)
        row = encoder.encode([prepared])
        for step in np.flatnonzero((ids == prepared[0]).all(1)):
            assert prepared[1] == mask[step].sum()
            np.testing.assert_allclose(row["text_embeds"][0], embeds[step], atol=1e-5)
            np.testing.assert_allclose(row["text_encoder_hidden_states"], states[step][mask[step]], atol=1e-5)
            compared += 1
    assert compared >= 10


def test_text_offsets_cut_the_flat_states_into_captions(oracle: Path) -> None:
    encoder = encoder_of("text", oracle, replace(AS_UPSTREAM, batch_size=4))
    captions = ["a red circle", "", "red " * 200]
    together = encoder.encode([encoder.prepare(caption) for caption in captions])
    offsets = together["text_offsets"]
    assert offsets.dtype == torch.int64
    assert offsets[0] == 0
    assert offsets.diff().tolist() == [encoder.prepare(caption)[1] for caption in captions]
    assert offsets.diff().tolist()[1:] == [2, 77]
    for i, alone in enumerate(encode_each(encoder, captions)):
        rows = together["text_encoder_hidden_states"][offsets[i] : offsets[i + 1]]
        assert torch.equal(rows, alone["text_encoder_hidden_states"])


@pytest.mark.parametrize("table", ["image_embeds", "latents-64", "text"])
def test_a_row_does_not_depend_on_its_company(oracle: Path, table: str) -> None:
    encoder = encoder_of(table, oracle, replace(AS_UPSTREAM, batch_size=3))
    inputs = [caption if table == "text" else image for image, caption in samples(oracle)[:3]]
    prepared = [encoder.prepare(content) for content in inputs]
    field = encoder.recipe.fields[0].name
    together = encoder.encode(prepared)[field]
    alone = encoder.encode(prepared[2:])[field]
    assert alone.shape == (1, *encoder.recipe.fields[0].shape)
    assert torch.equal(together[2:], alone)


def test_more_inputs_than_the_batch_holds_are_refused(oracle: Path) -> None:
    encoder = encoder_of("text", oracle)
    with pytest.raises(ValueError, match="shape"):
        encoder.encode([encoder.reserved()] * 3)


def test_reserved_rows_are_zero_pixels_and_the_empty_caption(oracle: Path) -> None:
    image, text, latents = (encoder_of(table, oracle) for table in ("image_embeds", "text", "latents-64"))
    assert image.reserved().shape == (3, 224, 224)
    assert not image.reserved().any()
    np.testing.assert_array_equal(text.reserved()[0], text.prepare("")[0])
    assert latents.reserved() is None
    assert image.encode([image.reserved()])["image_embeds"].isfinite().all()


@pytest.mark.parametrize(("mixed_precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("table", ["image_embeds", "latents-64", "text"])
def test_half_precision_is_close_to_float32(oracle: Path, table: str, mixed_precision: str, dtype: torch.dtype) -> None:
    half = encoder_of(table, oracle, replace(AS_UPSTREAM, mixed_precision=mixed_precision))
    full = encoder_of(table, oracle)
    content = samples(oracle)[0][1 if table == "text" else 0]
    rows = half.encode([half.prepare(content)])
    for name, expected in full.encode([full.prepare(content)]).items():
        assert rows[name].dtype == (torch.int64 if name == "text_offsets" else dtype)
        torch.testing.assert_close(rows[name].float(), expected.float(), atol=0.1, rtol=0.05)


def scaled_copy(oracle: Path, folder: Path, name: str, factor: float) -> Path:
    """A copy of the prior in whose image encoder the weights called `name` are multiplied."""
    shutil.copytree(oracle / "prior", folder)
    file = folder / "image_encoder" / "model.safetensors"
    weights = load_file(file)
    save_file({key: value * factor if key == name else value for key, value in weights.items()}, file, {"format": "pt"})
    return folder


def test_only_rows_that_overflow_are_encoded_again_in_float32(oracle: Path, tmp_path: Path) -> None:
    # Patches with large pixels overflow float16 in the embedding; the layer norm behind it brings float32 into range.
    prior = scaled_copy(oracle, tmp_path / "prior", "vision_model.embeddings.patch_embedding.weight", 1e3)
    recipe = recipe_of("image_embeds", oracle, replace(AS_UPSTREAM, mixed_precision="fp16"))
    encoder = load_encoder(recipe, repository(prior), CPU)
    calm = encoder.reserved()
    wild = np.random.default_rng(0).normal(0, 2000, calm.shape).astype(np.float32)
    rows = encoder.encode([calm, wild])["image_embeds"]
    assert rows.dtype == torch.float16
    float32 = load_encoder(recipe_of("image_embeds", oracle), repository(prior), CPU)
    exact = float32.encode([calm, wild])["image_embeds"]
    assert torch.equal(rows[1], exact[1].half())
    assert torch.equal(rows[0], encoder.encode([calm])["image_embeds"][0])
    assert not torch.equal(rows[0], exact[0].half())


def test_rows_that_stay_non_finite_are_returned_as_they_are(oracle: Path, tmp_path: Path) -> None:
    prior = scaled_copy(oracle, tmp_path / "prior", "visual_projection.weight", float("inf"))
    recipe = recipe_of("image_embeds", oracle, replace(AS_UPSTREAM, mixed_precision="fp16"))
    encoder = load_encoder(recipe, repository(prior), CPU)
    assert not encoder.encode([encoder.reserved()])["image_embeds"].isfinite().any()


@pytest.mark.parametrize("otherwise", [False, True])
def test_captions_become_the_tokens_that_upstream_makes_of_them(
    otherwise: bool, oracle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if otherwise:  # than the Rust tokenizer behind it
        call = CLIPTokenizer.__call__
        monkeypatch.setattr(CLIPTokenizer, "__call__", lambda self, text, **how: call(self, f"so {text}", **how))
    encoder = encoder_of("text", oracle)
    tokenizer = CLIPTokenizer.from_pretrained(oracle / "prior" / "tokenizer", local_files_only=True)
    for caption in ("", "A  Red ball, naïve", "<|endoftext|> one", "word " * 200):
        tokens = tokenizer(caption, max_length=77, padding="max_length", truncation=True)
        ids, valid = encoder.prepare(caption)
        assert (ids.dtype, ids.tolist(), valid) == (np.int64, tokens.input_ids, sum(tokens.attention_mask))


def test_a_caption_that_is_no_text_is_rejected_by_name(oracle: Path) -> None:
    with pytest.raises(InputRejected, match="tokenize"):
        encoder_of("text", oracle).prepare("half a pair: \ud83d")


@pytest.mark.parametrize(
    ("component", "table"), [("prior/image_encoder", "image_embeds"), ("decoder/movq", "latents-64")]
)
def test_weights_that_a_file_lacks_are_never_made_up(oracle: Path, tmp_path: Path, component: str, table: str) -> None:
    recipe = recipe_of(table, oracle)
    for part in ("prior", "decoder"):
        shutil.copytree(oracle / part, tmp_path / part)
    file = next((tmp_path / component).glob("*.safetensors"))
    weights = load_file(file)
    save_file(dict(list(weights.items())[2:]), file, {"format": "pt"})
    with pytest.raises(ModelError, match=Path(component).name):
        load_encoder(recipe, repository(tmp_path / component.split("/")[0]), CPU)
