"""A build of pictures in a bucket makes the bytes that one of the same files on a disk makes."""

import tarfile
from pathlib import Path

from in_bucket import put
from small_builds import build, copy_pictures, digests, encoded


def test_tars_in_a_bucket_make_the_cache_that_they_make_on_a_disk(oracle: Path, tmp_path: Path, bucket: str) -> None:
    pictures = copy_pictures(oracle, tmp_path / "pictures", 4)
    (pictures / "img_02.png").write_bytes(b"no picture")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "00000.tar", "w") as tar:
        for path in sorted(pictures.iterdir()):
            tar.add(path, path.name)
    far = put(tmp_path / "tars", f"{bucket}/tars")
    build(tmp_path / "tars", tmp_path / "here", oracle)
    result = build(far, tmp_path / "far", oracle)  # type: ignore[arg-type]
    assert digests(tmp_path / "far") == digests(tmp_path / "here")
    assert result.rejected == 1
    assert encoded(build(far / "{00000..00000}.tar", tmp_path / "here", oracle)) == {}  # type: ignore[arg-type]
