"""How well `kcache cache-build --dry-run` foretells a build: bytes and seconds, estimated and then measured.

    python benchmarks/estimate.py /tmp/estimate --samples 1500 --resolution 128

Runs on the demo's pictures and networks unless --prior and --decoder name others. Prints one JSON object.
"""

import argparse
import json
import time
from pathlib import Path

from measuring.record import machine

from kcache.build.build import build_cache
from kcache.build.estimate import estimate_build
from kcache.config import BuildConfig
from kcache.demo.digits import write_digits
from kcache.demo.tiny import demo_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new or empty: pictures, networks and caches go there")
    parser.add_argument("--samples", type=int, default=1500)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--prior", help="folder or Hub id; the demo's when left out")
    parser.add_argument("--decoder", help="folder or Hub id; the demo's when left out")
    parser.add_argument("--device")
    options = parser.parse_args()
    pictures, models = options.folder / "pictures", options.folder / "models"
    write_digits(pictures, options.samples)
    demo_models(models)
    results = [compare(options, pictures, models, form) for form in ("zarr", "webdataset")]
    print(json.dumps({"machine": machine(), "samples": options.samples, "results": results}, indent=2))


def compare(options: argparse.Namespace, pictures: Path, models: Path, form: str) -> dict[str, object]:
    """Estimated and real bytes and seconds of a new cache of the form `form`, and their ratios."""
    cache = options.folder / form
    config = BuildConfig(
        format="zarr" if form == "zarr" else "webdataset",
        resolution=(options.resolution,),
        device=options.device,
        pretrained_prior_model_name_or_path=options.prior or str(models / "kandinsky-2-2-prior"),
        pretrained_decoder_model_name_or_path=options.decoder or str(models / "kandinsky-2-2-decoder"),
    )
    estimate = estimate_build(str(pictures), str(cache), config)
    start = time.perf_counter()
    build_cache(str(pictures), str(cache), config)
    seconds = time.perf_counter() - start
    folders = [path for path in cache.iterdir() if path.is_dir() and not path.name.startswith("index-")]
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    return {
        "format": form,
        "bytes": size,
        "bytes_estimated": estimate.bytes,
        "bytes_ratio": round(estimate.bytes / size, 4),
        "seconds": round(seconds, 2),
        "seconds_estimated": round(estimate.seconds, 2),
        "seconds_ratio": round(estimate.seconds / seconds, 3),
        "tables": {name: round(table.seconds, 2) for name, table in estimate.tables.items()},
        "epochs_until_paid_back": {stage: round(saving.epochs, 2) for stage, saving in estimate.savings.items()},
    }


if __name__ == "__main__":
    main()
