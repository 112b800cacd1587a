"""What cache-info says: true counts, under names that stay."""

import shutil
from pathlib import Path

import pytest
from in_bucket import put
from small_builds import build, copy_pictures, small_config

from kcache import Cache
from kcache.build.build import build_cache
from kcache.encoders.frozen import PictureEncoder
from kcache.errors import CacheNotFoundError
from kcache.places.bucket import BucketPath
from kcache.upkeep.garbage import collect_garbage
from kcache.upkeep.info import describe_cache

pytestmark = pytest.mark.usefixtures("form")

KEYS = {
    "cache", "build", "format", "samples", "bytes", "orphaned_bytes", "fingerprint", "models", "provenance", "tables",
    "resolutions", "shapes", "flip", "controls", "turns", "repeats", "weights", "captions", "tokens", "caption_cosine",
    "losses", "rejected", "rejected_by", "not_looked_at",
}  # fmt: skip


@pytest.fixture(scope="module")
def built(form: str, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("info")
    source = copy_pictures(oracle, folder / "pictures")
    (source / "img_01.txt").write_text("a\na a a a a a\nand one caption more")
    (source / "img_04.png").write_bytes(b"no picture")
    (source / "img_05.png").write_bytes(b"no picture either")
    (source / "img_05.txt").unlink()
    build(source, folder / "cache", oracle, resolution=(64, 32))
    return source, folder / "cache"


def test_everything_is_said_under_names_that_stay(built: tuple[Path, Path], form: str) -> None:
    about, cache = describe_cache(built[1]), Cache.open(built[1])
    assert about.keys() == KEYS
    assert (about["format"], about["samples"], about["resolutions"]) == (form, 4, [32, 64])
    assert about["fingerprint"] == cache.fingerprint
    assert about["bytes"] == sum(table["bytes"] for table in about["tables"].values())
    assert about["tables"].keys() == {"image_embeds", "text", "latents-32", "latents-64"}
    assert about["tables"]["text"]["recipe"] == cache.recipes["text"].to_json()
    assert about["build"] == {"unfinished": False, "tables": {}}
    assert (about["turns"], about["repeats"], about["weights"]) == (4, None, None)
    assert about["provenance"]["device"].startswith("cpu")


def test_of_a_url_is_said_what_needs_no_listing(built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    far, here = put(built[1], f"memory://info/{built[1].parent.name}"), describe_cache(built[1])
    listed, iterdir, below = list[str](), BucketPath.iterdir, BucketPath.below
    monkeypatch.setattr(BucketPath, "iterdir", lambda path: listed.append(path.name) or iterdir(path))
    monkeypatch.setattr(BucketPath, "below", lambda path: listed.append(path.name) or below(path))
    about = describe_cache(str(far))
    assert set(listed) <= {"plans"}
    assert about.keys() == KEYS
    assert {name for name in KEYS if about[name] != here[name]} == {
        "cache", "orphaned_bytes", "provenance", "not_looked_at",
    }  # fmt: skip
    assert (about["orphaned_bytes"], about["provenance"], here["not_looked_at"]) == (None, None, [])
    with pytest.raises(CacheNotFoundError, match=r"memory://info/none is not a finished cache"):
        describe_cache("memory://info/none")


def test_statistics_are_of_the_captions_and_their_tokens(built: tuple[Path, Path]) -> None:
    about, cache = describe_cache(built[1]), Cache.open(built[1])
    assert (about["captions"]["min"], about["captions"]["mean"], about["captions"]["max"]) == (1, 1.5, 3)
    counts = []
    for sample, captions in enumerate(cache.samples["captions"].to_pylist()):
        for number in range(len(captions)):
            counts.append(
                len(cache.read([sample], ["text_encoder_hidden_states"], number)["text_encoder_hidden_states"])
            )
    counts.sort()
    assert (about["tokens"]["min"], about["tokens"]["max"]) == (counts[0], counts[-1])
    assert about["tokens"]["mean"] == pytest.approx(sum(counts) / len(counts))
    assert counts[2] <= about["tokens"]["p50"] <= counts[3]


def test_rejections_are_counted_by_reason(built: tuple[Path, Path]) -> None:
    about = describe_cache(built[1])
    assert {(entry["name"], entry["stage"]) for entry in about["rejected"]} == {
        ("img_04.png", "decode"),
        ("img_05.png", "source"),
    }
    assert [entry["count"] for entry in about["rejected_by"]] == [1, 1]


def test_orphaned_bytes_are_what_gc_frees(built: tuple[Path, Path], oracle: Path, tmp_path: Path) -> None:
    source, cache = (Path(shutil.copytree(path, tmp_path / path.name)) for path in built)
    clean = describe_cache(cache)["orphaned_bytes"]
    (source / "img_02.png").unlink()
    (source / "img_02.txt").unlink()
    build(source, cache, oracle, resolution=(64, 32))
    assert describe_cache(cache)["orphaned_bytes"] > clean
    collect_garbage(cache, compact=True)
    assert describe_cache(cache)["orphaned_bytes"] == 0


def test_an_unfinished_build_says_how_far_it_is(
    built: tuple[Path, Path], oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(oracle, rows_per_shard=2)
    with monkeypatch.context() as patch:
        encode = PictureEncoder.encode
        patch.setattr(
            PictureEncoder,
            "encode",
            lambda self, *given: encode(self, *given) if self.recipe.table == "image_embeds" else 1 / 0,
        )
        with pytest.raises(ZeroDivisionError):
            build_cache(str(built[0]), str(tmp_path / "cache"), config)
    about = describe_cache(tmp_path / "cache")
    assert about.keys() == KEYS
    assert about["build"]["unfinished"]
    assert about["build"]["tables"]["image_embeds"] == {"done": 6, "planned": 6}
    assert about["build"]["tables"]["latents-64"] == {"done": 0, "planned": 5}
    assert about["samples"] is None
    build_cache(str(built[0]), str(tmp_path / "cache"), config)
    assert not describe_cache(tmp_path / "cache")["build"]["unfinished"]


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError):
        describe_cache(tmp_path / "nothing")
