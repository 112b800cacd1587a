"""`kcache report`: a run or a cache as one HTML file."""

import dataclasses
import json
from typing import Annotated, Any

import typer

from kcache.config import SourceConfig
from kcache_cli.flags import with_flags
from kcache_cli.progress import Report, say, show_counts


@with_flags(SourceConfig)
def report(
    path: Annotated[
        str, typer.Argument(metavar="RUN_OR_CACHE", help="A run directory, or the folder or URL of a cache.")
    ],
    *,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The HTML file. When left out: RUN/report.html, or CACHE-report.html beside a cache, of a URL here.",
        ),
    ] = None,
    neighbours: Annotated[
        bool,
        typer.Option("--neighbours", help="Of a run: name the cached pictures that its newest ones look most like."),
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Of a cache: show originals from where it was built, as for cache-build."),
    ] = None,
    pretrained_decoder_model_name_or_path: Annotated[
        str | None, typer.Option(help="Of a cache: decode some latents by movq of this folder or Hub id.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where networks run for that, such as cuda:0.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **reading: Any,
) -> None:
    """Write a report of a run or a cache: one HTML file, to open, mail and keep.

    It needs no network and runs no scripts. Of a run it shows settings, curves, pictures, speed and the machine; of a
    cache its samples, how its values spread, what was rejected and why, and its tables.

    \b
    Examples:
      kcache report runs/prior
      kcache report runs/prior --neighbours --output prior.html
      kcache report caches/photos-768
      kcache report caches/photos-768 --source photos/ --pretrained-decoder-model-name-or-path models/decoder
    """
    from kcache.report.cache import ReportConfig
    from kcache.report.write import write_report

    config = ReportConfig(
        path=path,
        output=output,
        neighbours=neighbours,
        source=source,
        pretrained_decoder_model_name_or_path=pretrained_decoder_model_name_or_path,
        reading=SourceConfig(**reading),
        device=device,
    )
    with Report() as progress:
        written = write_report(config, show_counts(progress, "for the report"))
    say(json.dumps(dataclasses.asdict(written), indent=2) if as_json else written.report)
