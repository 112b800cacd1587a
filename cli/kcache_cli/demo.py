"""`kcache demo`: all of it on handwritten digits."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kcache.errors import ConfigError
from kcache.tally import counted
from kcache_cli.flags import check_folder
from kcache_cli.progress import bytes_text, duration_text, note, say

if TYPE_CHECKING:
    from kcache.demo.holes.run import HolesResult
    from kcache.demo.keeping.run import KeepingResult
    from kcache.demo.result import DemoResult, ExamResult
    from kcache.demo.shapes import ShapesResult


def demo(
    *,
    output: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo-out"),
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Train a fifth as long: about a minute, softer pictures, a third wrong."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Decides first weights, order and noise.")] = 0,
    format: Annotated[Literal["zarr", "webdataset"], typer.Option(help="Form of the cache.")] = "zarr",
    online: Annotated[
        bool, typer.Option("--online", help="Train with the encoders in the loop, and compare with the cache.")
    ] = False,
    shapes: Annotated[
        bool,
        typer.Option("--shapes", help="Train on buckets and on squares of lying and standing paper; draw at 3 shapes."),
    ] = False,
    inpaint: Annotated[
        bool,
        typer.Option("--inpaint", help="Train a decoder to fill holes from the cache of a plain one; repaint digits."),
    ] = False,
    preserve: Annotated[
        bool,
        typer.Option("--preserve", help="Teach a prior a new style by 20 pictures, with class rows and without."),
    ] = False,
) -> None:
    """Do all of it on handwritten digits: some three minutes.

    Builds a cache, trains both networks from it, and for some steps without it, then draws digits in inks they were
    never seen in and judges the pictures. The networks are a tiny Kandinsky 2.2 whose frozen encoders come trained.
    Needs no network. Writes report.html, demo.png and result.json, beside all that was trained and drawn.

    \b
    Examples:
      kcache demo
      kcache demo --quick --output /tmp/demo
      kcache demo --shapes
      kcache demo --inpaint
      kcache demo --preserve
    """
    check_folder("--output", output)
    others = [flag for flag, on in (("--shapes", shapes), ("--inpaint", inpaint), ("--preserve", preserve)) if on]
    if len(others) > 1:
        raise ConfigError(f"{' and '.join(others)} are several demos; expected one of them; leave the others out")
    if others and (online or format != "zarr"):
        raise ConfigError(f"{others[0]} was given with --online or --format; expected it alone; leave these out")
    # In networks this small, threads mostly wait for each other: spinning, which beside anything else on the machine
    # makes a step several times slower, or asleep, which does so always. One thread takes the same time either way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from kcache.demo.folder import take_folder

    take_folder(output)
    note("loading torch, diffusers and transformers")
    if shapes:
        from kcache.demo import shapes as papers

        _print_shapes(papers.run_shapes(output, papers.QUICK if quick else papers.WHOLE, say=note, seed=seed), output)
        return
    if inpaint:
        from kcache.demo.holes import run as holes

        _print_holes(holes.run_holes(output, holes.QUICK if quick else holes.WHOLE, say=note, seed=seed), output)
        return
    if preserve:
        from kcache.demo.keeping import run as keeping

        size = keeping.QUICK if quick else keeping.WHOLE
        _print_keeping(keeping.run_keeping(output, size, say=note, seed=seed), output)
        return
    from kcache.demo.run import QUICK, WHOLE, run_demo

    result = run_demo(output, QUICK if quick else WHOLE, say=note, seed=seed, format=format, online=online)
    _print(result, output)


def _print_shapes(result: "ShapesResult", output: Path) -> None:
    from kcache.demo.shapes import ratio_of

    title = "Digits in inks they were never seen in, right in %"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("paper", "trained on"):
        table.add_column(heading)
    for heading in ("digit", "ink", "paper", "whole", "centred", "all five"):
        table.add_column(heading, justify="right")
    for scores in zip(*result.scores.values(), strict=True):
        for way, score in zip(result.scores, scores, strict=True):
            table.add_row(ratio_of(score.shape), way, *score.cells)
    Console(width=100).print(table)
    _print_times(result.seconds, output / "shapes.png")


def _print_holes(result: "HolesResult", output: Path) -> None:
    title = "Holes filled with digits in inks they were never seen in, right in %; paper off its course in %"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("asked for", "filled by"):
        table.add_column(heading)
    for heading in ("digit", "ink", "paper", "all three", "seamless", "all four", "off"):
        table.add_column(heading, justify="right")
    for task, of_task in result.scores.items():
        for way, score in of_task.items():
            table.add_row(task, way, *score.cells)
    Console(width=130).print(table)
    for way, same in result.kept.same_latents.items():
        say(f"{way}: the latents that are kept are {'those of the picture, bit for bit' if same else 'CHANGED'}")
    told = "; ".join(f"{way} {levels:.1f}" for way, levels in result.kept.levels.items())
    say(f"pixels that are kept, levels of 255 from the picture that was given: {told}")
    told = "; ".join(f"{way} {levels:.1f}" for way, levels in result.kept.put_back.items())
    say(f"the same where the picture's own are put back, softly where they meet what was drawn: {told}")
    say(f"the cache is {'the same, byte for byte' if result.same_cache else 'CHANGED'}: nothing was encoded for holes")
    _print_times(result.seconds, output / "inpaint.png")


def _print_keeping(result: "KeepingResult", output: Path) -> None:
    title = "Pictures of old and new by priors before and after a new style was learnt, right in %"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("prior", "asked for"):
        table.add_column(heading)
    for heading in ("digit", "ink", "paper", "all three"):
        table.add_column(heading, justify="right")
    for way, of_way in result.scores.items():
        for name, score in of_way.items():
            table.add_row(way, name, *score.cells)
    Console(width=100).print(table)
    _print_times(result.seconds, output / "preserve.png")


def _print_times(seconds: Mapping[str, float], picture: Path) -> None:
    for name, spent in seconds.items():
        say(f"{name:20} {duration_text(spent)}")
    say(f"{'all':20} {duration_text(sum(seconds.values()))}")
    say(f"{'picture':20} {picture}")


def _print(result: "DemoResult", output: Path) -> None:
    console = Console(width=100)
    console.print(_speeds(result))
    console.print(_scores(result.exam))
    images, captions = counted(result.images, "picture"), counted(result.captions, "caption")
    say(f"cache    {images} and {captions}, {bytes_text(result.cache_bytes)}, built in {result.build_seconds:.1f} s")
    say(f"again    {result.rebuild_seconds:.1f} s: 0 to do")
    for stage in result.stages:
        say(f"{stage.stage:8} {counted(stage.steps, 'step')} in {duration_text(result.seconds[stage.stage])}")
    say(f"all      {duration_text(result.total_seconds)}")
    say(f"page     {output / 'report.html'}")
    note(
        "The networks are tiny: the speed-up is this demo's, measured just now on this machine. The frozen encoders\n"
        "were trained beforehand on all combinations of digit, ink and paper; what was trained here saw no such prompt."
    )


def _speeds(result: "DemoResult") -> Table:
    table = Table(title="Training, images per second", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for heading in ("batch", "encoders in the loop", "from the cache", "speed-up", "losses of both"):
        table.add_column(heading, justify="right")
    for stage in result.stages:
        table.add_row(
            stage.stage,
            f"{stage.batch_size}",
            f"{stage.online.samples_per_second:,.0f}",
            f"{stage.cached.samples_per_second:,.0f}",
            f"{stage.speedup:.1f} x",
            f"{stage.equality}, {stage.repeated} steps",
        )
    return table


def _scores(exam: "ExamResult") -> Table:
    title = f"{exam.pictures} pictures of digits in inks they were never seen in, right in %"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for heading in ("digit", "ink", "paper", "all three"):
        table.add_column(heading, justify="right")
    for name, score in exam.compared.items():
        table.add_row(name, *score.cells)
    return table
