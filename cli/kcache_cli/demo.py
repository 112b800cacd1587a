"""`kcache demo`: all of it on handwritten digits."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kcache_cli.progress import bytes_text, count_text, duration_text, note, say

if TYPE_CHECKING:
    from kcache.demo.result import DemoResult

__all__ = ["demo"]


def demo(
    *,
    output: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo-out"),
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of each training run.")] = 200,
) -> None:
    """Do all of it on handwritten digits: minutes on two cores.

    Builds a cache, trains both networks from it and without it, draws pictures, and shows what each took. The pictures
    are scans of handwritten digits, coloured; the networks are a tiny Kandinsky 2.2 with random weights. Needs no
    network, but scikit-learn and matplotlib: pip install 'kcache[demo]'

    \b
    Examples:
      kcache demo
      kcache demo --output /tmp/demo --steps 20
    """
    # Networks this small are mostly waiting for each other's threads. Spinning threads make a run several times slower
    # as soon as the machine does anything else, which would compare that and not the two ways of training.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from kcache.demo.run import run_demo

    result = run_demo(output, steps, say=note)
    _print(result)


def _print(result: "DemoResult") -> None:
    table = Table(
        title=f"{result.steps} optimizer steps of {result.batch_size} images", title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("training")
    for heading in ("encoders in the loop", "from the cache", "speed-up", "losses of both"):
        table.add_column(heading, justify="right")
    for stage in result.stages:
        difference = stage.largest_difference
        table.add_row(
            stage.stage,
            f"{stage.online.samples_per_second:,.0f} images/s",
            f"{stage.cached.samples_per_second:,.0f} images/s",
            f"{stage.speedup:.1f} x",
            "equal bit for bit" if difference == 0 else f"within {difference:.1e}",
        )
    Console(width=100).print(table)
    images, captions = count_text(result.images, "picture"), count_text(result.captions, "caption")
    say(f"cache    {images} and {captions}, {bytes_text(result.cache_bytes)}, built in {result.build_seconds:.1f} s")
    say(f"again    {result.rebuild_seconds:.1f} s: 0 to do")
    say(f"all      {duration_text(result.seconds)}")
    say(f"page     {result.picture}")
    note(
        "The networks are tiny and the frozen ones have random weights: the speed-up is this demo's, measured just\n"
        "now on this machine, and the drawn pictures are not meant to be recognisable."
    )
