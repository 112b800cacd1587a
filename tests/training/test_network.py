"""The network that learns is what the settings make of it, learns as plainly made, and is saved and found again."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from padded import assert_equal_gradients
from recorded import recorded_steps
from safetensors.torch import load_file
from short_runs import LORA_WEIGHTS, STAGES, WEIGHTS, config
from torch import Tensor
from torch.nn.functional import pad

from kcache.config import TrainConfig
from kcache.encoders.repositories import COMPONENTS, PIPELINES, Repository
from kcache.errors import ConfigError, ModelError
from kcache.objectives import blocks as compilation
from kcache.objectives.losses import OBJECTIVES, DecoderObjective, Objective, PriorObjective
from kcache.training.network.objective import load_network, load_objective
from kcache.training.network.saved import save_network

CONSTANTS = {"clip_mean", "clip_std"}


def load(oracle: Path, stage: str, saved: Path | None = None, **settings: Any) -> Objective:
    base = Repository(name="base", path=oracle / stage, revision=None)
    return load_objective(config(Path("run"), stage, **settings), base, saved)


def with_draws(step: dict[str, Tensor], draws: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A recorded step of the prior with `draws` draws of noise for each caption, and with a copy of it for each."""
    generator = torch.Generator().manual_seed(2)
    rows, width = draws * len(step["image_embeds"]), step["image_embeds"].shape[1]
    drawn = {
        "noise": torch.randn(rows, width, generator=generator),
        "timesteps": torch.randint(0, 1000, (rows,), generator=generator),
    }
    captions = step["text_encoder_hidden_states"].split(step["text_offsets"].diff().tolist())
    copies = {
        "image_embeds": step["image_embeds"].repeat_interleave(draws, 0),
        "text_embeds": step["text_embeds"].repeat_interleave(draws, 0),
        "text_encoder_hidden_states": torch.cat([caption for caption in captions for _ in range(draws)]),
        "text_offsets": pad(step["text_offsets"].diff().repeat_interleave(draws).cumsum(0), (1, 0)),
    }
    return step | drawn, copies | drawn


def learning(network: ModelMixin) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("stage", STAGES)
def test_everything_learns_but_the_constants(oracle: Path, stage: str) -> None:
    objective = load(oracle, stage, mixed_precision="bf16")
    assert isinstance(objective, PriorObjective if stage == "prior" else DecoderObjective)
    names = {name for name, _ in objective.network.named_parameters()}
    assert learning(objective.network) == names - CONSTANTS
    assert {parameter.dtype for parameter in objective.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("asked", [{"inpaint": True}, {"hint": "depth"}], ids=str)
def test_what_a_widened_decoder_learns_whole_is_never_rounded_and_comes_back(
    oracle: Path, tmp_path: Path, asked: dict[str, Any]
) -> None:
    settings = {"lora_rank": 2, "mixed_precision": "bf16", **asked}
    network = load(oracle, "decoder", **settings).network
    parts = {name.partition(".input_hint_block")[0] for name in learning(network) if ".lora_" not in name}
    assert parts == {"conv_in.weight", "conv_in.bias"} | ({"add_embedding"} if "hint" in asked else set())
    assert {network.get_parameter(name).dtype for name in learning(network)} == {torch.float32}
    assert network.conv_out.weight.dtype == torch.bfloat16
    own = load_network("decoder", oracle / "decoder").conv_in
    assert torch.equal(network.conv_in.weight[:, :4], own.weight)
    assert not network.conv_in.weight[:, 4:].any()
    with torch.no_grad():
        for name in learning(network):
            network.get_parameter(name).add_(0.01)
    save_network("decoder", network, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_WEIGHTS]
    again = load(oracle, "decoder", saved=tmp_path, **settings).network
    assert learning(again) == learning(network)
    assert list(again.state_dict()) == list(network.state_dict())
    assert all(torch.equal(again.state_dict()[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("stage", STAGES)
def test_beside_adapters_the_weights_wait_in_the_dtype_that_is_computed_in(oracle: Path, stage: str) -> None:
    network = load(oracle, stage, lora_rank=2, mixed_precision="bf16").network
    assert all(".lora_" in name for name in learning(network))
    for name, parameter in network.named_parameters():
        expected = torch.float32 if ".lora_" in name or name in CONSTANTS else torch.bfloat16
        assert parameter.dtype == expected, name


def test_adapters_have_the_rank_scale_and_layers_that_are_asked_for(oracle: Path) -> None:
    asked = {"lora_rank": 3, "lora_alpha": 6.0, "lora_dropout": 0.25, "lora_target_modules": ("to_q", "net.2")}
    network = load(oracle, "prior", **asked).network
    layers = [module for module in network.modules() if hasattr(module, "lora_A")]
    assert len(layers) == 4  # two blocks
    for layer in layers:
        assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (3, 2.0, 0.25)


@pytest.mark.parametrize("stage", STAGES)
def test_a_network_comes_back_from_where_it_was_saved(oracle: Path, tmp_path: Path, stage: str) -> None:
    objective = load(oracle, stage)
    with torch.no_grad():
        for parameter in objective.network.parameters():
            parameter.add_(1.0)
    save_network(stage, objective.network, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PIPELINES[stage].network]
    again = load(oracle, stage, saved=tmp_path).network.state_dict()
    written = load_file(tmp_path / WEIGHTS[stage])
    assert all(torch.equal(again[name], value) for name, value in objective.network.state_dict().items())
    assert again.keys() == written.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_come_back_onto_the_base(oracle: Path, tmp_path: Path, stage: str) -> None:
    objective = load(oracle, stage, lora_rank=2)
    with torch.no_grad():
        for name, parameter in objective.network.named_parameters():
            if ".lora_" in name:
                parameter.add_(1.0)
    save_network(stage, objective.network, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_WEIGHTS]
    again = load(oracle, stage, saved=tmp_path, lora_rank=2, lora_dropout=0.5).network
    assert learning(again) == learning(objective.network)
    before, after = objective.network.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("stage", STAGES)
def test_an_objective_is_of_the_half_that_its_stage_trains(stage: Any) -> None:
    kind, pipeline = OBJECTIVES[stage], PIPELINES[stage]
    assert kind.stage == stage
    assert kind.network_class.__name__ == COMPONENTS[pipeline.network].class_name
    for dropped in ("caption", "image"):
        with nullcontext() if dropped == kind.dropped else pytest.raises(ConfigError, match=f"--{dropped}-dropout"):
            TrainConfig(stage=stage, output_dir="run", **{f"{dropped}_dropout": 0.1})


def loss_and_gradients(objective: Objective, step: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of adapters, if there are any, that have been learning for a while: as they start, half their gradients are 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in objective.train().network.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        loss = objective(step, step["noise"], step["timesteps"])
        loss.backward()
    found = {name: p.grad for name, p in objective.network.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | found


@pytest.mark.usefixtures("forgetful")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("rank", "fast"),
    [
        (rank, {"packing": packing, "gradient_checkpointing": recompute, "compile": compiled})
        for rank in (None, 2)
        for packing, recompute, compiled in [
            (False, False, False), (False, True, True), (True, True, False), (True, False, True), (True, True, True)
        ]
    ],
    ids=str,
)  # fmt: skip
def test_several_draws_teach_the_prior_what_copies_of_the_caption_teach_the_plain_one(
    oracle: Path, monkeypatch: pytest.MonkeyPatch, rank: int | None, fast: dict[str, bool]
) -> None:
    # All of torch's compiler but the making of kernels: what is computed again is decided by it, not by checkpoint().
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    shared, copies = with_draws(recorded_steps(oracle, "prior")[0], 3)
    plain = load(oracle, "prior", packing=False, lora_rank=rank)
    expected = loss_and_gradients(plain, copies)
    found = loss_and_gradients(load(oracle, "prior", noise_draws=3, lora_rank=rank, **fast), shared)
    assert len(expected) > 10
    assert_equal_gradients(found, expected, 1e-5)


def test_a_folder_without_the_network_is_refused(tmp_path: Path) -> None:
    for stage, folder in (("prior", "prior"), ("decoder", "unet")):
        with pytest.raises(ModelError, match=rf"{folder} cannot be loaded as"):
            load_network(stage, tmp_path)
