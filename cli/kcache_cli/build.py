"""`kcache cache-build`: encode what is missing."""

import dataclasses
import json
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcache.config import BuildConfig
from kcache.errors import RejectedInputsError
from kcache_cli.flags import with_flags
from kcache_cli.progress import Report, bytes_text, count_text, duration_text, note, say, show_build

if TYPE_CHECKING:
    from kcache.build import BuildPreview, BuildResult

__all__ = ["BUILD_HELP", "cache_build"]

BUILD_HELP = {
    "stage": "Which trainer the cache is for; `all` serves both.",
    "resolution": "Side in pixels of the square pictures whose latents are stored; repeat it for several tables.",
    "image_column": "Column of a dataset that holds the image.",
    "caption_column": "Column that holds the caption, or a list of captions.",
    "max_train_samples": "Take only the first so many samples of the source.",
    "alpha": "What transparent pixels are laid on; `drop` ignores transparency, as the upstream scripts do.",
    "pretrained_prior_model_name_or_path": "Folder or Hub id with image_encoder, text_encoder and tokenizer.",
    "pretrained_decoder_model_name_or_path": "Folder or Hub id with movq.",
    "revision": "Branch, tag or commit of the Hub repositories.",
    "mixed_precision": "Dtype that the encoders run in; `no` is float32.",
    "batch_size": "Inputs per encoder call. It is part of the recipe: rows differ by 1e-6 between batch sizes.",
    "device": "Where the encoders run, such as cuda:0. Chosen by what there is when left out.",
    "format": "Form of the shards on disk.",
    "dtype": "Dtype of the stored rows.",
    "rows_per_shard": "Rows of one shard. What makes about 256 MB when left out.",
    "num_workers": "Threads that decode images. One per core when left out.",
    "rehash": "Read every file again, instead of trusting that an unchanged size and time mean unchanged content.",
    "retry_rejected": "Try again the inputs that an earlier build rejected.",
}


@with_flags(BuildConfig, BUILD_HELP)
def cache_build(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Folder of images, saved dataset, parquet files, or Hub dataset id."),
    ],
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="Folder of the cache; made when it does not exist.")],
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be encoded, and write nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when any input was rejected.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **settings: Any,
) -> None:
    """Encode what is missing from a cache.

    Where nothing is missing that takes seconds. A build may be interrupted at any moment and run again: what was
    committed is kept. Inputs that cannot be encoded are named in CACHE/rejected.jsonl, with the reason, and cost
    nothing else.

    \b
    Examples:
      kcache cache-build photos/ caches/photos-768
      kcache cache-build photos/ caches/photos --resolution 512 --resolution 768 --mixed-precision fp16
      kcache cache-build lambdalabs/naruto-blip-captions caches/naruto --stage prior --dry-run
    """
    from kcache.build import build_cache, plan_build

    config = BuildConfig(**{**settings, "resolution": tuple(settings["resolution"])})
    if dry_run:
        _print_preview(plan_build(source, cache, config), as_json)
        return
    with Report() as report:
        result = build_cache(source, cache, config, report=partial(show_build, report))
    _print_result(result, as_json)
    if strict and result.rejected:
        raise RejectedInputsError(
            f"{count_text(result.rejected, 'input')} rejected; expected none under --strict; see {cache}/rejected.jsonl"
        )


def _print_preview(preview: "BuildPreview", as_json: bool) -> None:
    if as_json:
        say(json.dumps(dataclasses.asdict(preview), indent=2))
        return
    for table, missing in preview.missing.items():
        say(f"{table}: {count_text(missing, 'row')} to encode" if missing else f"{table}: 0 to do")
    for line in preview.notes:
        note(line)


def _print_result(result: "BuildResult", as_json: bool) -> None:
    if as_json:
        say(json.dumps(dataclasses.asdict(result), indent=2))
        return
    for line in result.notes:
        note(line)
    for name, table in result.tables.items():
        say(f"{name}: {table.encoded:,} encoded, {table.present:,} present before, {bytes_text(table.bytes)}")
    if not any(table.encoded for table in result.tables.values()):
        say("0 to do")
    if result.rejected:
        say(f"{count_text(result.rejected, 'input')} rejected: {result.cache}/rejected.jsonl says which and why")
    say(f"{result.cache}: {count_text(result.samples, 'sample')}, {duration_text(result.seconds)}")
