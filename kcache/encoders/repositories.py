"""Where networks come from: how a pipeline is laid out, a repository of one, its configurations.

Nothing here loads a network, and only safetensors, JSON and text files are fetched.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kcache.config import DECODER_REPO, PRIOR_REPO, BuildConfig, Stage
from kcache.errors import ConfigError, ModelError
from kcache.foreign import reason, told
from kcache.hints import broken_link
from kcache.plainly import plainly_at
from kcache.store.recipe import components, json_digest
from kcache.store.recorded import MODEL_SETTINGS
from kcache.store.run_directory import instead_of_pipeline
from kcache.urls import remote


class Component(NamedTuple):
    """One folder of a pipeline: whose class reads it, and its configuration."""

    library: str
    class_name: str | None
    """None where there are several, and the configuration names its own."""
    config_file: str = "config.json"


COMPONENTS = {
    "prior": Component("diffusers", "PriorTransformer"),
    "image_encoder": Component("transformers", "CLIPVisionModelWithProjection"),
    "text_encoder": Component("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": Component("transformers", "CLIPTokenizer", "tokenizer_config.json"),
    # This name on every machine: the class that transformers resolves it to depends on what is installed.
    "image_processor": Component("transformers", "CLIPImageProcessor", "preprocessor_config.json"),
    "scheduler": Component("diffusers", None, "scheduler_config.json"),
    "unet": Component("diffusers", "UNet2DConditionModel"),
    "movq": Component("diffusers", "VQModel"),
}
"""All components of Kandinsky 2.2, by their folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """One half of Kandinsky 2.2, which diffusers loads as a pipeline."""

    class_name: str
    network: str
    """The component that learns."""
    components: tuple[str, ...]
    """All of them, that one included."""
    published: str
    """Where the half that was released is found on the Hub."""
    other: str
    """The half that it draws pictures with."""


PIPELINES = {
    "prior": Pipeline(
        class_name="KandinskyV22PriorPipeline",
        network="prior",
        components=("prior", "image_encoder", "text_encoder", "tokenizer", "image_processor", "scheduler"),
        published=PRIOR_REPO,
        other="decoder",
    ),
    "decoder": Pipeline(
        class_name="KandinskyV22Pipeline",
        network="unet",
        components=("unet", "movq", "scheduler"),
        published=DECODER_REPO,
        other="prior",
    ),
}
"""The two halves, by the stage that trains them."""

INPAINTING, FOLLOWING = "KandinskyV22InpaintPipeline", "KandinskyV22ControlnetPipeline"
"""The classes of pipelines whose decoders fill holes, and follow hints."""


def pipeline_class(half: str, network: Mapping[str, Any]) -> str:
    """Name of the diffusers class that draws with a half, by the configuration of the network in it."""
    if half == "decoder" and network.get("addition_embed_type") == "image_hint":
        return FOLLOWING
    # Noisy latents, kept latents and the mask; what comes out is noise and its variance.
    if half == "decoder" and network.get("in_channels", 4) == network.get("out_channels", 4) + 1:
        return INPAINTING
    return PIPELINES[half].class_name


FINISH = "its download is unfinished, or it has no such files: fetch it again, online; what was fetched is kept"
_VOLATILE = {
    "architectures",
    "backend",
    "dtype",
    "is_local",
    "local_files_only",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_class",
    "tokenizer_file",
    "torch_dtype",
    "transformers_version",
}
"""What a configuration says about files, dtypes and versions: no change of these changes what a network computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """A Kandinsky 2.2 pipeline on this machine: one folder per component."""

    name: str
    """The folder or Hub id, as the user gave it."""
    path: Path
    """The folder, or the local snapshot of the Hub repository."""
    revision: str | None
    """The commit that a Hub repository was resolved to; None for a folder."""

    @property
    def unfinished(self) -> bool:
        """Whether what is not there may still have to be fetched, as a download is made file by file."""
        of_the_hub = self.revision is not None or self.path.parent.name == "snapshots"
        return of_the_hub or any((self.path / ".cache" / "huggingface" / "download").rglob("*.incomplete"))

    def read(self, component: str) -> "Configuration":
        """The configuration of a component, as its JSON file says; raises ModelError when there is none to read."""
        path = _config_path(self, component)
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise ModelError(
                f"{path} cannot be read ({error.strerror}); expected the configuration of {component}"
            ) from error
        except ValueError as error:
            what = plainly_at(path)
            found = f"it is {what}" if what else f"fetch or export {self.name} again"
            raise ModelError(f"{path} is not JSON ({reason(error)}); {found}") from error
        if not isinstance(values, dict):
            raise ModelError(f"{path} holds a {type(values).__name__}; expected a JSON object; fetch {self.name} again")
        return Configuration(repository=self, component=component, values=values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """What a repository says of one of its components."""

    repository: Repository
    component: str
    values: dict[str, Any]

    @property
    def lasting(self) -> dict[str, Any]:
        """What of it decides what a network computes: all but names of files, dtypes and versions."""
        return {
            name: value for name, value in self.values.items() if name not in _VOLATILE and not name.startswith("_")
        }

    @property
    def digest(self) -> str:
        """sha256 (hex) of what is lasting of it."""
        return json_digest(self.lasting)

    @property
    def downsampling(self) -> int:
        """How many times a network of `block_out_channels` shrinks each side: every block but the last halves it.

        Raises ModelError where there are none.
        """
        blocks = self.values.get("block_out_channels")
        if not isinstance(blocks, list) or not blocks:
            raise ModelError(
                f"{self.repository.name}: {self.component}/config.json has block_out_channels {blocks!r}; "
                "expected a list"
            )
        return 2 ** (len(blocks) - 1)

    def whole_number(self, name: str) -> int:
        """The number called `name`, above 0; raises ModelError for anything else."""
        value = self.values.get(name)
        if not isinstance(value, int) or value < 1:
            raise ModelError(
                f"{self.repository.name}: the configuration of {self.component} has {name} {value!r}; expected a whole "
                "number; give a Kandinsky 2.2 pipeline in diffusers layout"
            )
        return value


def find_repository(
    name_or_path: str, revision: str | None, components: Sequence[str], cache_dir: str | None = None
) -> Repository:
    """The repository with the components named, downloaded first unless it is a local folder or in the Hub's cache.

    `cache_dir` is where that is, if not in the Hub's own place.

    Raises ModelError when it cannot be had or lacks a component.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        repository = Repository(name=name_or_path, path=folder.resolve(), revision=None)
    else:
        _check_no_path(name_or_path)
        snapshot = _download(name_or_path, revision, components, cache_dir)
        repository = Repository(name=name_or_path, path=snapshot, revision=snapshot.name)
    missing = [name for name in components if not _config_path(repository, name).is_file()]
    if missing:
        instead = instead_of_pipeline(repository.path, [_config_path(repository, name) for name in missing])
        if instead is not None:
            raise ModelError(f"{name_or_path} {instead}")
        found = sorted(entry.name for entry in repository.path.iterdir() if entry.is_dir())
        expected = ", ".join(f"{name}/{_config_path(repository, name).name}" for name in missing)
        raise ModelError(
            f"{name_or_path} has no {expected}; found the folders {', '.join(found) or 'none'} in {repository.path}; "
            f"{_why_missing(repository, missing)}"
        )
    return repository


def find_repositories(config: BuildConfig, stage: Stage) -> dict[str, Repository]:
    """Where the encoders for `stage` are, by role; raises ModelError, or ConfigError for a revision without use."""
    given = {role: getattr(config, setting) for role, setting in MODEL_SETTINGS.items()}
    wanted = {role: names for role in given if (names := components(role, stage))}
    revisions = {role: getattr(config, f"{role}_revision") for role in given}
    _check_revisions(config, {role: given[role] for role in wanted}, revisions)
    found = {}
    for role, names in wanted.items():
        try:
            found[role] = find_repository(given[role], revisions[role] or config.revision, names)
        except ModelError as error:
            if config.revision is None or revisions[role] is not None or len(wanted) == 1:
                raise
            raise ModelError(
                f"{error}; --revision {config.revision} is asked of both repositories; where only one has it, give "
                "--prior-revision or --decoder-revision instead"
            ) from error
    return found


def _check_revisions(config: BuildConfig, used: Mapping[str, str], revisions: Mapping[str, str | None]) -> None:
    """Raise ConfigError for a revision of a repository that is not used, or that is a folder, which has none."""
    for role, revision in revisions.items():
        flag = f"--{role}-revision"
        if revision is not None and role not in used:
            raise ConfigError(f"{flag} is {revision!r}, but nothing of the {role}'s repository is needed; leave it out")
        if role in used:
            check_revision(flag, used[role], revision)
    folders = [name for role, name in used.items() if revisions[role] is None and Path(name).expanduser().is_dir()]
    if config.revision is not None and len(folders) == sum(revisions[role] is None for role in used):
        where = f"{' and '.join(folders)}, a folder" if folders else "what has its own revision"
        raise ConfigError(f"--revision is {config.revision!r}, but only {where}, is used; leave --revision out")


def check_revision(flag: str, name: str, revision: str | None) -> None:
    """Raise ConfigError for a `revision`, given by `flag`, of what is a local folder."""
    if revision is not None and Path(name).expanduser().is_dir():
        raise ConfigError(
            f"{flag} is {revision}, but {name} is a folder on this machine, which has no revisions; expected it for a "
            "Hub repository only; leave it out, or name the repository"
        )


def _check_no_path(name: str) -> None:
    """Raise ModelError for a name that is no Hub id: the path of a folder that is not there, or one with a revision."""
    if (problem := remote(name)) is not None:
        raise ModelError(problem)
    path = Path(name).expanduser()
    if (broken := broken_link(path)) is not None:
        raise ModelError(f"{name}: {broken}; expected the folder of a pipeline; give where that is now")
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or path.exists():
        what = "is a file" if path.exists() else "is a folder that is not there"
        raise ModelError(f"{name} {what}; expected the folder of a pipeline, or a name on the Hub such as {PRIOR_REPO}")
    repository, at, revision = name.partition("@")
    if at:
        raise ModelError(
            f"{name} names a revision; expected the name of a Hub repository alone; give {repository}, and beside it "
            f"--prior-revision {revision} or --decoder-revision {revision}, whichever half it is"
        )


def _why_missing(repository: Repository, missing: Sequence[str]) -> str:
    """What to do about components that are not there, by what the pipeline says that it consists of."""
    try:
        listed = json.loads((repository.path / "model_index.json").read_bytes())
    except (OSError, ValueError):
        listed = None
    if listed is None and repository.unfinished:
        return FINISH
    if isinstance(listed, dict) and all(name in listed for name in missing):
        return FINISH if repository.unfinished else "its model_index.json names them: fetch or copy the rest of it"
    return "give a Kandinsky 2.2 pipeline in diffusers layout (prior and decoder are two different ones)"


def _download(name: str, revision: str | None, components: Sequence[str], cache_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [f"{component}/*.{ending}" for component in components for ending in ("safetensors", "txt")]
    at = f" at revision {revision}" if revision else ""
    what = f"{name} is neither a local folder nor a Hub repository that can be fetched{at}"
    do = f"expected e.g. {PRIOR_REPO}; check the name, the revision and the network, or give a folder"
    with told(ModelError, what, do):
        snapshot = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=["*.json", *patterns],
            ignore_patterns=["*.fp16.*", "*.non_ema.*"],
        )
    return Path(snapshot)


def _config_path(repository: Repository, component: str) -> Path:
    return repository.path / component / COMPONENTS[component].config_file
