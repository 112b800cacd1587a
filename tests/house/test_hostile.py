"""Nothing that is opened is executed, nothing is written outside, and what is refused is refused in kcache's own words.

Every payload would make the file `marker` if it ever ran.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_builds import build, copy_pictures, digests

from kcache import Cache
from kcache.build.plan import open_plan
from kcache.disk.durable import read_npy
from kcache.errors import CacheCorruptError, CacheMismatchError, KcacheError, RunError, SourceError
from kcache.sources import open_source
from kcache.store.checkpoint import latest_checkpoint, open_checkpoint
from kcache.store.formats.parts import PARTS, list_parts
from kcache.store.manifest import read_manifest
from kcache.store.recipe import canonical_json
from kcache.store.shards import read_commits

MANY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)


class Payload:
    """An object that makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file that no test may leave behind, nor anything else outside the folder `inside`."""
    (tmp_path / "inside").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("as it was")
    marker = tmp_path / "marker"
    yield marker
    assert not marker.exists()
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "as it was"


def pickles(marker: Path) -> dict[str, bytes]:
    """Each form in which a pickle may stand in a file."""
    content = pickle.dumps(Payload(marker))
    array, archive = io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Payload(marker)], object))
    torch.save({"state": Payload(marker)}, archive)
    return {
        "pkl": content, "pickle": content, "pyd": content, "pth": archive.getvalue(), "pkl.gz": gzip.compress(content),
        "npy": array.getvalue(), "bin": archive.getvalue(), "txt": content, "json": content, "jpg": content,
    }  # fmt: skip


def test_the_payloads_work(tmp_path: Path) -> None:
    for name, content in pickles(tmp_path / "marker").items():
        if name in ("pkl", "pkl.gz"):
            pickle.loads(gzip.decompress(content) if name == "pkl.gz" else content)  # noqa: S301
            (tmp_path / "marker").unlink()
        if name in ("pth", "bin"):
            torch.load(io.BytesIO(content), weights_only=False)
            (tmp_path / "marker").unlink()


# ---- sources


def add(tar: tarfile.TarFile, name: str, content: bytes, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    tar.addfile(info, io.BytesIO(content))


def test_a_hostile_tar_executes_and_writes_nothing(tmp_path: Path, oracle: Path, marker: Path) -> None:
    source = tmp_path / "inside" / "tars"
    source.mkdir()
    picture = next((oracle / "data").glob("img_*.png")).read_bytes()
    with tarfile.open(source / "00000.tar", "w") as tar:
        add(tar, "good.png", picture)
        add(tar, "good.txt", b"a picture")
        for suffix, content in pickles(marker).items():
            add(tar, f"good.x.{suffix}", content)
        for suffix, content in pickles(marker).items():
            add(tar, f"lone-{suffix.replace('.', '-')}.{suffix}", content)
        for name in ("../../outside/x", "/outside/x", f"{tmp_path}/outside/x", "a/../../../outside/x", "~/x"):
            add(tar, f"{name}.png", picture)
            add(tar, f"{name}.txt", b"a picture")
        for name, kind in (("soft", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("null", tarfile.CHRTYPE)):
            add(tar, f"{name}.png", b"", kind, str(tmp_path / "outside" / "precious"))
            add(tar, f"{name}.txt", b"a picture")
        add(tar, "bomb.png.gz", gzip.compress(bytes(1 << 22)))
        add(tar, "through", b"", tarfile.SYMTYPE, str(tmp_path / "outside"))
        add(tar, "through/x.png", picture)
        add(tar, "through/x.txt", b"a picture")
    result = build(source, tmp_path / "inside" / "cache", oracle)
    cache = Cache.open(tmp_path / "inside" / "cache")
    assert set(cache.samples["name"].to_pylist()) == {"00000.tar/good", "00000.tar/through/x", "00000.tar/~/x"}
    assert result.rejected == len(pickles(marker)) + 9


@pytest.mark.parametrize(
    "spec",
    [
        "pipe:touch {marker}",
        "pipe:touch {marker} && cat {{0..9}}.tar",
        "file:{marker}",
        "http://127.0.0.1:9/{{0..9}}.tar",
    ],
)
def test_commands_and_urls_are_refused(tmp_path: Path, marker: Path, spec: str) -> None:
    with pytest.raises(SourceError, match=r"is a URL|there is no file or folder"):
        open_source(spec.format(marker=marker))


def test_hostile_metadata_reads_nothing_outside(tmp_path: Path, oracle: Path, marker: Path) -> None:
    source = copy_pictures(oracle, tmp_path / "inside" / "pictures", 1)
    names = ["../../outside/precious", str(tmp_path / "outside" / "precious"), "link.png", "door/precious", "."]
    names += ["pipe:touch marker", f"file://{tmp_path}/outside/precious", "img_00.png/../../../outside/precious"]
    (source / "link.png").symlink_to(tmp_path / "outside" / "precious")
    (source / "door").symlink_to(tmp_path / "outside")
    rows = [{"file_name": name, "text": "x"} for name in ["img_00.png", *names]]
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_source(str(source))
    assert [opened.name(i) for i in range(len(opened))] == ["img_00.png"]
    assert len([refusal for refusal in opened.refused if "metadata" in refusal.name]) == len(names)


# ---- caches


@pytest.fixture(scope="module")
def built(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source of four pictures and its cache."""
    folder = tmp_path_factory.mktemp("built")
    copy_pictures(oracle, folder / "pictures", 4)
    build(folder / "pictures", folder / "cache", oracle)
    return folder


@pytest.fixture
def cache(built: Path, tmp_path: Path, marker: Path) -> Path:
    return Path(shutil.copytree(built / "cache", tmp_path / "inside" / "cache"))


def use_all(cache: Path) -> None:
    """Open and read everything that a cache holds."""
    opened = Cache.open(cache)
    fields = ["image_embeds", "latents", "text_embeds", "text_encoder_hidden_states"]
    opened.read(range(len(opened)), fields)
    opened.samples  # noqa: B018
    for recipe in opened.recipes.values():
        read_commits(cache / recipe.directory, recipe)
    open_plan(cache)


def test_planted_pickles_in_a_cache_are_never_opened(cache: Path, built: Path, oracle: Path, marker: Path) -> None:
    [table] = cache.glob("image_embeds-*")
    [data] = table.glob("00000-*/")
    for suffix, content in pickles(marker).items():
        for folder in (cache, table, data):
            (folder / f"planted.{suffix}").write_bytes(content)
    (cache / "zarr.py").write_text(f"open({str(marker)!r}, 'w')")
    use_all(cache)
    build(built / "pictures", cache, oracle)


@pytest.mark.parametrize("pattern", ["*/00000-*.rows.npy", "index-*/image_embeds.npy", "index-*/captions.npy"])
@pytest.mark.parametrize("suffix", ["npy", "pkl", "pth"])
def test_pickles_in_place_of_arrays_are_refused(
    cache: Path, built: Path, oracle: Path, marker: Path, pattern: str, suffix: str
) -> None:
    for path in cache.glob(pattern):
        path.write_bytes(pickles(marker)[suffix])
    with pytest.raises(ValueError, match=r"array|Object|magic"):
        read_npy(path)
    with suppress(KcacheError):
        use_all(cache)
    with suppress(KcacheError):
        build(built / "pictures", cache, oracle)


def resealed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a file of JSON with a digest of its own content, as one who knows how it is made would."""
    data = json.loads(path.read_bytes())
    data.pop("digest", None)
    change(data)
    digest = hashlib.sha256(canonical_json(data).encode()).hexdigest()
    path.write_text(json.dumps({**data, "digest": digest}))


def set_in(*keys: Any) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    """A change that puts a value at a place in nested JSON; a star stands for whatever comes first."""

    def with_value(value: Any) -> Callable[[dict[str, Any]], None]:
        def change(data: dict[str, Any]) -> None:
            place: Any = data
            for key in keys[:-1]:
                place = place[next(iter(place)) if key == "*" else key]
            place[keys[-1]] = value

        return change

    return with_value


OUT = "../../outside/precious"
PLACES = {
    "data": ("tables", "latents-64", "shards", 0, "data"),
    "name": ("tables", "latents-64", "shards", 0, "name"),
    "rows": ("tables", "latents-64", "shards", 0, "rows"),
    "bytes": ("tables", "latents-64", "bytes"),
    "shards": ("tables", "latents-64", "shards"),
    "table": ("tables", "latents-64", "recipe", "table"),
    "dtype": ("tables", "latents-64", "recipe", "stored_dtype"),
    "fields": ("tables", "latents-64", "recipe", "fields"),
    "field name": ("tables", "latents-64", "recipe", "fields", 0, "name"),
    "field shape": ("tables", "latents-64", "recipe", "fields", 0, "shape"),
    "tables": ("tables",),
    "new table": ("tables", OUT),
    "samples": ("samples",),
    "samples digest": ("samples_digest",),
    "index digest": ("index_digest",),
    "rejected": ("rejected",),
    "models": ("models",),
    "model": ("models", "prior"),
}
VALUES = [
    OUT, "/etc/passwd", "..", "", "latents-64-00000000/../../x", "latents-64-00000000/00000/../x", "a\0b", "٣٣٣٣٣",
    None, True, -1, 10**30, 1.5, [], {}, [[]], {"a": {}}, "object", "O", "V9", [10**9, 10**9], [0], [-1],
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_hostile_manifests_are_refused(cache: Path, place: str) -> None:
    whole = (cache / "manifest.json").read_bytes()
    for value in VALUES:
        (cache / "manifest.json").write_bytes(whole)
        resealed(cache / "manifest.json", set_in(*PLACES[place])(value))
        if json.loads((cache / "manifest.json").read_bytes())[PLACES[place][0]] == json.loads(whole)[PLACES[place][0]]:
            continue
        with suppress(KcacheError):
            use_all(cache)
            # What can be used names nothing that lies elsewhere.
            for entry in read_manifest(cache).tables.values():
                for path in [cache / entry.recipe.directory, *(cache / shard.data for shard in entry.shards)]:
                    assert path.resolve().is_relative_to(cache.resolve())


@pytest.mark.parametrize(
    "place", ["data", "name", "field name", "samples digest", "index digest", "table", "new table"]
)
def test_names_that_lead_out_of_a_cache_are_refused(cache: Path, place: str) -> None:
    for value in (OUT, "/etc/passwd", "..", "00000/../../../x"):
        resealed(cache / "manifest.json", set_in(*PLACES[place])(value))
        with pytest.raises(CacheCorruptError, match="is damaged"):
            Cache.open(cache)


DEEP = b"[" * 200_000
NOT_JSON = [b"", b"null", b"[]", b"7", b'"x"', b"{}", DEEP, b'{"a":' * 50_000, b"9" * 10_000, b"NaN", b"\xff\xfe", b"{"]


@pytest.mark.parametrize("pattern", ["manifest.json", "*/00000.json", "plans/x/plan.json"])
def test_files_that_are_not_the_right_json_are_refused(cache: Path, pattern: str) -> None:
    (cache / "plans" / "x").mkdir(parents=True)
    (cache / "plans" / "x" / "plan.json").write_bytes(b"{}")
    for content in NOT_JSON:
        for path in cache.glob(pattern):
            path.write_bytes(content)
        with pytest.raises((CacheCorruptError, CacheMismatchError)):
            use_all(cache)


COMMIT_PLACES = [
    ("name",), ("data",), ("rows",), ("files",), ("files", 0, "path"), ("files", 0, "bytes"), ("rejected",),
    ("absent",), ("provenance",), ("fingerprint",), ("schema_version",), ("surprise",),
]  # fmt: skip


@pytest.mark.parametrize("place", COMMIT_PLACES, ids=lambda place: place[-1])
def test_hostile_commit_records_are_refused(cache: Path, place: tuple[Any, ...]) -> None:
    recipe = read_manifest(cache).tables["latents-64"].recipe
    record = cache / recipe.directory / "00000.json"
    whole = record.read_bytes()
    hostile = [*VALUES, [OUT], [{"key": OUT, "stage": "s", "reason": "r"}], [{"path": OUT, "bytes": 1, "crc32c": 1}]]
    for value in hostile:
        record.write_bytes(whole)
        resealed(record, set_in(*place)(value))
        with suppress(KcacheError):
            for commit in read_commits(record.parent, recipe):
                paths = [file.path for file in commit.files] + [commit.data or "."]
                assert all((record.parent / path).resolve().is_relative_to(record.parent.resolve()) for path in paths)


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("place", ["rows_per_shard", "first_shard", "rows", "recipe", "table", "name"])
def test_hostile_plans_are_refused(cache: Path, built: Path, oracle: Path, place: str, value: Any) -> None:
    recipe = read_manifest(cache).tables["image_embeds"].recipe.to_json()
    table = {"recipe": recipe, "rows_per_shard": 4, "first_shard": 1, "rows": 1}
    if place in table:
        table[place] = value
    else:
        (recipe if place == "table" else recipe["fields"][0])[place] = value
    folder = cache / "plans" / "x"
    folder.mkdir(parents=True)
    np.save(folder / "image_embeds.keys.npy", np.zeros((1, 16), np.uint8))
    digest = hashlib.sha256(canonical_json(table).encode() + bytes(16)).hexdigest()
    (folder / "plan.json").write_text(json.dumps({"schema_version": 1, "digest": digest, "tables": [table]}))
    try:
        plan = open_plan(cache)
    except KcacheError:
        return
    assert plan is not None
    assert [shard.name for table in plan.tables for shard in table.shards] != []
    build(built / "pictures", cache, oracle)


@pytest.mark.parametrize("content", [*NOT_JSON, b'{"shape": [1e99], "codecs": [{"name": "pipe:touch marker"}]}'])
def test_zarr_metadata_is_for_others_and_never_read(cache: Path, content: bytes) -> None:
    for path in cache.rglob("zarr.json"):
        path.write_bytes(content)
    use_all(cache)


def test_links_in_a_cache_are_not_written_through(cache: Path, built: Path, oracle: Path, tmp_path: Path) -> None:
    [table] = cache.glob("latents-64-*")
    shutil.rmtree(table)
    table.symlink_to(tmp_path / "outside")
    with pytest.raises(CacheMismatchError, match="would write elsewhere"):
        build(built / "pictures", cache, oracle)


def test_an_index_that_points_anywhere_is_refused(cache: Path) -> None:
    for name in [*read_manifest(cache).tables, "captions"]:
        [path] = cache.glob(f"index-*/{name}.npy")
        whole = path.read_bytes()
        start = whole.index(b"\n") + 1  # where the header ends
        for fill in (b"\xff", b"\x7f", b"\x01"):
            path.write_bytes(whole[:start] + fill * (len(whole) - start))
            path = reindexed(cache) / path.name
            with pytest.raises(KcacheError):
                use_all(cache)
        path.write_bytes(whole)


def reindexed(cache: Path) -> Path:
    """Make the manifest say that the index arrays are what they are now; returns their folder."""
    folder = next(cache.glob("index-*"))
    listed = list_parts(folder, sorted(path.stem for path in folder.glob("*.npy")))
    (folder / PARTS).write_bytes(listed)
    digest = hashlib.sha256(listed).hexdigest()
    resealed(cache / "manifest.json", set_in("index_digest")(digest))
    return folder.rename(cache / f"index-{digest[:16]}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(OUT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested JSON."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


@MANY
@given(data=st.data())
def test_no_change_of_a_manifest_escapes(built: Path, data: st.DataObject, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    if not cache.exists():
        shutil.copytree(built / "cache", cache)
    manifest = json.loads((built / "cache" / "manifest.json").read_bytes())
    place = data.draw(st.sampled_from(sorted(places(manifest), key=repr)))
    value = data.draw(JSON)
    shutil.copyfile(built / "cache" / "manifest.json", cache / "manifest.json")
    with suppress(ValueError):  # NaN has no canonical form to seal
        resealed(cache / "manifest.json", set_in(*place)(value))
    with suppress(KcacheError):
        use_all(cache)


# ---- checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path, marker: Path) -> Path:
    """A checkpoint as the trainer writes it, of a network of one layer."""
    from diffusers import PriorTransformer
    from safetensors.torch import save_file

    from kcache.store.checkpoint import save_checkpoint

    network = PriorTransformer(
        num_attention_heads=1,
        attention_head_dim=4,
        num_layers=1,
        embedding_dim=4,
        num_embeddings=2,
        additional_embeddings=4,
    )
    run = tmp_path / "inside" / "run"
    run.mkdir()

    def write(folder: Path) -> None:
        network.save_pretrained(folder / "prior")
        save_file({"proj_in.weight.exp_avg": torch.zeros(4, 4)}, folder / "optimizer.safetensors")

    return save_checkpoint(run, 3, write, {"config": {}})


def test_planted_pickles_in_a_checkpoint_are_never_opened(checkpoint: Path, marker: Path) -> None:
    from diffusers import PriorTransformer

    planted = pickles(marker)
    names = ["custom_checkpoint_0.pkl", "random_states_0.pkl", "scheduler.bin", "optimizer.bin", "pytorch_model.bin"]
    for name in [*names, "prior/diffusion_pytorch_model.bin", "prior/model.pth", "pytorch_lora_weights.bin"]:
        (checkpoint / name).write_bytes(planted["bin" if name.endswith("bin") else "pkl"])
    assert open_checkpoint(checkpoint).step == 3
    PriorTransformer.from_pretrained(checkpoint, subfolder="prior", use_safetensors=True)
    (checkpoint / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"diffusion_pytorch_model\.safetensors missing"):
        open_checkpoint(checkpoint)


def test_pickles_in_place_of_a_checkpoint_s_files_are_refused(checkpoint: Path, marker: Path) -> None:
    for name in ("optimizer.safetensors", "prior/diffusion_pytorch_model.safetensors", "state.json"):
        (checkpoint / name).write_bytes(pickles(marker)["pth"])
        with pytest.raises(RunError, match="broken"):
            latest_checkpoint(checkpoint.parent)


@pytest.mark.parametrize("place", [("files",), ("files", "*"), ("files", OUT), ("step",), ("state",), ("version",)])
def test_hostile_states_of_a_checkpoint_are_refused(checkpoint: Path, place: tuple[Any, ...]) -> None:
    whole = (checkpoint / "state.json").read_bytes()
    for value in VALUES:
        (checkpoint / "state.json").write_bytes(whole)
        place_now = tuple(next(iter(json.loads(whole)["files"])) if key == "*" else key for key in place)
        resealed(checkpoint / "state.json", set_in(*place_now)(value))
        with suppress(RunError):
            assert type(open_checkpoint(checkpoint).step) is int
    for content in NOT_JSON:
        (checkpoint / "state.json").write_bytes(content)
        with pytest.raises(RunError):
            open_checkpoint(checkpoint)


# ---- arrays


@MANY
@given(data=st.data())
def test_no_header_of_an_array_escapes(data: st.DataObject, tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.zeros((2, 3), np.uint8))
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, 90))] = data.draw(st.integers(0, 255) | st.sampled_from(list(b"'({[,9O-\\")))
    (tmp_path / "x.npy").write_bytes(content)
    for mapped in (False, True):
        with suppress(ValueError, OSError):
            read_npy(tmp_path / "x.npy", mapped=mapped)


def test_the_marker_and_the_outside_are_watched(marker: Path, tmp_path: Path) -> None:
    assert digests(tmp_path / "outside").keys() == {"precious"}
    assert os.listdir(tmp_path / "inside") == []  # noqa: PTH208
