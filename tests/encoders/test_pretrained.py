"""Networks are loaded whole or not at all, from safetensors only, and the screen stays the user's."""

import json
import logging
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import KandinskyV22Pipeline, PriorTransformer
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection
from transformers.utils import is_torchvision_available
from transformers.utils import logging as transformers_logging

from kcache.encoders.pretrained import cast_pipeline, load_pretrained, provenance, without_advice, without_bars
from kcache.errors import ModelError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def prior(oracle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(oracle / "prior" / "prior", tmp_path / "prior"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_of_both_libraries_are_loaded_in_the_dtype_asked_for(oracle: Path, dtype: torch.dtype) -> None:
    for kind, folder in ((PriorTransformer, "prior"), (CLIPTextModelWithProjection, "text_encoder")):
        network = load_pretrained(kind, oracle / "prior" / folder, dtype)
        assert isinstance(network, kind)
        assert {parameter.dtype for parameter in network.parameters()} == {dtype}


def test_weights_that_are_missing_are_named(prior: Path) -> None:
    tensors = load_file(prior / WEIGHTS)
    del tensors["proj_in.bias"]
    save_file(tensors, prior / WEIGHTS)
    with pytest.raises(ModelError, match=r"lacks weights of PriorTransformer.*proj_in\.bias \(1 in all\)"):
        load_pretrained(PriorTransformer, prior, torch.float32)


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "of another shape", "config missing", "config no JSON"])
def test_what_cannot_be_loaded_is_refused_in_one_message(prior: Path, damage: str) -> None:
    weights, settings = prior / WEIGHTS, prior / "config.json"
    match damage:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-9])
        case "empty":
            weights.write_bytes(b"")
        case "missing":
            weights.unlink()
        case "of another shape":
            settings.write_text(json.dumps(json.loads(settings.read_text()) | {"embedding_dim": 48}))
        case "config missing":
            settings.unlink()
        case "config no JSON":
            settings.write_text("{")
    with pytest.raises(ModelError, match=str(prior)):
        load_pretrained(PriorTransformer, prior, torch.float32)


def test_weights_of_other_shapes_are_named_with_both(oracle: Path, tmp_path: Path) -> None:
    shutil.copytree(oracle / "prior/text_encoder", tmp_path / "text_encoder")
    settings = tmp_path / "text_encoder/config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"max_position_embeddings": 78}))
    with pytest.raises(ModelError, match=r"position_embedding.weight \(77, \d+\) for \(78, \d+\) \(1 in all\)"):
        load_pretrained(CLIPTextModelWithProjection, tmp_path / "text_encoder", torch.float32)


def test_pickled_weights_are_not_read(prior: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.mkdir, (tmp_path / "run-by-a-pickle",)  # type: ignore[return-value]

    (prior / WEIGHTS).unlink()
    (prior / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError, match="cannot be loaded as PriorTransformer"):
        load_pretrained(PriorTransformer, prior, torch.float32)
    assert not (tmp_path / "run-by-a-pickle").exists()


def test_all_networks_of_a_pipeline_are_cast(oracle: Path) -> None:
    with without_bars():
        pipeline = KandinskyV22Pipeline.from_pretrained(oracle / "decoder")
    cast_pipeline(pipeline, torch.float16)
    for network in (pipeline.unet, pipeline.movq):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float16}


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_left_as_they_were(shown: bool) -> None:
    libraries = (diffusers_logging, transformers_logging)
    before = [library.is_progress_bar_enabled() for library in libraries]
    hub = are_progress_bars_disabled()
    try:
        for library in libraries:
            library.enable_progress_bar() if shown else library.disable_progress_bar()
        hub_within = are_progress_bars_disabled()
        with without_bars():
            assert not any(library.is_progress_bar_enabled() for library in libraries)
        assert [library.is_progress_bar_enabled() for library in libraries] == [shown, shown]
        assert are_progress_bars_disabled() == hub_within
    finally:
        for library, was_shown in zip(libraries, before, strict=True):
            library.enable_progress_bar() if was_shown else library.disable_progress_bar()
    assert are_progress_bars_disabled() == hub


@pytest.mark.parametrize("silent", [True, False])
def test_of_advice_only_that_on_torchvision_is_kept_off_the_screen(
    silent: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger, said = logging.getLogger("transformers.utils.import_utils"), list[str]()
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger.manager, "disable", logging.NOTSET)
    caplog.set_level(logging.WARNING, logger.name)  # other tests have the library say errors only
    # As in a process that has not yet asked for it.
    monkeypatch.delitem(vars(transformers), "CLIPImageProcessor", raising=False)
    type(logger).warning_once.cache_clear()  # type: ignore[attr-defined]
    with without_advice() if silent else nullcontext():
        assert transformers.CLIPImageProcessor
        logger.warning("something else")
    advice = 0 if silent or is_torchvision_available() else 1
    assert [line for line in said if "torchvision" not in line] == ["something else"]
    assert len(said) == 1 + advice


def test_rows_are_said_to_be_made_where_the_network_runs() -> None:
    assert provenance(torch.device("meta"))["device"].startswith("meta (")
