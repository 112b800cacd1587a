"""What embeddings say: whether true captions are told from false ones, near-duplicates found, and how long it takes.

    python benchmarks/know_your_data.py --output benchmarks/results
    python benchmarks/know_your_data.py --rows 100000

On the demo's encoders, which are trained, and its scans that no network saw: the AUC of `caption_cosine` between true
captions and those of other pictures; and, by threshold, how many near-duplicates are found that were planted (saved as
JPEG, made smaller, cropped by 5 %), and how many pictures are called duplicates of others that none of these are.

On drawn rows: as many as `--rows`, in float16, of the size of Kandinsky 2.2's, in clusters of very different sizes,
with a spectrum that falls as that of natural embeddings does. Near-duplicates of 1 % are planted at cosines from 0.95
to 0.995; for some rows the nearest one before is also looked for among all. These rows are no CLIP's: they show what
time it takes, and what comparing within cells misses where clusters are as here.
"""

import argparse
import io
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from measuring.record import write_outcome
from PIL import Image

from kcache import Cache
from kcache.build.build import build_cache
from kcache.config import BuildConfig
from kcache.demo.digits import FULL, INKS, PAPERS, Drawing, coloured, read_scans
from kcache.demo.tiny import demo_models
from kcache.disk.scratch import kept, spans
from kcache.store.likeness.cosines import caption_cosines, unit
from kcache.store.likeness.duplicates import find_duplicates, nearest_before

THRESHOLDS = (0.9, 0.95, 0.96, 0.97, 0.975, 0.98, 0.99, 0.995)
TOPICS, TOGETHER = 5000, 20_000


def jpeg(picture: Image.Image) -> bytes:
    """Saved once more, as a JPEG of quality 85."""
    return _saved(picture, format="JPEG", quality=85)


def smaller(picture: Image.Image) -> bytes:
    """At three quarters of its size."""
    size = picture.width * 3 // 4, picture.height * 3 // 4
    return _saved(picture.resize(size, Image.Resampling.LANCZOS), format="PNG")


def cropped(picture: Image.Image) -> bytes:
    """5 % of its width and height less."""
    width, height = round(picture.width * 0.95), round(picture.height * 0.95)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return _saved(picture.crop((left, top, left + width, top + height)), format="PNG")


PLANTED: dict[str, Callable[[Image.Image], bytes]] = {"jpeg": jpeg, "smaller": smaller, "cropped": cropped}


def _saved(picture: Image.Image, **how: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, **how)
    return content.getvalue()


def digits(count: int) -> Iterator[tuple[Image.Image, str]]:
    """Pictures of scans that no network saw, no two of one scan, ink and paper, and captions that say all of it."""
    scans, numbers = read_scans(test=True)
    rng = np.random.default_rng(0)
    ways = list(product(INKS, PAPERS))
    orders = [rng.permutation(len(ways)) for _ in scans]
    for number in range(count):
        times, scan = divmod(number, len(scans))
        ink, paper = ways[orders[scan][times]]
        caption = Drawing(digit=int(numbers[scan]), ink=ink, paper=paper).caption(str(rng.choice(FULL)))
        yield coloured(scans[scan], ink, paper).resize((256, 256), Image.Resampling.BICUBIC), caption


def colours(count: int) -> Iterator[tuple[Image.Image, str]]:
    """Smooth pictures of 24 random colours, unlike each other and unlike all that the demo's networks saw."""
    for seed in range(count):
        values = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
        yield Image.fromarray(values).resize((384, 256), Image.Resampling.BICUBIC), f"picture {seed}"


def cache_of(pictures: Sequence[tuple[bytes, str]], folder: Path, models: tuple[Path, Path]) -> Cache:
    """A cache of pictures and captions, in this order."""
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for number, (content, caption) in enumerate(pictures):
        (folder / "pictures" / f"{number:06}.img.png").write_bytes(content)
        lines.append(json.dumps({"file_name": f"{number:06}.img.png", "text": caption}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    prior, decoder = map(str, models)
    config = BuildConfig(
        stage="prior", batch_size=32, pretrained_prior_model_name_or_path=prior,
        pretrained_decoder_model_name_or_path=decoder,
    )  # fmt: skip
    build_cache(str(folder / "pictures"), str(folder / "cache"), config)
    return Cache.open(folder / "cache")


def area_under_curve(true: np.ndarray, false: np.ndarray) -> float:
    """How often one of `true` is larger than one of `false`, equal ones counted half."""
    ordered = np.sort(false)
    below, upto = np.searchsorted(ordered, true, "left"), np.searchsorted(ordered, true, "right")
    return float((below + upto).mean() / 2 / len(false))


def measure_captions(count: int, folder: Path, models: tuple[Path, Path]) -> dict[str, Any]:
    """True captions against those of other pictures, which say something else."""
    cache = cache_of([(_saved(picture, format="PNG"), text) for picture, text in digits(count)], folder, models)
    captions = [texts[0] for texts in cache.samples["captions"].to_pylist()]
    rng = np.random.default_rng(0)
    others = rng.permutation(len(cache))
    while len(same := [i for i, other in enumerate(others) if captions[other] == captions[i]]):
        others[same] = rng.integers(len(cache), size=len(same))
    rows = cache.read(range(len(cache)), ["image_embeds", "text_embeds"])
    false = (unit(rows["image_embeds"]) * unit(rows["text_embeds"][others])).sum(1)
    true = caption_cosines(cache)
    return {
        "pictures": len(cache),
        "auc": area_under_curve(true, false),
        "true_mean": float(true.mean()),
        "false_mean": float(false.mean()),
        "own_above_false": float((true > false).mean()),
    }


def measure_planted(
    originals: Iterator[tuple[Image.Image, str]], folder: Path, models: tuple[Path, Path]
) -> dict[str, Any]:
    """By threshold: shares of the planted ones that are called a duplicate, and of the originals that are."""
    pictures = [(_saved(picture, format="PNG"), text) for picture, text in originals]
    count = len(pictures)
    for change in PLANTED.values():
        pictures += [(change(Image.open(io.BytesIO(content))), text) for content, text in pictures[:count]]
    cache = cache_of(pictures, folder, models)
    # By name: pictures of equal content are samples of their own, too.
    numbers = np.array([int(name.split(".")[0].rpartition("/")[2]) for name in cache.samples["name"].to_pylist()])
    found = find_duplicates(cache)
    cosines = np.empty(len(pictures))
    cosines[numbers] = found["cosine"]
    alone = cache.select(np.flatnonzero(numbers < count))
    rows = unit(alone.read(range(len(alone)), ["image_embeds"])["image_embeds"])
    among = nearest_before(rows, np.arange(len(rows)))["cosine"]
    every = unit(cache.read(range(len(cache)), ["image_embeds"])["image_embeds"])[np.argsort(numbers)]
    own = {
        name: (every[:count] * every[(1 + place) * count : (2 + place) * count]).sum(1)
        for place, name in enumerate(PLANTED)
    }
    return {
        "originals": count,
        "cosine_to_the_original": {
            name: [float(np.percentile(each, q)) for q in (0, 1, 50)] for name, each in own.items()
        },
        "thresholds": {
            str(threshold): {
                "found": {
                    name: float((cosines[(1 + place) * count : (2 + place) * count] >= threshold).mean())
                    for place, name in enumerate(PLANTED)
                },
                "planted_above": {name: float((each >= threshold).mean()) for name, each in own.items()},
                "false": float((among >= threshold).mean()),
            }
            for threshold in THRESHOLDS
        },
    }


def drawn_rows(count: int, size: int, planted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows in clusters, float16, those planted at the end; of these the originals, and their cosines to them."""
    rng = np.random.default_rng(0)
    spectrum = (np.arange(1, size + 1) ** -0.5).astype(np.float32)
    middle = rng.standard_normal(size).astype(np.float32) * 0.02
    topics = rng.standard_normal((TOPICS, size), np.float32) * spectrum
    share = 1 / np.arange(1, TOPICS + 1)
    originals = np.sort(rng.choice(count - planted, planted, replace=False))
    wanted = rng.uniform(0.95, 0.995, planted).astype(np.float32)
    first = []

    def runs() -> Iterator[np.ndarray]:
        for span in spans(count - planted, TOGETHER):
            length = span.stop - span.start
            topic = rng.choice(TOPICS, length, p=share / share.sum())
            own = rng.standard_normal((length, size), np.float32) * spectrum
            rows = unit(middle + topics[topic] + own)
            first.append(rows[originals[(originals >= span.start) & (originals < span.stop)] - span.start])
            yield rows.astype(np.float16)
        for span in spans(planted, TOGETHER):
            base = np.concatenate(first)[span]
            aside = rng.standard_normal(base.shape, np.float32) * spectrum
            aside = unit(aside - (aside * base).sum(1, keepdims=True) * base)
            cosine = wanted[span, None]
            yield (cosine * base + np.sqrt(1 - cosine**2) * aside).astype(np.float16)

    return kept(runs(), np.empty((0, size), np.float16)), originals, wanted


def measure_scale(count: int, size: int, asked: int) -> dict[str, Any]:
    """Seconds for so many rows, and what is missed of what is planted, and of the nearest ones before some rows."""
    planted = count // 100
    rows, originals, wanted = drawn_rows(count, size, planted)
    begun, spent = time.perf_counter(), time.process_time()
    found = nearest_before(rows, np.arange(count))
    seconds, processor = time.perf_counter() - begun, time.process_time() - spent
    copies = np.arange(count - planted, count)
    # float16 moves a cosine a little.
    hit = (found["sample"][copies] == originals) | (found["cosine"][copies] >= wanted - 0.001)
    some = np.sort(np.random.default_rng(1).choice(np.arange(count // 2, count - planted), asked, replace=False))
    queries, best = unit(rows[some]), np.full(asked, -1, np.float32)
    for span in spans(count, TOGETHER):
        cosines = queries @ unit(rows[span]).T
        cosines[np.arange(span.start, span.stop) >= some[:, None]] = -1
        best = np.maximum(best, cosines.max(1))
    same = found["cosine"][some] >= best - 1e-4
    return {
        "rows": count,
        "dim": size,
        "seconds": seconds,
        "processor_seconds": processor,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "planted": planted,
        "planted_found": float(hit.mean()),
        "called_duplicates": int((found["cosine"][: count - planted] >= 0.95).sum()),
        "asked": asked,
        "nearest_found": float(same.mean()),
        "nearest_median_cosine": float(np.median(best)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000, help="on the demo's encoders")
    parser.add_argument("--rows", type=int, default=1_000_000, help="drawn ones; 0 for none")
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--asked", type=int, default=200, help="drawn rows that are compared with all before them")
    parser.add_argument("--folder", type=Path, help="where caches are kept; a temporary one when left out")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        models = demo_models(folder / "models")
        results["captions"] = measure_captions(options.pictures, folder / "captions", models)
        for name, originals in (("digits", digits(options.pictures)), ("colours", colours(options.pictures))):
            results[name] = measure_planted(originals, folder / name, models)
    if options.rows:
        results["scale"] = measure_scale(options.rows, options.dim, options.asked)
    print(json.dumps(results, indent=2))
    write_outcome(options.output, "know_your_data", vars(options), results)


if __name__ == "__main__":
    main()
