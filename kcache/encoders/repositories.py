"""Where networks come from: how a pipeline is laid out, a repository of one, the digests of its files.

Nothing here loads a network, and only safetensors, JSON and text files are fetched or digested.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kcache.config import DECODER_REPO, PRIOR_REPO, Say, unheard
from kcache.errors import ModelError
from kcache.foreign import told
from kcache.store.digests import DigestMemo
from kcache.store.recipe import json_digest


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

_WEIGHTS_STEMS = ("model", "diffusion_pytorch_model")
"""transformers' and diffusers' names for the weights of a component."""
_LARGE_BYTES = 1_000_000_000
"""Files above this take some seconds to digest."""
_TOKENIZER_FILES = ("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "vocab.json")
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
            raise ModelError(f"{path} is not JSON ({error}); fetch or export {self.name} again") from error
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
        snapshot = _download(name_or_path, revision, components, cache_dir)
        repository = Repository(name=name_or_path, path=snapshot, revision=snapshot.name)
    missing = [name for name in components if not _config_path(repository, name).is_file()]
    if missing:
        found = sorted(entry.name for entry in repository.path.iterdir() if entry.is_dir())
        expected = ", ".join(f"{name}/{_config_path(repository, name).name}" for name in missing)
        raise ModelError(
            f"{name_or_path} has no {expected}; found the folders {', '.join(found) or 'none'} in {repository.path}; "
            "give a Kandinsky 2.2 pipeline in diffusers layout (prior and decoder are two different ones)"
        )
    return repository


def weights_digest(
    repository: Repository,
    component: str,
    memo: DigestMemo,
    rehash: bool = False,
    say: Say = unheard,
) -> str:
    """sha256 (hex) of the contents of the safetensors files that from_pretrained would load.

    Of several shards, it is the sha256 of their names and digests. `say` is told of large files that are not remembered
    and have to be read. Raises ModelError when there are no such files.
    """
    files = _weights_files(repository, component)

    def compute(path: Path) -> bytes:
        size = path.stat().st_size
        if size > _LARGE_BYTES:
            say(f"digesting the weights of {component}, {size / 1e9:.1f} GB: once, as long as they stay unchanged")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    digests = {path.name: memo.digest(path, "sha256", partial(compute, path), rehash) for path in files}
    if len(digests) == 1:
        return next(iter(digests.values())).hex()
    return json_digest({name: digest.hex() for name, digest in digests.items()})


def tokenizer_digest(repository: Repository) -> str:
    """sha256 (hex) of the vocabulary, merges, special tokens and configuration of the tokenizer.

    Raises ModelError when there is no vocabulary.
    """
    folder = repository.path / "tokenizer"
    present = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if "tokenizer.json" not in present and not {"vocab.json", "merges.txt"} <= set(present):
        raise ModelError(
            f"{folder} has no vocabulary (found {_listing(folder)}); "
            "expected tokenizer.json, or vocab.json and merges.txt; fetch or export the tokenizer again"
        )
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in present}
    return json_digest({"files": files, "config": repository.read("tokenizer").lasting})


def _download(name: str, revision: str | None, components: Sequence[str], cache_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [f"{component}/*.{ending}" for component in components for ending in ("safetensors", "txt")]
    what = f"{name} is neither a local folder nor a Hub repository that can be fetched"
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


def _weights_files(repository: Repository, component: str) -> list[Path]:
    folder = repository.path / component
    whole = [folder / f"{stem}.safetensors" for stem in _WEIGHTS_STEMS]
    indexes = [folder / f"{stem}.safetensors.index.json" for stem in _WEIGHTS_STEMS]
    found = [path for path in whole + indexes if path.is_file()]
    if len(found) != 1:
        raise ModelError(
            f"{folder} has {len(found)} sets of weights (found {_listing(folder)}); expected exactly one of "
            f"{', '.join(path.name for path in whole)} or the index of one in shards; "
            "convert pickled weights (.bin) with save_pretrained: kcache never unpickles"
        )
    return _shards(found[0]) if found[0] in indexes else found


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{index} cannot be read as an index of shards ({error!r}); fetch the weights again"
        ) from error
    for name in names:
        # A name is not a path, and nothing but safetensors is opened.
        if Path(name).name != name or not name.endswith(".safetensors") or not (index.parent / name).is_file():
            raise ModelError(
                f"{index} names the shard {name!r}; expected a safetensors file beside it; fetch the weights again"
            )
    return [index.parent / name for name in names]


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name for entry in folder.iterdir())) or "an empty folder"
