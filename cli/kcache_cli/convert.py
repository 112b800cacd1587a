"""`kcache cache-convert`: the same cache in the other form, or of fewer tables."""

from functools import partial
from typing import Annotated, Literal

import typer

from kcache.config import Stage
from kcache.urls import check_lasting
from kcache_cli.progress import Report, note, say_manifest, show_build


def cache_convert(
    cache: Annotated[str, typer.Argument(metavar="CACHE", help="Folder or URL of the finished cache.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Folder or URL of the cache to write; new or empty.")],
    *,
    form: Annotated[
        Literal["zarr", "webdataset"], typer.Option("--format", help="Form of the new cache's shards on disk.")
    ],
    stage: Annotated[
        Stage, typer.Option("--stage", help="Which trainer the new cache is for; `all` takes every table.")
    ] = "all",
    resolution: Annotated[
        list[int] | None,
        typer.Option(
            "--resolution", help="Take the latents of this side only; repeat it for several.", metavar="<int>", min=1
        ),
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(
            help="Which of several processes that write NEW together this is, as I/N counted from 0. Asked of torchrun "
            "or Slurm when left out."
        ),
    ] = None,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="Take over the shards of processes elsewhere without waiting for their leases to run out.",
        ),
    ] = False,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Who copies: this process, or `ray`, the machines of a Ray cluster (kcache[ray])."),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of the Ray cluster: the one that runs here when left out, else one that is started for "
            "this conversion, as `local` always does."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a cache again in another form, or for one trainer only, without encoding anything.

    Samples and recipes stay the same, so both caches train equal models. The source of the pictures is not needed.
    Interrupted, the same command goes on with what is not written yet; started several times, the processes share the
    shards. Every byte goes through this machine, out of a bucket and into one, or through those of `--engine ray`.

    \b
    Examples:
      kcache cache-convert caches/photos-768 published/photos-768 --format webdataset
      kcache cache-convert caches/photos-768 published/photos-prior --format webdataset --stage prior
      kcache cache-convert published/photos-768 caches/photos-768 --format zarr
      kcache cache-convert caches/photos-768 s3://caches/photos-768 --format webdataset --worker 0/4
      kcache cache-convert s3://caches/photos-768 s3://caches/photos-tars --format webdataset --engine ray
    """
    from kcache.engines import copying_engine
    from kcache.upkeep.convert import convert_cache

    check_lasting(new)
    try:
        with Report() as report:
            manifest = convert_cache(
                cache, new, form,
                stage=stage, resolution=tuple(resolution or ()), worker=worker, take_over=take_over,
                report=partial(show_build, report), say=report.note, engine=copying_engine(engine, address, worker),
            )  # fmt: skip
    except (KeyboardInterrupt, SystemExit):
        note(f"stopped; what was committed to {new} is kept: run the same command to go on")
        raise
    say_manifest(new, manifest, as_json)
