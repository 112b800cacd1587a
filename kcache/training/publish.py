"""Uploading a run's result to the Hub: the trained network or adapters, their card and pictures, in one commit.

Checkpoints, logs and metrics stay here, and so do links: a run directory links to the unchanged components of its base,
which are on the Hub already. Copies, which --export-pipeline makes, are uploaded, and make the repository a pipeline.
The token is the Hub's own affair, from HF_TOKEN or `hf auth login`: it is in no setting, file or message of kcache's.
"""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from kcache.config import TrainConfig
from kcache.encoders.repositories import PIPELINES
from kcache.errors import ConfigError, RunError
from kcache.foreign import reason
from kcache.report.grid import grids_of
from kcache.report.model_card import model_card
from kcache.store.run_directory import CARD_FILE, CURVES_FILE, LORA_FILE, PIPELINE_FILE


def check_publishing(config: TrainConfig) -> None:
    """Check, without asking the Hub, that the result can be uploaded when training is done.

    Raises ConfigError without a token, offline, and for a name that no repository can have.
    """
    if not config.push_to_hub:
        return
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            "--push-to-hub was given, but HF_HUB_OFFLINE forbids the Hub; expected one of the two: unset it, or leave "
            "--push-to-hub out"
        )
    if get_token() is None:
        raise ConfigError(
            "--push-to-hub was given, but there is no token for the Hub; expected one that may write: set HF_TOKEN, or "
            "run: hf auth login"
        )
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"the result would be uploaded to {name!r}, which cannot be a repository ({error}); expected a name such "
            "as me/red-fox; give it by --hub-model-id"
        ) from error


def publish_run(run_dir: Path, repo_id: str | None = None) -> str:
    """Upload the result of a finished run, in one commit, and return the repository's address.

    The repository `repo_id`, by default one of the token's owner with the directory's name, is made when there is none.
    Raises RunError when there is nothing to upload, or the Hub refuses it or cannot be reached: the run is not touched.
    """
    files = files_to_publish(run_dir)
    api = HfApi(library_name="kcache")
    try:
        repository = api.create_repo(repo_id or run_dir.resolve().name, exist_ok=True)
        card = model_card(run_dir, repo_id=repository.repo_id, whole=Path(PIPELINE_FILE) in files)
        contents: dict[str, bytes | str] = {path.as_posix(): str(run_dir / path) for path in files}
        contents[CARD_FILE] = card.encode()
        api.create_commit(
            repository.repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()],
            commit_message="Upload what kcache trained",
        )
    except Exception as error:
        raise RunError(
            f"{run_dir} is trained and whole, but was not uploaded: {reason(error)}; expected a Hub "
            'that can be reached and a token that may write; upload it later: python -c "from pathlib import Path; '
            f'from kcache.training.publish import publish_run; publish_run(Path({str(run_dir)!r}), {repo_id!r})"'
        ) from error
    return str(repository)


def files_to_publish(run_dir: Path) -> list[Path]:
    """The files of a finished run that belong into a repository, relative to `run_dir`, less the card.

    Raises RunError when `run_dir` holds no trained network.
    """
    result = [run_dir / LORA_FILE] if (run_dir / LORA_FILE).is_file() else []
    found = [pipeline for pipeline in PIPELINES.values() if (run_dir / pipeline.network / "config.json").is_file()]
    if len(found) > 1 or not (result or found):
        networks = " and ".join(pipeline.network for pipeline in found)
        raise RunError(
            f"{run_dir} holds {networks or f'neither {LORA_FILE} nor prior/ nor unet/'}; expected the result of one "
            "finished run; let the run finish first: --resume-from-checkpoint latest"
        )
    for pipeline in found:
        others = [run_dir / name for name in pipeline.components if name != pipeline.network]
        index = run_dir / PIPELINE_FILE
        whole = index.is_file() and all(other.is_dir() and not other.is_symlink() for other in others)
        # What adapters were merged into is of use only as the pipeline that it was made for.
        result += _files_below(run_dir / pipeline.network) if whole or not result else []
        result += [index, *(path for other in others for path in _files_below(other))] if whole else []
    pictures = [path for path in (*grids_of(run_dir)[-1:], run_dir / CURVES_FILE) if path.is_file()]
    return [path.relative_to(run_dir) for path in result + pictures]


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
