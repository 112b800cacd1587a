"""Publishing against a Hub of our own: what arrives, what stays here, and what becomes of errors."""

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, serve
from huggingface_hub import ModelCard, constants
from short_runs import write_run

from kcache.config import TrainConfig
from kcache.errors import ConfigError, RunError
from kcache.store.run_directory import LORA_FILE
from kcache.training.publish import check_publishing, files_to_publish, publish_run

TOKEN = "hf_right"  # noqa: S105


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The server, to which the Hub's library is pointed with a token that it accepts."""
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished decoder run as training leaves it, with everything that must stay here."""
    base = tmp_path / "base" / "movq"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    run_dir = write_run(tmp_path / "foxes", "me/base", "me/prior")
    for name in (
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet_raw/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "model_index.json",
        "checkpoint-3/unet/diffusion_pytorch_model.safetensors",
        "checkpoint-3/state.json",
        "logs/events.out",
        ".tmp-1-dead",
        "pictures/step-000002.png",
        "pictures/step-000003.png",
        "pictures/held-out-000003.png",
        "loss.png",
        "README.md",
    ):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_bytes(name.encode())
    (run_dir / "movq").symlink_to(base)
    return run_dir


PART = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "pictures/step-000003.png", "loss.png"}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_trained_network_and_its_card_arrive_and_nothing_else(
    hub: Hub, run_dir: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    before = tree(run_dir)
    assert publish_run(run_dir) == f"{hub.url}/me/foxes"

    assert set(hub.files) == PART | {"README.md"}
    assert all(hub.files[name] == name.encode() for name in PART)
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.to_dict()["base_model"] == "me/base"
    assert "from_pretrained('me/foxes', subfolder='unet')" in card.content
    assert len([path for path, _, _ in hub.requests if "/commit/" in path]) == 1

    assert {authorization for _, authorization, _ in hub.requests} == {f"Bearer {TOKEN}"}
    said = capfd.readouterr()
    assert TOKEN.encode() not in b"".join(body for _, _, body in hub.requests)
    assert TOKEN not in caplog.text + said.out + said.err
    assert tree(run_dir) == before


def test_copies_of_the_other_components_make_the_repository_a_pipeline(hub: Hub, run_dir: Path) -> None:
    (run_dir / "movq").unlink()
    (run_dir / "movq").mkdir()
    (run_dir / "movq" / "config.json").write_text("{}")
    publish_run(run_dir, "team/fox")
    added = {"model_index.json", "movq/config.json", "scheduler/scheduler_config.json"}
    assert set(hub.files) == PART | added | {"README.md"}
    assert "from_pretrained('team/fox')" in hub.files["README.md"].decode()


def test_of_a_run_with_adapters_only_these_are_uploaded(run_dir: Path) -> None:
    (run_dir / LORA_FILE).write_bytes(b"")
    assert {path.as_posix() for path in files_to_publish(run_dir)} == {
        LORA_FILE,
        "pictures/step-000003.png",
        "loss.png",
    }


def test_a_link_inside_the_network_is_not_followed(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of this machine")
    (run_dir / "unet" / "link.json").symlink_to(tmp_path / "secret")
    assert {path.as_posix() for path in files_to_publish(run_dir)} == PART


def test_a_run_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=rf"neither {LORA_FILE} nor prior/ nor unet/; expected the result of one finished run"
    ):
        publish_run(write_run(tmp_path / "run", "me/base", "me/prior"))


@pytest.mark.parametrize(
    ("part", "status"), [("/repos/create", 401), ("/repos/create", 500), ("/preupload/", 403), ("/commit/", 500)]
)
def test_a_hub_that_refuses_is_one_error_and_the_run_stays(hub: Hub, run_dir: Path, part: str, status: int) -> None:
    hub.refuse[part] = status
    before = tree(run_dir)
    with pytest.raises(RunError, match="is trained and whole, but was not uploaded") as caught:
        publish_run(run_dir, "me/fox")
    assert str(status) in str(caught.value)
    assert f"publish_run(Path('{run_dir}'), 'me/fox')" in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (hub.files, tree(run_dir)) == ({}, before)


def test_a_wrong_token_is_not_repeated(hub: Hub, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(RunError, match="401") as caught:
        publish_run(run_dir)
    assert "hf_wrong" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_one_error(hub: Hub, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound but not listening: whoever connects is turned away
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(RunError, match="was not uploaded"):
            publish_run(run_dir)


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(stage="prior", **({"output_dir": "runs/fox", "push_to_hub": True} | settings))


def test_without_a_token_training_does_not_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="set HF_TOKEN, or run: hf auth login"):
        check_publishing(config())
    check_publishing(config(push_to_hub=False))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_publishing(config())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        check_publishing(config())


@pytest.mark.parametrize("settings", [{"hub_model_id": "a/b/c"}, {"output_dir": "runs/my fox"}])
def test_a_name_that_no_repository_can_have_is_refused_before_training(hub: Hub, settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="cannot be a repository"):
        check_publishing(config(**settings))
