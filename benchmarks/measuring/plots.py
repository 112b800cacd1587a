"""The pictures of `report.py`: bars of training steps, dots of readers, curves of growth.

Each is as wide as a repository's page shows it, about 830 pixels, so that ten points stay ten points.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growth import FLAT, LINEAR, how_it_grows

from kcache.report.figures import LOOK, RED, TEAL, TEXT, png_of

if TYPE_CHECKING:  # it is loaded where it is drawn with
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Report = Mapping[str, Any]
WIDTH, DPI = 8.3, 160
"""Inches, of which a page shows each with some 100 pixels, and the pixels that are in the file."""
FAINT = "#59616a"
"""Darker than elsewhere: a repository's page shows these small."""
COLORS = {"cached": TEAL, "online": RED, "compute only": "#b8bec5", "encoders only": "#f2b134"}
"""Of the ways of a training step, by how their names begin."""
OURS, BASELINE, OTHERS = TEAL, "#8f979f", "#e07a3f"
"""Of the loader, of gathers from memory and sequential reads, and of other readers."""
RESIDENCIES = {"mmap": TEAL, "ram": "#e07a3f"}
STYLE = LOOK | {
    "font.size": 10, "axes.edgecolor": FAINT, "grid.linewidth": 0.8, "legend.fontsize": 10,
    "xtick.color": FAINT, "xtick.labelsize": 10, "ytick.color": FAINT, "ytick.labelsize": 10,
}  # fmt: skip
QUANTITIES = {
    "bytes": ("Size on disk, MB", 1e6),
    "open_seconds": ("Opening, ms", 1e-3),
    "first_batch_seconds": ("First batch, ms", 1e-3),
    "memory_bytes": ("Memory of its own, MB", 1e6),
    "batch_milliseconds": ("Any later batch, ms", 1.0),
}


def draws_per_image(row: Report) -> int:
    """How many draws of noise a way of the training step takes of each image."""
    return round(row["draws_per_second"] / row["images_per_second"]) if "draws_per_second" in row else 1


def row_label(case: Report, name: str) -> str:
    """Name of a way of the training step, with what a step of it computes where that is more than a batch."""
    draws = draws_per_image(case["ways"][name])
    return name if draws == 1 else f"{name} ({draws * case['batch_size']} draws a step)"


def draw_train_steps(reports: Sequence[Report], path: Path) -> None:
    """Images per second of every way, or draws of noise where ways differ in them; one panel per case that ran."""
    cases = [(report, case) for report in reports for case in report["results"] if "ways" in case]
    if not cases:
        return
    pairs = [cases[i : i + 2] for i in range(0, len(cases), 2)]
    heights = [max(_bars_height(case, _characters(pair)) for _, case in pair) for pair in pairs]

    def draw(figure: "Figure") -> None:
        grid = figure.add_gridspec(len(pairs), 2, height_ratios=heights)
        for i, pair in enumerate(pairs):
            for j, (report, case) in enumerate(pair):
                place = figure.add_subfigure(grid[i, j] if len(pair) == 2 else grid[i, :])
                _draw_case(place, report, case, _characters(pair))

    _write(path, draw, sum(heights), "A training step", reports)


def _characters(pair: Sequence[Any]) -> int:
    """How long the lines of names may be: the last panel has its row to itself when their number is odd."""
    return 28 if len(pair) == 2 else 44


def _bars_height(case: Report, characters: int) -> float:
    """Inches that the panel of a case takes."""
    lines = max(_wrapped(row_label(case, name), characters).count("\n") + 1 for name in case["ways"])
    return (len(case["ways"]) + ("upstream" in case)) * (0.12 + 0.18 * lines) + 1.3


def _draw_case(place: "SubFigure", report: Report, case: Report, characters: int) -> None:
    size = f" @{case['resolution']}" if case["resolution"] else ""
    learns = f"LoRA {case['lora_rank']}" if case["lora_rank"] else "whole network"
    ax = _panel(place, f"{case['model_size']} {case['stage']}{size}, batch {case['batch_size']}, {learns}", report)
    rates = {
        row_label(case, name): row["images_per_second"] * draws_per_image(row) for name, row in case["ways"].items()
    }
    if "images_per_second" in case.get("upstream", {}):
        rates["upstream's script"] = case["upstream"]["images_per_second"]
    colors = [next((color for start, color in COLORS.items() if name.startswith(start)), OTHERS) for name in rates]
    several = any(draws_per_image(row) > 1 for row in case["ways"].values())
    ax.set_xlabel("draws of noise per second" if several else "images per second")
    bars = ax.barh(_names(ax, rates, characters), list(rates.values()), color=colors)
    ax.bar_label(bars, [_digits(rate) for rate in rates.values()], padding=3)
    ax.margins(x=0.22)


def draw_loader(reports: Sequence[Report], path: Path) -> None:
    """Rows per second of every reader, one panel per form of a cache; dots, as a logarithmic axis has no zero."""
    forms = [(report, form, ways) for report in reports for form, ways in report["results"].items()]

    def draw(figure: "Figure") -> None:
        places = figure.subfigures(1, len(forms), squeeze=False)[0]
        for place, (report, form, ways) in zip(places, forms, strict=True):
            ax = _panel(place, form, report)
            rates = [row["rows_per_second"] for row in ways.values()]
            ax.scatter(rates, _names(ax, ways), s=45, color=[_reader_color(name) for name in ways], zorder=2)
            for row, rate in enumerate(rates):
                ax.annotate(_digits(rate), (rate, row), xytext=(7, 0), textcoords="offset points", va="center")
            ax.set_xscale("log")
            ax.set_xlim(min(rates) / 2, max(rates) * (max(rates) / min(rates)) ** 0.4 * 2)  # room for the numbers
            ax.set_xlabel("rows per second, logarithmic")
            ax.xaxis.set_major_formatter(_engineering())
            ax.grid(visible=True)

    height = 0.3 * max(len(ways) for _, _, ways in forms) + 1.6
    _write(path, draw, height, "The loader beside other readers", reports)


def draw_growth(reports: Sequence[Report], path: Path) -> None:
    """Every quantity over the number of rows of the largest run, both axes logarithmic, and how it grows at the end."""
    report = max(reports, key=lambda report: report["results"]["sizes"][-1]["samples"])
    sizes, growth = report["results"]["sizes"], report["results"]["growth"]
    samples = [size["samples"] for size in sizes]

    def draw(figure: "Figure") -> None:
        *axes, last = figure.subplots(2, 3).flatten()
        for ax, (name, (title, scale)) in zip(axes, QUANTITIES.items(), strict=True):
            ax.set_title(title)
            for residency, color in RESIDENCIES.items():
                whole = name in growth  # the same, whatever the residency
                values = [size[name] if whole else size["residencies"][residency][name] for size in sizes]
                word = how_it_grows(growth[name if whole else f"{residency}, {name}"]["slope"])
                label = word if whole else f"{residency}: {word}"
                ax.plot(samples, [value / scale for value in values], "o-", color=color, label=label)
                if whole:
                    break
            ax.set(xscale="log", yscale="log", xlabel="rows")
            low, high = ax.get_ylim()
            ax.set_ylim(low, high * (high / low) ** 0.5)  # room for the words
            ax.xaxis.set_major_formatter(_engineering())
            ax.yaxis.set_major_formatter("{x:,.10g}")
            ax.grid(visible=True)
            ax.legend(loc="upper left", handlelength=1.2, borderaxespad=0.2)
        last.axis("off")
        told = f"Flat: a slope of up to {FLAT} between the two largest caches. Linear: from {LINEAR} on."
        facts = f"{report['machine']['date']}, commit {report['machine']['commit']}."
        last.text(0, 0.95, f"{textwrap.fill(told, 30)}\n\n{facts}", va="top", fontsize=10)

    _write(path, draw, 5.6, "What grows with a cache", [report])


def _write(path: Path, draw: Callable[["Figure"], None], height: float, title: str, reports: Sequence[Report]) -> None:
    """Write a figure of that height and title as a PNG."""
    machines = dict.fromkeys(report["machine"].get("gpu") or report["machine"]["cpu"] for report in reports)

    def draw_all(figure: "Figure") -> None:
        figure.suptitle(f"{title}: {'; '.join(machines)}", x=0.01, ha="left", fontsize=11, fontweight="bold")
        draw(figure)

    path.write_bytes(png_of(draw_all, WIDTH, height, dpi=DPI, look=STYLE))


def _panel(place: "SubFigure", title: str, report: Report) -> "Axes":
    """Axes of their own margins, with a title and when and of which commit it was measured."""
    place.suptitle(title, x=0.02, ha="left", fontsize=10, fontweight="bold")
    ax = place.subplots()
    facts = f"{report['machine']['date']}, commit {report['machine']['commit']}"
    ax.set_title(facts, fontsize=9, fontweight="normal", color=FAINT)
    return ax


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _names(ax: "Axes", names: Mapping[str, Any], characters: int = 28) -> range:
    """One row per name, the first on top, in lines of so many characters; returns the places of the rows."""
    places = range(len(names))
    ax.set_yticks(places, [_wrapped(name, characters) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0, labelcolor=TEXT)
    return places


def _wrapped(name: str, characters: int) -> str:
    """`name` in lines; what is in brackets begins one."""
    return "\n".join(textwrap.fill(part, characters) for part in name.replace(" (", "\n(").splitlines())


def _digits(value: float) -> str:
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _reader_color(name: str) -> str:
    if name.startswith("loader"):
        return OURS
    return BASELINE if name.startswith(("gather", "files", "plain")) else OTHERS
