"""Each of the two repositories has its own revisions: which is asked of which, and what is said otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from kcache.config import BuildConfig, Stage
from kcache.encoders.repositories import find_repositories
from kcache.errors import ConfigError, ModelError

COMMITS = {"o/prior": "a" * 40, "o/decoder": "b" * 40}


@pytest.fixture
def found(oracle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Finds repositories on a Hub where each has the commit above, called main, too; names those that were fetched."""

    def snapshot_download(name: str, revision: str | None, **_: Any) -> str:
        if revision not in (None, "main", COMMITS[name]):
            raise LocalEntryNotFoundError(f"no {revision}")
        asked.append(name)
        return str(oracle / name.partition("/")[2])

    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    def find(stage: Stage = "all", **settings: Any) -> list[str]:
        asked.clear()
        names = {"pretrained_prior_model_name_or_path": "o/prior", "pretrained_decoder_model_name_or_path": "o/decoder"}
        find_repositories(BuildConfig(**(names | settings)), stage)
        return asked

    return find


def test_each_repository_is_asked_for_its_own_revision(found: Callable[..., list[str]], oracle: Path) -> None:
    both = ["o/prior", "o/decoder"]
    assert found() == found(revision="main") == both
    assert found(prior_revision="a" * 40, decoder_revision="b" * 40) == both
    assert found(prior_revision="a" * 40) == found(revision="main", decoder_revision="b" * 40) == both
    assert found("prior", revision="a" * 40) == ["o/prior"]
    local = {"pretrained_decoder_model_name_or_path": str(oracle / "decoder")}
    assert found(revision="a" * 40, **local) == ["o/prior"]


def test_one_revision_of_two_repositories_says_which_lacks_it_and_the_two_flags(
    found: Callable[..., list[str]],
) -> None:
    with pytest.raises(
        ModelError, match=rf"^o/decoder .* at revision {'a' * 40}: .*--prior-revision or --decoder-revision instead$"
    ):
        found(revision="a" * 40)
    with pytest.raises(ModelError, match=r"^o/prior .* at revision nosuch: (?!.*instead)"):
        found("prior", revision="nosuch")
    with pytest.raises(ModelError, match=r"^o/prior@main names a revision; .* give o/prior, .*--prior-revision main"):
        found(pretrained_prior_model_name_or_path="o/prior@main")


@pytest.mark.parametrize(
    ("stage", "settings", "local", "said"),
    [
        ("prior", {"decoder_revision": "x"}, "", "--decoder-revision is 'x', but nothing of the decoder's repository"),
        ("all", {"prior_revision": "x"}, "prior", "--prior-revision is x, but .* is a folder"),
        ("prior", {"revision": "x"}, "prior", "--revision is 'x', but only .*prior, a folder, is used"),
        ("all", {"revision": "x", "decoder_revision": "b" * 40}, "prior", "--revision is 'x', but only .*prior, a"),
    ],
)  # fmt: skip
def test_a_revision_that_nothing_has_is_refused(
    found: Callable[..., list[str]], oracle: Path, stage: Stage, settings: dict[str, str], local: str, said: str
) -> None:
    if local:
        settings = settings | {f"pretrained_{local}_model_name_or_path": str(oracle / local)}
    with pytest.raises(ConfigError, match=said):
        found(stage, **settings)
