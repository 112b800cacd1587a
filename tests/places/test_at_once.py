"""Threads and processes that write the same names of a real store at once: of many one wins, and no change is lost."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from kcache.places import place_of
from kcache.places.bucket import BucketPath
from kcache.places.conditional import read_version, swap

PROCESSES, NAMES, CHANGES = 3, 8, 4

WRITER = """
import sys
from kcache.errors import StoreError
from kcache.places import place_of
from kcache.places.conditional import create, read_version, swap

url, me, names, changes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
folder = place_of(url)
for number in range(names):
    print("won" if create(folder / f"record-{number}", me.encode()) else "lost", number)
for number in range(changes):
    while True:
        found = read_version(folder / "counter")
        if swap(folder / "counter", f"{int(found[0].split()[0]) + 1} {me} {number}".encode(), found[1]):
            break
"""


def test_of_processes_that_create_and_change_files_at_once_each_file_has_one_winner(bucket: str) -> None:
    folder = place_of(bucket)
    assert isinstance(folder, BucketPath)
    assert swap(folder / "counter", b"0", None)
    arguments = [[sys.executable, "-c", WRITER, bucket, str(me), str(NAMES), str(CHANGES)] for me in range(PROCESSES)]
    started = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for words in arguments]
    said = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0] * PROCESSES
    for number in range(NAMES):
        (winner,) = (me for me in range(PROCESSES) if f"won {number}" in said[me])
        assert (folder / f"record-{number}").read_bytes() == str(winner).encode()
    assert (folder / "counter").read_bytes().split()[0] == str(PROCESSES * CHANGES).encode()


def test_of_threads_that_swap_from_the_same_content_one_wins(bucket: str) -> None:
    path = place_of(f"{bucket}/manifest")
    assert isinstance(path, BucketPath)
    assert swap(path, b"before", None)
    for turn in range(4):
        before = read_version(path)
        assert before is not None
        contents = [f"{turn} {number}".encode() for number in range(6)]
        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(lambda content, before=before: swap(path, content, before[1]), contents))
        assert won.count(True) == 1
        assert path.read_bytes() == contents[won.index(True)]
