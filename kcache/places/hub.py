"""What lies in a dataset of the Hugging Face Hub: fetched into the Hub's own cache of this machine, and only read.

Fetching goes on where it stopped, and of two commands at once one fetches a file.
"""

from collections.abc import Sequence
from pathlib import Path

from kcache.errors import StoreError
from kcache.foreign import told

_HEAD = "manifest.json"


def snapshot(repository: str, revision: str | None, parts: Sequence[str] | None = None) -> Path:
    """The folder of this machine with the cache in a dataset, or with those of its files that match `parts`.

    Its files are links into the Hub's cache, under $HF_HOME. Of a dataset that is no finished cache nothing is fetched.
    Raises StoreError.
    """
    folder = _fetched(repository, revision, [_HEAD])
    return _fetched(repository, revision, parts) if (folder / _HEAD).is_file() else folder


def _fetched(repository: str, revision: str | None, parts: Sequence[str] | None) -> Path:
    # Imported here, because it takes a third of a second that no other place needs.
    from huggingface_hub import snapshot_download

    what = f"hf://datasets/{repository}{f'@{revision}' if revision else ''} cannot be fetched"
    patterns = None if parts is None else list(parts)
    with told(StoreError, what, "check the name and the revision"):
        folder = snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=patterns)
    return Path(folder)
