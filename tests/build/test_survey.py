"""What a survey hands on: contents by key, to several threads at a time."""

from pathlib import Path

import pytest
from small_builds import copy_pictures, small_config

from kcache.build.pictures.contents import fetcher, shard_fetcher
from kcache.build.survey import survey
from kcache.store.digests import Keys, content_key
from kcache.store.formats.columns import Samples


def test_what_threads_look_up_is_sorted_before_them(
    oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy_pictures(oracle, tmp_path / "pictures")
    job = survey(str(source), tmp_path / "cache", small_config(oracle), lambda _: None)
    samples = Samples.of(job.samples)
    keys = {"image_embeds": samples.image_keys, "text": samples.caption_keys}
    fetchers = [(name, fetcher(job, name)) for name in keys] + [
        (name, shard_fetcher(job, name)(list(own))) for name, own in keys.items()
    ]
    monkeypatch.setattr(Keys, "in_order", lambda _: pytest.fail("it is sorted by each thread"))
    for name, fetch in fetchers:
        for key in keys[name]:
            content = fetch(key)
            assert content_key(content.encode() if isinstance(content, str) else content or b"") == key
