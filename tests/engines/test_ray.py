"""Builds and conversions by actors of a Ray cluster of several nodes, all on this machine, which come and go.

Whatever is lost, a cache ends with the bytes of one that a single process made.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from held_actor import SHAPED, HeldActor, HeldCopier
from held_piece import HeldPiece
from small_builds import build, copy_pictures, digests, small_config

from kcache import Cache
from kcache.build.build import build_cache
from kcache.build.survey import Survey, survey
from kcache.build.work.progress import BuildProgress
from kcache.config import unheard
from kcache.disk.memo import _RACY_NS, DigestMemo
from kcache.disk.pieces import Piece
from kcache.engines import copying_engine, engine_of
from kcache.engines.ahead import look_ahead
from kcache.engines.cluster import _ENVIRONMENT, joined
from kcache.errors import ConfigError, EngineError
from kcache.sources.in_tars.offers import offer_part
from kcache.sources.protocol import Request
from kcache.upkeep.convert import convert_cache

SECONDS = 200.0
"""Until something that is waited for must have happened."""
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
ROWS = {
    "image_embeds": 19, "text": 10, "latents-32": 18,
    "latents-48x96": 2, "latents-48x80": 2, "latents-64": 10, "latents-80x48": 4,
}  # fmt: skip
"""Of the tables of nine pictures and their mirror images; two of them have a reserved one."""
WHOLE: Any = {"max_train_samples": None, "need_captions": True}


def until(happened: Callable[[], Any]) -> Any:
    """What `happened` gives once it is true."""
    end = time.monotonic() + SECONDS
    while not (result := happened()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return result


def parent(pid: int) -> int:
    """The process that started another one; 0 when that one has ended."""
    try:
        state, of = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
    except OSError:
        return 0
    return 0 if state == "Z" else int(of)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster whose head encodes nothing; its nodes are the tests' own."""
    # Its sockets have paths of at most 107 letters, wherever this checkout and the tests' folders are.
    folder = tempfile.mkdtemp(prefix="kc-ray-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        for name, value in _ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # nodes import what the tests do
        from ray.cluster_utils import Cluster

        # That a node is gone is noticed within seconds, and not within a minute.
        health = {
            "health_check_initial_delay_ms": 500,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 3,
        }
        head = {**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": health}
        # With its hooks, nodes could only be added by the main thread, which is building.
        cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        try:
            yield cluster
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def source(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_pictures(oracle, tmp_path_factory.mktemp("ray") / "pictures", 9)


@pytest.fixture(scope="module")
def tars(source: Path) -> Path:
    """The same pictures in three tars, with one that is cut short."""
    folder = source.parent / "tars"
    folder.mkdir()
    files = sorted(source.iterdir())
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for path in files[6 * number : 6 * number + 6]:
                tar.add(path, path.name)
    (folder / "3.tar").write_bytes((folder / "0.tar").read_bytes()[:2000])
    time.sleep(_RACY_NS / 1e9)  # a file that was written just now is not remembered by anybody
    return folder


@pytest.fixture(scope="module")
def built(source: Path, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that one process builds."""
    cache = tmp_path_factory.mktemp("alone") / "cache"
    build(source, cache, oracle, **SHAPED)
    return cache


@pytest.fixture(scope="module")
def alone(built: Path) -> dict[str, str]:
    """Its files."""
    return digests(built)


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Actors stop in the middle of their shards; waits for so many of them, and gives their processes."""
    monkeypatch.setattr("kcache.engines.ray_builder.EncodingActor", HeldActor)
    monkeypatch.setattr("kcache.engines.ray_copier.CopyingActor", HeldCopier)
    (tmp_path / "cache.hold").touch()
    folder = tmp_path / "cache.held"
    return lambda count: until(
        lambda: len(found := sorted(folder.glob("*"))) >= count and [int(path.name) for path in found]
    )


def build_on(cluster: Any, source: Path, cache: Path, oracle: Path, **more: Any) -> Any:
    config = small_config(oracle, **SHAPED, engine="ray", address=cluster.address)
    return build_cache(str(source), str(cache), config, engine=engine_of(str(source), config), **more)


def test_nodes_actors_and_shards_that_are_lost_cost_nothing(
    cluster: Any,
    source: Path,
    oracle: Path,
    tmp_path: Path,
    alone: dict[str, str],
    held: Callable[[int], list[int]],
) -> None:
    """In the middle of their shards one actor is killed, and the node of the other lost; a new node comes."""
    cache, said, progress = tmp_path / "cache", list[str](), list[BuildProgress]()
    first, second = (cluster.add_node(**NODE) for _ in range(2))
    on_first = first.all_processes["raylet"][0].process.pid

    def take_away() -> None:
        os.kill(next(pid for pid in held(2) if parent(pid) == on_first), signal.SIGKILL)
        cluster.remove_node(second, allow_graceful=False)
        cluster.add_node(**NODE)
        held(4)  # the first node and the new one have got an actor each
        (tmp_path / "cache.hold").unlink()

    thief = threading.Thread(target=take_away)
    thief.start()
    result = build_on(cluster, source, cache, oracle, say=said.append, report=progress.append)
    thief.join()
    assert digests(cache) == alone
    losses = sorted(line for line in said if line.startswith("an actor on "))
    assert [line.rpartition(": ")[2] for line in losses] == ["2 shards handed out again"] * 2, losses
    assert {p.table: p.total for p in progress} == ROWS
    assert (progress[-1].done, result.samples) == (progress[-1].total, 9)
    assert progress[-1].who == "2 actors on 1 machine"
    assert result.tables["latents-64"].seconds["encode"] > 0
    until(lambda: not any(map(parent, held(4))))


def test_a_driver_that_is_stopped_or_killed_goes_on_when_it_is_started_again(
    cluster: Any, source: Path, oracle: Path, tmp_path: Path, alone: dict[str, str], held: Callable[[int], list[int]]
) -> None:
    cache = tmp_path / "cache"
    until(lambda: cluster.worker_nodes or cluster.add_node(**NODE))
    arguments = [str(source), str(cache), str(oracle), cluster.address]
    command = f"from held_actor import build_held\nbuild_held(*{arguments!r})"

    with subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.PIPE, text=True) as driver:
        one, *_ = held(1)
        driver.send_signal(signal.SIGINT)
        errors = driver.communicate(timeout=SECONDS)[1]
    assert "stopping as soon as nothing is half done" in errors
    assert driver.returncode == -signal.SIGINT
    until(lambda: not parent(one))
    assert not list(cache.glob("*/.tmp-*"))  # it was told to give up, and had the time to clear up
    (tmp_path / "cache.held" / str(one)).unlink()

    with subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL) as driver:
        held(1)
        driver.kill()
    (tmp_path / "cache.hold").unlink()
    assert build_on(cluster, source, cache, oracle).samples == 9
    assert digests(cache) == alone
    assert len(Cache.open(str(cache))) == 9


def test_a_source_is_looked_through_by_all_machines_whatever_is_lost(
    cluster: Any, tars: Path, oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks through a tar is killed meanwhile; then a signal ends the survey, and it is started again."""
    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "home"))
    until(lambda: cluster.worker_nodes or cluster.add_node(**NODE))
    config = small_config(oracle, engine="ray", address=cluster.address)
    here = survey(str(tars), tmp_path / "cache", config, lambda _: None)
    hold, held, said, known = tmp_path / "hold", tmp_path / "held", list[str](), list[int]()

    def looking() -> int:
        return int(until(lambda: held.is_dir() and [path.name for path in held.iterdir()])[0])

    def ahead(pieces: Sequence[Piece], memo: DigestMemo) -> None:
        known.append(sum(piece.is_known(memo) for piece in pieces))
        slow = [HeldPiece(piece=piece, hold=hold, held=held) for piece in pieces[1:3]]
        look_ahead(config, said.append, [pieces[0], *slow, *pieces[3:]], memo)

    def surveyed() -> Survey:
        return survey(str(tars), tmp_path / "cache", config, said.append, ahead)

    def interrupt() -> None:
        os.kill(looking(), signal.SIGKILL)
        shutil.rmtree(held)
        looking()  # another one has the tar now, or the next
        until(lambda: DigestMemo().remembered(tars / "0.tar", offer_part(Request(config=config, **WHOLE))))
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setenv("KCACHE_HOME", str(tmp_path / "other"))
    hold.touch()
    thief = threading.Thread(target=interrupt)
    thief.start()
    with pytest.raises(KeyboardInterrupt):
        surveyed()
    thief.join()
    until(lambda: not parent(looking()))
    hold.unlink()
    monkeypatch.setattr("kcache.sources.tars.joined_keys", lambda *_: pytest.fail("read here"))
    found = surveyed()
    assert known[0] == 0 < known[1] < 3  # what was handed back before the signal is kept
    assert f"looked through {4 - known[1]} pieces of the source in" in " ".join(said)
    assert (list(found.samples), found.refused) == (list(here.samples), here.refused)
    assert found.source.description == here.source.description
    assert found.positions.find(found.samples.image_keys).tolist() == list(range(9))  # type: ignore[attr-defined]


def test_a_conversion_is_stopped_and_goes_on_and_loses_an_actor_and_a_node(
    cluster: Any, built: Path, tmp_path: Path, held: Callable[[int], list[int]]
) -> None:
    new, said, progress = tmp_path / "cache", list[str](), list[BuildProgress]()
    until(lambda: len(cluster.worker_nodes) > 1 or not cluster.add_node(**NODE))
    arguments: dict[str, Any] = {"rows_per_shard": 3, "say": said.append, "report": progress.append}
    arguments["engine"] = copying_engine("ray", cluster.address)

    def stop() -> None:
        held(2)
        os.kill(os.getpid(), signal.SIGINT)

    thief = threading.Thread(target=stop)
    thief.start()
    with pytest.raises(KeyboardInterrupt):
        convert_cache(built, new, "zarr", **arguments)
    thief.join()
    until(lambda: not any(map(parent, held(2))))
    assert not list(new.glob("*-*/*"))  # neither a shard nor anything half done
    shutil.rmtree(tmp_path / "cache.held")

    def take_away() -> None:
        one, other, *_ = held(2)
        os.kill(one, signal.SIGKILL)
        lost = next(n for n in cluster.worker_nodes if n.all_processes["raylet"][0].process.pid == parent(other))
        cluster.remove_node(lost, allow_graceful=False)
        (tmp_path / "cache.hold").unlink()

    thief = threading.Thread(target=take_away)
    thief.start()
    convert_cache(built, new, "zarr", **arguments)
    thief.join()
    convert_cache(built, tmp_path / "alone", "zarr", rows_per_shard=3)
    assert digests(new) == digests(tmp_path / "alone")
    # Both may have been lost at one look: then one line tells of them.
    assert any(line.startswith("an actor on ") for line in said), said
    assert any(p.who.endswith("handed out again") for p in progress)

    convert_cache(new, tmp_path / "tars", "webdataset", **arguments)
    convert_cache(new, tmp_path / "tars-alone", "webdataset", rows_per_shard=3)
    assert digests(tmp_path / "tars") == digests(tmp_path / "tars-alone")
    assert (progress[-1].table, progress[-1].done, progress[-1].total) == ("samples", 9, 9)
    assert re.fullmatch(r"\d actors? on 1 machine", progress[-1].who)


def test_a_cluster_that_is_not_there_is_one_message(source: Path, oracle: Path, tmp_path: Path) -> None:
    config = small_config(oracle, engine="ray", address="somewhere:no port")
    with pytest.raises(EngineError, match=r"there is no Ray cluster at somewhere:no port: .*; expected one that runs"):
        build_cache(str(source), str(tmp_path / "cache"), config, engine=engine_of(str(source), config))
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent = f"127.0.0.1:{server.getsockname()[1]}"
    said = rf"there is no Ray cluster at {silent}: nothing answers there \(.*refused\); expected one that runs"
    with pytest.raises(EngineError, match=said), joined(silent, unheard):
        pass


def test_without_ray_one_message_says_what_to_install(oracle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.engines.engine.find_spec", lambda _: None)
    for ask in (lambda: engine_of("photos", small_config(oracle, engine="ray")), lambda: copying_engine("ray")):
        with pytest.raises(ConfigError, match=r"pip install 'kcache\[ray\]'"):
            ask()


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"address": "head:6379"}, "--address changes nothing without --engine"),
     ({"engine": "ray", "worker": "0/2"}, "--engine ray hands out all shards itself")],
)  # fmt: skip
def test_settings_that_mean_nothing_together_are_refused(oracle: Path, settings: dict[str, str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        small_config(oracle, **settings)
    with pytest.raises(ConfigError, match=match):
        copying_engine(**{"engine": "local", **settings})  # type: ignore[arg-type]
