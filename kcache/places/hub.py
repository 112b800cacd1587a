"""What lies in a dataset of the Hugging Face Hub: fetched into the Hub's own cache of this machine, and only read.

Fetching goes on where it stopped, and of two commands at once one fetches a file.
"""

from collections.abc import Sequence
from pathlib import Path

from kcache.errors import CacheNotFoundError, StoreError
from kcache.foreign import told

_HEAD = "manifest.json"


def snapshot(repository: str, revision: str | None, parts: Sequence[str] | None = None) -> Path:
    """The folder of this machine with the cache in a dataset, or with those of its files that match `parts`.

    Its files are links into the Hub's cache, under $HF_HOME. Raises StoreError, and CacheNotFoundError before anything
    is fetched of a dataset that is no finished cache.
    """
    # Imported here, because it takes a third of a second that no other place needs.
    from huggingface_hub import snapshot_download

    url = f"hf://datasets/{repository}{f'@{revision}' if revision else ''}"
    folder = Path()
    for patterns in ([_HEAD], parts):
        with told(StoreError, f"{url} cannot be fetched", "check the name, the revision and the network"):
            asked = None if patterns is None else list(patterns)
            folder = Path(snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=asked))
        if not (folder / _HEAD).is_file():
            raise CacheNotFoundError(
                f"{url} is not a finished cache: there is no {_HEAD} in it; give the dataset that one was uploaded to"
            )
    return folder
