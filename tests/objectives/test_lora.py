"""LoRA learns what PEFT's does, and its files are those that diffusers reads, and no others."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin, UNet2DConditionModel
from recorded import load_objective, recorded_steps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kcache.errors import ConfigError, ModelError
from kcache.objectives.lora import add_lora, default_target_modules, fuse_lora, load_lora, save_lora
from kcache.objectives.lora_file import WEIGHTS_FILE, adapted_network, read_adapters
from kcache.objectives.losses import Objective
from kcache.objectives.widening import learnt_whole, widen_for_hints, widen_for_masks

STAGES = ["prior", "decoder"]
NETWORKS = {"prior": "prior", "decoder": "unet"}
PROJECTIONS = {
    "prior": ["to_q", "to_k", "to_v", "to_out.0"],
    "decoder": ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"],
}


MAGNITUDE = "lora_magnitude_vector"


def add(network: ModelMixin, **changes: object) -> None:
    settings = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": (), "seed": 3}
    add_lora(network, **(settings | changes))  # type: ignore[arg-type]


def adapters_of(network: ModelMixin) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if ".lora_" in name}


def trained(oracle: Path, stage: str, **changes: object) -> Objective:
    """An objective with adapters of which neither half is zero, in evaluation mode."""
    objective = load_objective(oracle, stage, packed=False).eval()
    add(objective.network, **changes)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters_of(objective.network).values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return objective


def predict(objective: Objective, oracle: Path, stage: str) -> Tensor:
    step = recorded_steps(oracle, stage)[0]
    with torch.no_grad():
        return objective.predict(step, step["noise"], step["timesteps"])[0]


def rewrite(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    file.parent.mkdir(exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file, metadata=metadata)  # type: ignore[arg-type]
    return file


def saved(oracle: Path, folder: Path, stage: str = "prior") -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    save_lora(trained(oracle, stage).network, folder)
    with safe_open(folder / WEIGHTS_FILE, "pt") as opened:
        return folder / WEIGHTS_FILE, load_file(folder / WEIGHTS_FILE), opened.metadata()


def test_all_projections_of_the_attention_are_adapted_by_default(oracle: Path) -> None:
    for stage in STAGES:
        network = load_objective(oracle, stage, packed=False).network
        assert default_target_modules(network) == tuple(PROJECTIONS[stage])
        attentions = sum(name.endswith("to_q") for name, _ in network.named_modules())
        add(network)
        assert len(adapters_of(network)) == 2 * attentions * len(PROJECTIONS[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_only_the_adapters_learn_and_at_first_change_nothing(oracle: Path, stage: str) -> None:
    objective = load_objective(oracle, stage, packed=False).eval()
    before = predict(objective, oracle, stage)
    add(objective.network)
    assert torch.equal(predict(objective, oracle, stage), before)
    learning = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert learning == {f"network.{name}" for name in adapters_of(objective.network)}
    assert not any(module.training for module in objective.modules())


def test_the_seed_alone_decides_the_adapters(oracle: Path) -> None:
    state = torch.get_rng_state()
    networks = []
    for seed in (3, 3, 4):
        torch.rand(5)
        network = load_objective(oracle, "prior", packed=False).network
        drawn = torch.get_rng_state()
        add(network, seed=seed)
        assert torch.equal(torch.get_rng_state(), drawn)
        networks.append([p for name, p in adapters_of(network).items() if "lora_A" in name])
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(networks[0], networks[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(networks[0], networks[2], strict=True))
    assert torch.cat([p.flatten() for p in networks[0]]).std().item() == pytest.approx(1 / 4, rel=0.1)


def test_adapters_of_a_half_precision_network_are_float32(oracle: Path) -> None:
    network = load_objective(oracle, "prior", packed=False).network.bfloat16()
    add(network)
    assert {parameter.dtype for parameter in adapters_of(network).values()} == {torch.float32}
    assert network.proj_in.weight.dtype == torch.bfloat16


def test_unknown_target_names_are_answered_with_those_there_are(oracle: Path) -> None:
    network = load_objective(oracle, "prior", packed=False).network
    with pytest.raises(
        ConfigError, match=r"names query, q, which no .*expected some of linear_1, .*to_out\.0, proj, net\.2"
    ) as info:
        add(network, target_modules=("to_q", "query", "q"))
    assert "transformer_blocks" not in str(info.value)
    assert not hasattr(network, "peft_config")
    add(network, target_modules=("transformer_blocks.1.attn1.to_q", "net.2"))
    layers = {name.split(".lora_")[0] for name in adapters_of(network)}
    assert layers == {
        "transformer_blocks.1.attn1.to_q",
        "transformer_blocks.0.ff.net.2",
        "transformer_blocks.1.ff.net.2",
    }


@pytest.mark.parametrize("stage", STAGES)
def test_ten_steps_are_those_of_a_loop_of_peft(oracle: Path, stage: str) -> None:
    ours = load_objective(oracle, stage, packed=False).train()
    add(ours.network)
    theirs = load_objective(oracle, stage, packed=False).train()
    torch.default_generator.manual_seed(3)
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=PROJECTIONS[stage]),
        theirs.network,
    )
    losses: list[list[float]] = []
    for objective in (ours, theirs):
        learning = [parameter for name, parameter in objective.named_parameters() if ".lora_" in name]
        optimizer = torch.optim.AdamW(learning, lr=1e-2)
        losses.append([])
        for step in recorded_steps(oracle, stage):
            loss = objective(step, step["noise"], step["timesteps"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    frozen = load_objective(oracle, stage, packed=False)
    without = [frozen(step, step["noise"], step["timesteps"]).item() for step in recorded_steps(oracle, stage)]
    assert losses[0][0] == without[0]
    assert abs(losses[0][-1] - without[-1]) > 1e-3


VARIANTS: dict[str, dict[str, bool]] = {"plain": {}, "DoRA": {"use_dora": True}, "rsLoRA": {"use_rslora": True}}


@pytest.mark.parametrize(
    ("stage", "variant"), [("prior", "plain"), ("decoder", "plain"), ("prior", "DoRA"), ("decoder", "rsLoRA")]
)
def test_what_is_saved_is_loaded_the_same_here_and_by_diffusers(
    oracle: Path, tmp_path: Path, stage: str, variant: str
) -> None:
    objective = trained(oracle, stage, **VARIANTS[variant])
    if variant == "rsLoRA":  # alpha / √rank, 8 / √4
        scales = [layer.scaling["default"] for layer in objective.network.modules() if hasattr(layer, "scaling")]
        assert set(scales) == {4.0}
    save_lora(objective.network, tmp_path)
    expected = predict(objective, oracle, stage)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_FILE]
    assert adapted_network(tmp_path) == NETWORKS[stage]
    assert not torch.equal(expected, predict(load_objective(oracle, stage, packed=False), oracle, stage))

    for path in (tmp_path, tmp_path / WEIGHTS_FILE):
        again = load_objective(oracle, stage, packed=False)
        # Trainable, as torch sums in another order where no weight wants a gradient.
        load_lora(again.network, path, trainable=True)
        assert torch.equal(predict(again, oracle, stage), expected)

    pipeline = DiffusionPipeline.from_pretrained(oracle / stage)
    stock = load_objective(oracle, stage, packed=False).eval()
    stock.network = pipeline.components[NETWORKS[stage]]
    stock.network.load_lora_adapter(tmp_path, prefix=None, weight_name=WEIGHTS_FILE)
    assert torch.equal(predict(stock, oracle, stage), expected)


def test_a_loaded_lora_does_not_learn_unless_told(oracle: Path, tmp_path: Path) -> None:
    objective = trained(oracle, "decoder")
    save_lora(objective.network, tmp_path)
    again = load_objective(oracle, "decoder", packed=False)
    load_lora(again.network, tmp_path)
    assert not any(parameter.requires_grad for parameter in again.network.parameters())
    assert torch.allclose(predict(again, oracle, "decoder"), predict(objective, oracle, "decoder"), atol=1e-5)


def test_a_loaded_lora_can_go_on_learning_and_be_saved_again(oracle: Path, tmp_path: Path) -> None:
    save_lora(trained(oracle, "decoder").network, tmp_path / "first")
    network = load_objective(oracle, "decoder", packed=False).network.train()
    state = torch.get_rng_state()
    load_lora(network, tmp_path / "first", trainable=True, dropout=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert learning == adapters_of(network).keys()
    assert {layer.lora_dropout["default"].p for layer in network.modules() if hasattr(layer, "lora_dropout")} == {0.1}
    save_lora(network, tmp_path / "second")
    first, second = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_equal_adapters_are_equal_bytes(oracle: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "first", tmp_path / "second"):
        _, _, metadata = saved(oracle, folder)
    settings = json.loads(metadata["lora_adapter_metadata"])
    # In the order of a set they would differ from process to process.
    assert settings["target_modules"] == sorted(PROJECTIONS["prior"])
    assert (settings["r"], settings["lora_alpha"]) == (4, 8.0)
    assert (tmp_path / "first" / WEIGHTS_FILE).read_bytes() == (tmp_path / "second" / WEIGHTS_FILE).read_bytes()


def test_dropout_is_for_training_and_not_in_the_file(oracle: Path, tmp_path: Path) -> None:
    objective = trained(oracle, "prior", dropout=0.5)
    save_lora(objective.network, tmp_path)
    expected = predict(objective, oracle, "prior")
    assert torch.equal(predict(objective, oracle, "prior"), expected)
    assert not torch.equal(predict(objective.train(), oracle, "prior"), expected)
    stock = load_objective(oracle, "prior", packed=False).eval()
    stock.network.load_lora_adapter(tmp_path, prefix=None, weight_name=WEIGHTS_FILE)
    assert torch.equal(predict(stock, oracle, "prior"), expected)


@pytest.mark.parametrize("stage", STAGES)
def test_files_of_the_older_scripts_load(oracle: Path, tmp_path: Path, stage: str) -> None:
    objective = trained(oracle, stage, alpha=None)
    save_lora(objective.network, tmp_path)
    older = {}
    for key, tensor in load_file(tmp_path / WEIGHTS_FILE).items():
        attention, projection, half = key.replace("to_out.0", "to_out").removesuffix(".weight").rsplit(".", 2)
        older[f"{attention}.processor.{projection}_lora.{'down' if half == 'lora_A' else 'up'}.weight"] = tensor
    file = rewrite(tmp_path / "older" / WEIGHTS_FILE, older)
    assert adapted_network(file) == NETWORKS[stage]
    again = load_objective(oracle, stage, packed=False)
    load_lora(again.network, file, trainable=True)
    assert torch.equal(predict(again, oracle, stage), predict(objective, oracle, stage))


@pytest.mark.parametrize(("stage", "variant"), [("prior", "plain"), ("decoder", "DoRA")])
def test_a_fused_network_is_an_ordinary_one(oracle: Path, tmp_path: Path, stage: str, variant: str) -> None:
    objective = trained(oracle, stage, **VARIANTS[variant])
    expected = predict(objective, oracle, stage)
    fuse_lora(objective.network)
    assert torch.allclose(predict(objective, oracle, stage), expected, atol=1e-5)
    plain = load_objective(oracle, stage, packed=False)
    assert objective.network.state_dict().keys() == plain.network.state_dict().keys()
    objective.network.save_pretrained(tmp_path)
    plain.network = type(objective.network).from_pretrained(tmp_path)
    assert torch.equal(predict(plain, oracle, stage), predict(objective, oracle, stage))
    add(objective.network)


@pytest.mark.parametrize("stage", STAGES)
def test_a_lora_of_the_other_network_is_refused(oracle: Path, tmp_path: Path, stage: str) -> None:
    saved(oracle, tmp_path, stage)
    other = load_objective(oracle, STAGES[stage == "prior"], packed=False).network
    with pytest.raises(ModelError, match=rf"does not fit {type(other).__name__}: found adapters of \d+ layers"):
        load_lora(other, tmp_path)
    assert not hasattr(other, "peft_config")


def test_names_and_shapes_that_do_not_fit_are_refused(oracle: Path, tmp_path: Path) -> None:
    _, tensors, metadata = saved(oracle, tmp_path)
    network = load_objective(oracle, "prior", packed=False).network
    half, whole = "transformer_blocks.0.attn1.to_k.lora_A.weight", "transformer_blocks.0.attn1.to_k.lora_B.weight"
    settings = json.loads(metadata["lora_adapter_metadata"]) | {"use_dora": True}
    dora = metadata | {"lora_adapter_metadata": json.dumps(settings)}
    every = {key.rpartition(".lora_")[0] + f".{MAGNITUDE}" for key in tensors}
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({}, "holds no LoRA: found 0 tensors"),
        ({"prefix." + key: tensor for key, tensor in tensors.items()}, "such as prefix.transformer_blocks.0"),
        ({key: tensor for key, tensor in tensors.items() if key != half}, f"such as {half}"),
        ({**tensors, "transformer_blocks.0.attn1.to_k.lora_magnitude": tensors[half]}, "such as .*magnitude"),
        ({**tensors, half: tensors[half][:, :5]}, r"to_k with shapes \(\(4, 5\), \(32, 4\)\); expected \(\(4, 32\)"),
        ({**tensors, half: tensors[half][:2], whole: tensors[whole][:, :2]}, "all adapters being of one rank"),
        ({**tensors, half.replace("lora_A.weight", MAGNITUDE): torch.ones(32)}, "without their other half"),
        (
            {**tensors, **dict.fromkeys(every, torch.ones(31))},
            r"magnitudes of .* with shape \(31,\); expected \(\d+,\)",
        ),
        ({half: torch.tensor(1.0), whole: torch.tensor(1.0)}, "to_k with shapes"),
        ({half: torch.zeros(0, 32), whole: torch.zeros(32, 0)}, "to_k with shapes"),
    ]
    for number, (case, message) in enumerate(cases):
        told = dora if "magnitudes" in message else metadata
        with pytest.raises(ModelError, match=message):
            load_lora(network, rewrite(tmp_path / f"{number}.safetensors", case, told))
        assert not hasattr(network, "peft_config")
    load_lora(network, rewrite(tmp_path / "whole.safetensors", tensors, metadata))


def test_settings_that_are_not_plain_lora_are_refused(oracle: Path, tmp_path: Path) -> None:
    file, tensors, metadata = saved(oracle, tmp_path)
    key = "lora_adapter_metadata"
    settings = json.loads(metadata[key])
    cases = [
        ("{", "cannot be read"), ("[]", "cannot be read"), ("{}", "cannot be read"), ("[" * 100_000, "cannot be read"),
        (json.dumps(settings | {"lora_alpha": "many"}), "cannot be read"),
        (json.dumps(settings | {"lora_alpha": 10**400}), "cannot be read"),
        (json.dumps(settings | {"lora_alpha": float("inf")}), "lora_alpha inf"),
        (json.dumps(settings | {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_q": 1}}), "alpha_.*, rank_pattern"),
        (json.dumps(settings | {"use_dora": True}), "says use_dora true; found no magnitudes"),
    ]  # fmt: skip
    for text, message in cases:
        with pytest.raises(ModelError, match=message):
            load_lora(load_objective(oracle, "prior", packed=False).network, rewrite(file, tensors, {key: text}))


def test_metadata_name_no_module_to_import(oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    file, tensors, metadata = saved(oracle, tmp_path)
    settings = json.loads(metadata["lora_adapter_metadata"]) | {"megatron_config": {}, "megatron_core": "planted"}
    network = load_objective(oracle, "prior", packed=False).network
    load_lora(network, rewrite(file, tensors, {"lora_adapter_metadata": json.dumps(settings)}))
    assert "planted" not in sys.modules


def test_pickles_and_broken_files_are_refused_unopened(oracle: Path, tmp_path: Path) -> None:
    network = load_objective(oracle, "prior", packed=False).network
    pickled = tmp_path / "pytorch_lora_weights.bin"
    torch.save({"transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 32)}, pickled)
    for path in (tmp_path, pickled, tmp_path / "nothing", tmp_path / "nothing.safetensors"):
        with pytest.raises(ModelError, match=r"safetensors (file|format).*unpickles nothing"):
            load_lora(network, path)
    file, _, _ = saved(oracle, tmp_path)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ModelError, match=r"cannot be read .*expected a whole safetensors file"):
        load_lora(network, tmp_path)
    file.write_bytes(pickled.read_bytes())
    with pytest.raises(ModelError, match="cannot be read"):
        load_lora(network, tmp_path)


def test_layers_of_both_networks_or_neither_are_for_none(tmp_path: Path) -> None:
    pair = {"A": torch.zeros(4, 32), "B": torch.zeros(32, 4)}
    for layers in (["time_embedding.linear_1"], ["mid_block.attentions.0.to_q", "transformer_blocks.0.attn1.to_q"]):
        tensors = {f"{layer}.lora_{half}.weight": tensor for layer in layers for half, tensor in pair.items()}
        with pytest.raises(ModelError, match=r"adapts layers in .*expected some in transformer_blocks"):
            adapted_network(rewrite(tmp_path / WEIGHTS_FILE, tensors))


WIDENED: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "masks": (widen_for_masks, {"in_channels": 9}, {"conv_in.weight", "conv_in.bias"}),
    "hints": (
        widen_for_hints,
        {"in_channels": 8, "addition_embed_type": "image_hint"},
        {"conv_in.weight", "conv_in.bias"}
        | {f"add_embedding.input_hint_block.{i}.{part}" for i in range(0, 16, 2) for part in ("weight", "bias")},
    ),
}


def plain(oracle: Path, **changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(oracle / "decoder", subfolder="unet", **changes)


def widened(oracle: Path, kind: str) -> UNet2DConditionModel:
    """A decoder of which all that learns has gone its way."""
    network = plain(oracle)
    WIDENED[kind][0](network)
    add(network, whole=learnt_whole(network))
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return network


def shown(network: UNet2DConditionModel) -> Tensor:
    """What it makes of any input."""
    generator = torch.Generator().manual_seed(2)
    hints = network.config.addition_embed_type == "image_hint"
    conditions = {"image_embeds": torch.rand(2, 32, generator=generator)}
    conditions |= {"hint": torch.rand(2, 3, 64, 64, generator=generator)} if hints else {}
    # The hint block makes the others of what the convolution takes.
    noisy = torch.randn(2, 4 if hints else 9, 8, 8, generator=generator)
    with torch.no_grad():
        return network.eval()(noisy, torch.tensor([3, 700]), None, added_cond_kwargs=conditions).sample  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", WIDENED)
def test_what_a_widened_decoder_learns_whole_is_in_the_file_for_us_and_for_diffusers(
    oracle: Path, tmp_path: Path, kind: str
) -> None:
    _, changes, whole = WIDENED[kind]
    network = widened(oracle, kind)
    assert {name for name, each in network.named_parameters() if each.requires_grad} == adapters_of(
        network
    ).keys() | whole
    save_lora(network, tmp_path)
    tensors, expected = load_file(tmp_path / WEIGHTS_FILE), shown(network)
    assert {name for name in tensors if ".lora_" not in name} == whole
    assert read_adapters(tmp_path).widening == changes
    assert adapted_network(tmp_path) == "unet"

    again = plain(oracle)
    load_lora(again, tmp_path, trainable=True)
    assert {name: again.config[name] for name in changes} == changes
    assert torch.equal(shown(again), expected)
    save_lora(again, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS_FILE).read_bytes() == (tmp_path / WEIGHTS_FILE).read_bytes()

    stock = plain(oracle, **changes, low_cpu_mem_usage=False, ignore_mismatched_sizes=True)
    stock.load_lora_adapter(tmp_path, prefix=None, weight_name=WEIGHTS_FILE)
    assert torch.allclose(shown(stock), expected, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"size mismatch for conv_in"):
        plain(oracle).load_lora_adapter(tmp_path, prefix=None, weight_name=WEIGHTS_FILE)

    half = plain(oracle).bfloat16()
    load_lora(half, tmp_path)
    assert not any(parameter.requires_grad for parameter in half.parameters())
    assert {each.dtype for name, each in half.named_parameters() if ".lora_" not in name} == {torch.bfloat16}
    fuse_lora(again)
    assert torch.allclose(shown(again), expected, atol=1e-5)
    again.save_pretrained(tmp_path / "fused")
    fused = UNet2DConditionModel.from_pretrained(tmp_path / "fused")
    assert all(torch.equal(tensor, fused.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert torch.allclose(shown(fused), shown(again), atol=1e-5)
    with pytest.raises(ModelError, match=rf"found a network of {changes['in_channels']} input channels; .* of 4"):
        load_lora(fused, tmp_path)


def test_a_wider_first_layer_that_does_not_fit_is_refused(oracle: Path, tmp_path: Path) -> None:
    save_lora(widened(oracle, "hints"), tmp_path)
    file = tmp_path / WEIGHTS_FILE
    tensors, first = load_file(file), "add_embedding.input_hint_block.0.weight"
    changed: list[tuple[dict[str, Tensor | None], str]] = [
        (
            {"conv_in.weight": torch.zeros(32, 7, 3, 3)},
            r"found conv_in.weight with shape \(32, 7, 3, 3\); .*\(32, 8, 3, 3\)",
        ),
        ({"conv_in.bias": None}, r"found conv_in.bias with shape None; expected \(32,\)"),
        ({first: torch.zeros(16, 1, 3, 3)}, rf"found {first} with shape \(16, 1, 3, 3\)"),
        ({"conv_in.extra": torch.zeros(2)}, "found conv_in.extra with shape .* expected None"),
        ({"conv_in.weight": None}, "holds no LoRA: .*such as"),
        ({"conv_in.weight": torch.zeros(())}, "holds no LoRA: .*such as"),
        ({"conv_out.weight": torch.zeros(2)}, "1 of them of other names .*such as conv_out.weight"),
    ]
    for change, said in changed:
        kept = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        rewrite(file, kept)
        with pytest.raises(ModelError, match=said):
            load_lora(plain(oracle), tmp_path)
