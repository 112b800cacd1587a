"""Compiled blocks learn what plain ones do, under the same names, and are compiled a few times only."""

from collections.abc import Callable
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from padded import LENGTHS, assert_equal_gradients, gradients, make_batch, make_prior, predict_padded
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from short_runs import LORA_WEIGHTS, WEIGHTS, config, course, tensor_names
from torch._inductor import config as inductor_settings
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from kcache.errors import ConfigError
from kcache.objectives import blocks as compilation
from kcache.objectives.blocks import check_compiler, compile_blocks, recompute_blocks, uncompiled
from kcache.objectives.packing import allow_packing, predict_packed
from kcache.store.run_directory import read_validation
from kcache.training.network.objective import load_network
from kcache.training.trainer import train

pytestmark = [
    pytest.mark.usefixtures("forgetful"),
    # What torch does while it compiles.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that were made, by a backend that runs them as they are: quick, and exact."""
    made: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", backend)
    return made


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_prior_has_the_gradients_of_the_plain_one(graphs: list[Any], recompute: bool) -> None:
    plain, prior = make_prior().double(), make_prior().double()
    batch, names = make_batch(LENGTHS, torch.float64), set(prior.state_dict())
    allow_packing(prior)
    compile_blocks(prior, packed=True)
    if recompute:
        recompute_blocks(prior)
    expected = gradients(plain, predict_padded(plain, batch))
    found = gradients(prior, predict_packed(prior, **batch, bucketed=True))
    assert_equal_gradients(found, expected)
    assert set(prior.state_dict()) == names
    assert len(graphs) == 1


def test_blocks_that_are_alike_and_batches_of_one_bucket_share_a_graph(graphs: list[Any]) -> None:
    prior = make_prior()
    allow_packing(prior)
    compile_blocks(prior, packed=True)
    for lengths in [(20, 15), (18, 17), (22, 14)]:
        predict_packed(prior, **make_batch(lengths), bucketed=True).sum().backward()
    assert len(graphs) == 1
    with uncompiled(True):
        predict_packed(prior, **make_batch((3, 4, 5)), bucketed=True)
    assert len(graphs) == 1
    with uncompiled(False):
        predict_packed(prior, **make_batch((3, 4, 5)), bucketed=True)
    assert len(graphs) == 2


def test_pictures_of_many_shapes_share_graphs(graphs: list[Any]) -> None:
    """Twelve shapes, and graphs for two kinds of blocks: of one picture and of more, of squares and of others."""
    plain = torch.nn.Sequential(ResnetBlock2D(in_channels=32, temb_channels=None), Attention(32, heads=2, dim_head=16))
    made = deepcopy(plain)
    compile_blocks(made, packed=False, shaped=True)
    for number, (height, width) in enumerate(product((4, 6, 8, 10), (4, 6, 8))):
        rows = torch.randn(1 + number % 3, 32, height, width, generator=torch.Generator().manual_seed(number))
        for network in (plain, made):
            network[1](network[0](rows, None)).square().sum().backward()
    assert len(graphs) <= 2 * 4
    for found, expected in zip(made.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize(("stage", "rank"), [("prior", None), ("decoder", 2)])
def test_a_compiled_run_goes_as_a_plain_one_and_is_resumed(
    oracle: Path, cache: str, tmp_path: Path, graphs: list[Any], stage: str, rank: int | None
) -> None:
    settings: dict[str, Any] = {
        "lora_rank": rank, "use_ema": True, "val_fraction": 0.3, "validation_steps": 2, "checkpointing_steps": 2,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-3,
    }  # fmt: skip
    fast = settings | {"compile": True, "gradient_checkpointing": True}
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    train(cache, config(plain, stage, **settings))
    assert not graphs
    train(cache, config(compiled, stage, **fast | {"max_train_steps": 2}))
    assert graphs
    train(cache, config(compiled, stage, resume_from_checkpoint="latest", **fast))
    for found, expected in zip(course(compiled), course(plain), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for mine, theirs in zip(read_validation(compiled), read_validation(plain), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert tensor_names(compiled) == tensor_names(plain)
    assert {"checkpoint-2/optimizer.safetensors", "checkpoint-4/ema.safetensors"} < tensor_names(compiled).keys()
    stock = load_network(stage, oracle / stage)
    if rank is None:
        _, found = type(stock).from_pretrained((compiled / WEIGHTS[stage]).parent, output_loading_info=True)
        assert not any(found.values())
    else:
        stock.load_lora_adapter(compiled, prefix=None, weight_name=LORA_WEIGHTS)
        assert set(get_peft_model_state_dict(stock, adapter_name="default_0")) == set(
            load_file(compiled / LORA_WEIGHTS)
        )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_the_real_compiler_trains_as_plain_blocks_do(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and norms within 1e-5, weights within 1e-6 of themselves and of what two steps of 1e-3 move them."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"torch's inductor finds no C++ compiler: {error}")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(inductor_settings, "compile_threads", 1)
    monkeypatch.setattr(inductor_settings.cpp, "vec_isa_ok", True)  # as the processor says, without a trial
    monkeypatch.setattr("kcache.training.choice.check_compiler", lambda device: None)  # the run itself will show
    # All samples, so that the steps share a shape; what is nothing but rounding is not learnt from as if it mattered.
    settings: dict[str, Any] = {
        "train_batch_size": 10, "gradient_accumulation_steps": 1, "max_train_steps": 2, "learning_rate": 1e-3,
        "adam_epsilon": 1e-2,
    }  # fmt: skip
    for compiled in (False, True):
        train(cache, config(tmp_path / str(compiled), compile=compiled, **settings))
    for found, expected in zip(course(tmp_path / "True"), course(tmp_path / "False"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    weights, plain = (load_file(tmp_path / name / WEIGHTS["prior"]) for name in ("True", "False"))
    assert weights.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_padded_captions_and_several_draws_are_compiled_too(cache: str, tmp_path: Path, graphs: list[Any]) -> None:
    courses = []
    for packing in (True, False):
        run_dir = tmp_path / str(packing)
        train(cache, config(run_dir, packing=packing, noise_draws=2, compile=True, max_train_steps=2))
        courses.append(course(run_dir))
    assert graphs
    for packed, padded in zip(*courses, strict=True):
        assert packed == pytest.approx(padded, rel=1e-5)


def test_what_cannot_be_compiled_is_refused_before_anything_is_begun(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "none-such")
    with pytest.raises(ConfigError, match=r"--compile fails on cpu \(Invalid backend.*expected .*--no-compile"):
        train(cache, config(tmp_path / "run", compile=True))
    assert not (tmp_path / "run").exists()

    def backend(graph: Any, inputs: Any) -> Any:
        raise FileNotFoundError("no compiler")

    monkeypatch.setattr(compilation, "BACKEND", backend)
    with pytest.raises(ConfigError, match="no compiler"):
        check_compiler(torch.device("cpu"))


def test_a_promise_to_repeat_bit_for_bit_is_not_given_for_compiled_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--compile with --deterministic.*expected one of the two"):
        config(tmp_path, compile=True, deterministic=True)
