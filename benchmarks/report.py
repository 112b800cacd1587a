"""One page of tables and pictures from the JSON files of benchmarks/results/.

    python benchmarks/report.py
    python benchmarks/report.py FOLDER

Writes README.md into the folder, and beside it train_step-cpu.png, loader-cpu.png and growth-cpu.png, or -gpu. Numbers
are those of the files; nothing is measured here.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import demo_seeds
from growth import how_it_grows
from measuring.plots import draw_growth, draw_loader, draw_train_steps, draws_per_image, row_label
from measuring.summaries import command, summary

Report = Mapping[str, Any]
TITLES = {
    "train_step": "A training step",
    "inpaint": "A step that trains to fill holes",
    "end_to_end": "A whole training, with the build",
    "build": "Building a cache",
    "loader": "The loader",
    "shapes": "Buckets of shapes",
    "growth": "Growth",
    "parity": "Cached against online",
    "demo": "The demo",
}
"""Heading of each benchmark, in the order of the page."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table: the first column holds names, the others numbers."""
    rule = "|---|" + "---:|" * (len(head) - 1)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows), ""]


def number(value: float | None, form: str = ",.1f", unit: str = "") -> str:
    """`value` in the format `form`; nothing where there is none."""
    return "" if value is None else format(value, form) + unit


def case_title(case: Report) -> str:
    """What a case of the training step was, in words."""
    size = f", {case['resolution']} pixels" if case["resolution"] else ""
    learns = f"LoRA rank {case['lora_rank']}" if case["lora_rank"] else "whole network"
    return f"{case['model_size']} {case['stage']}{size}, batch size {case['batch_size']}, {learns}"


def train_step_lines(report: Report) -> list[str]:
    """A table for each case."""
    lines = []
    for case in report["results"]:
        lines += [f"**{case_title(case)}**, mixed precision {case['mixed_precision']}, {case['workers']} workers", ""]
        if "out_of_memory" in case:
            lines += ["Out of memory.", ""]
            continue
        lines += way_lines(case) + lever_lines(case)
    return lines


def way_lines(case: Report) -> list[str]:
    """How fast each way of a case is; in draws of noise where ways take different numbers of them."""
    slow = sorted({name for ups in case["speed_up"].values() for name in ups})
    several = any(draws_per_image(row) > 1 for row in case["ways"].values())
    head = ["", "images/s", "step, ms", "waiting", "of compute only", "GPU busy", "peak memory, GB", "first loss"]
    threads = any(row.get("threads") for row in case["ways"].values())
    head += ["threads"] * threads + ["draws/s"] * several + [f"against {name}{', draws/s' * several}" for name in slow]
    rows = []
    for name, row in case["ways"].items():
        peak, draws = row.get("peak_memory_bytes"), draws_per_image(row)
        cells = [row_label(case, name), number(row["images_per_second"]), number(row["step_milliseconds"])]
        # What computes alone takes one draw.
        cells += [number(row.get("waiting_share"), ".1%"), number(row.get("of_compute_only"), ".3f") * (draws == 1)]
        cells += [number(row["gpu_busy_share"], ".1%"), number(None if peak is None else peak / 1e9, ".2f")]
        cells.append(number(row.get("loss"), ".5f"))
        cells += [number(row.get("threads"), "d")] * threads + [number(draws * row["images_per_second"])] * several
        ups = case["speed_up"].get(name, {})
        cells += [number(draws * ups[other] if other in ups else None, ".2f", "×") for other in slow]
        rows.append(cells)
    if upstream := case.get("upstream"):
        told = [number(upstream.get("images_per_second")), number(upstream.get("step_milliseconds"))]
        workers = f", {counted} workers" if (counted := upstream.get("dataloader_num_workers")) is not None else ""
        rows.append([f"upstream's script{workers}", *told, *[""] * (len(head) - 3)])
    note = "Ways are compared by draws of noise, images times draws of each; the draws of an image share its caption."
    return table(head, rows) + ([note, ""] if several else [])


def lever_lines(case: Report) -> list[str]:
    """Where the time of a plain step and of one with each lever goes, where that was looked at."""
    looked = {name: row for name, row in case["ways"].items() if "kernel_milliseconds" in row}
    rows = [
        [
            row_label(case, name), *(number(spent) for spent in row["kernel_milliseconds"].values()),
            number(row["teraflops"], ",.2f"), number(row["of_peak"], ".1%"), number(row["first_steps_seconds"]),
        ]
        for name, row in looked.items()
    ]  # fmt: skip
    kinds = [f"{kind}, ms" for row in list(looked.values())[:1] for kind in row["kernel_milliseconds"]]
    head = ["of a step", *kinds, "TFLOP/s", "of the peak", "first two steps, s"]
    failed = [f"{name} failed: {reason}" for name, reason in case.get("failed", {}).items()]
    return (table(head, rows) if rows else []) + [line for text in failed for line in (text, "")]


def end_to_end_lines(report: Report) -> list[str]:
    """What was measured, then what is extrapolated."""
    results, settings = report["results"], report["settings"]
    totals: Mapping[str, Mapping[str, float]] = results["extrapolated_seconds"]
    epochs = list(next(iter(totals.values())))
    lines = [
        f"**{settings['model_size']} {settings['stage']}**, {settings['images']} images, {settings['epochs']} and "
        f"{2 * settings['epochs']} epochs measured; the build took {results['build_seconds']} s. Totals with the build "
        "are extrapolated linearly.",
        "",
    ]
    rows = []
    for way, row in results["ways"].items():
        even = "" if way == "cached" else number(results["break_even_epochs"][way], ".2f") or "never"
        cells = [way, number(row["epoch_seconds"], ".3f"), number(row["epoch_cost"], ".3g"), even]
        rows.append([*cells, *(number(totals[way][count]) for count in epochs)])
    head = ["", "epoch, s", "cost of an epoch", "paid back after", *(f"{count} epochs, s" for count in epochs)]
    return lines + table(head, rows)


def build_lines(report: Report) -> list[str]:
    """Tables and whole builds."""
    rows = [
        [
            name, *(number(rate) for rate in row["rows_per_second"].values()), number(row["of_encoder_alone"], ".3f"),
            *(number(share, ".1%") for share in row["shares"].values()),
            ", ".join(number(spent, ",.2f") for spent in row.get("cpu_milliseconds_per_row", {}).values()),
        ]
        for name, row in report["results"]["tables"].items()
    ]  # fmt: skip
    head = ["rows/s", "encoder alone", "decoding alone", "build", "of encoder alone", "waits for inputs", "encodes"]
    lines = table([*head, "waits for the disk", "CPU of a row, ms: encoder, decoding, build"], rows)
    rows = [
        [form, number(row["seconds"], ".2f"), number(row["images_per_second"]), number(row["of_encoders_alone"], ".3f")]
        for form, row in report["results"]["builds"].items()
    ]
    lines += table(["whole build", "seconds", "images/s", "of encoders alone"], rows)
    levers = report["results"].get("levers", {}).values()
    rates = [[way, number(rate)] for lever in levers for way, rate in lever["rows_per_second"].items()]
    return lines + (table(["way to encode", "rows/s"], rates) if rates else [])


def loader_lines(report: Report) -> list[str]:
    """A table for each form of a cache."""
    lines = []
    for form, ways in report["results"].items():
        rows = [
            [
                name, number(row["rows_per_second"], ",.0f"), number(row["gigabytes_per_second"], ".2f"),
                number(row["cpu_seconds_per_gigabyte"], ".3f"), number(row["ratio"], ".3f"),
            ]
            for name, row in ways.items()
        ]  # fmt: skip
        lines += table([form, "rows/s", "GB/s", "CPU s/GB", "of the first"], rows)
    return lines


def shapes_lines(report: Report) -> list[str]:
    """Passes alone, epochs beside what foretells them, and what is waited for."""
    results = report["results"]
    rows = [
        [
            "×".join(map(str, row["shape"])), number(row["samples"], ",d"), number(row["batch"], "d"),
            number(row["milliseconds"]), " to ".join(map(number, row["milliseconds_range"])),
            number(row["nanoseconds_per_pixel"]),
        ]
        for row in results["shapes"]
    ]  # fmt: skip
    lines = table(["height×width", "pictures", "a pass", "alone, ms", "turns, ms", "a pixel, ns"], rows)
    rows = [
        [
            str(epoch + 1), number(row["passes"], "d"), number(row["seconds"], ".2f"),
            number(row["by_passes_seconds"], ".2f"), number(row["by_area_seconds"], ".2f"),
            number(row["waiting_share"], ".2%"), number(row["loss"], ".5f"),
        ]
        for epoch, row in enumerate(results["epochs"])
    ]  # fmt: skip
    lines += table(["epoch", "passes", "seconds", "by passes, s", "by area, s", "waiting", "loss"], rows)
    by_passes, by_area = (results["of_foretold"][way]["median"] for way in ("by_passes", "by_area"))
    lines += [f"An epoch takes {by_passes:.3f} of what its passes take alone, {by_area:.3f} of what its area says.", ""]
    rows = [
        [
            f"{kind}, {residency}", number(row.get("waiting_share"), ".2%"), number(row.get("milliseconds")),
            number(row.get("sizes"), "d"), number(row.get("loss"), ".5f"), row.get("failed", ""),
        ]
        for kind, ways in results["waits"].items()
        for residency, row in ways.items()
    ]  # fmt: skip
    return lines + table(["", "waiting", "a pass, ms", "sizes", "loss", "failed"], rows)


def inpaint_lines(report: Report) -> list[str]:
    """Both steps, and what the one takes of the other."""
    results = report["results"]
    rows = [
        [
            name, number(row["milliseconds"]), " to ".join(map(number, row["milliseconds_range"])),
            number(row["waiting_share"], ".2%"), number(row["loss"], ".5f"),
        ]
        for name, row in results["ways"].items()
    ]  # fmt: skip
    rounds = ", ".join(number(each, ".3f") for each in results["of_plain"]["rounds"])
    masks = number(results["masks_milliseconds"], ".2f")
    told = f"{results['of_plain']['median']:.3f} of a plain step ({rounds}); a batch of masks takes {masks} ms, ahead."
    return [*table(["", "step, ms", "turns, ms", "waiting", "first loss"], rows), told, ""]


def growth_lines(report: Report) -> list[str]:
    """Sizes, then verdicts."""
    rows = [
        [
            f"{size['samples']:,} rows, {residency}", number(size["bytes"] / 1e6), number(row["open_seconds"] * 1e3),
            number(row["first_batch_seconds"] * 1e3), number(row["memory_bytes"] / 1e6),
            number(row["batch_milliseconds"], ".3f"),
        ]
        for size in report["results"]["sizes"]
        for residency, row in size["residencies"].items()
    ]  # fmt: skip
    lines = table(["", "cache, MB", "open, ms", "first batch, ms", "memory, MB", "batch, ms"], rows)
    growth = report["results"]["growth"].items()
    rows = [[name, how_it_grows(row["slope"]), f"{row['slope']}", f"{row['slope_over_all']}"] for name, row in growth]
    return lines + table(["", "grows", "slope at the end", "slope over all"], rows)


def parity_lines(report: Report) -> list[str]:
    """Largest differences, by precision."""
    pairs = ("against online", "against float32 online")
    rows = [
        [
            f"{row['stage']}, {row['encoders']} encoders, {row['rows']} rows",
            *(f"{row[pair][what]:.1e}" for pair in pairs for what in ("loss", "weight")),
        ]
        for row in report["results"]
    ]
    return table(["", *(f"{what}, {pair}" for pair in pairs for what in ("loss", "weight"))], rows)


def demo_lines(report: Report) -> list[str]:
    """What each demo reached, in per cent and root mean squared differences of pixels."""
    results = report["results"]
    lines = table(demo_seeds.HEAD, [demo_seeds.row(name, found) for name, found in results.items()])
    far = {name: found.get("largest_difference_of_losses") for name, found in results.items()}
    same = [
        f"{name}: losses differ by at most {apart} from those from zarr."
        for name, apart in far.items()
        if apart is not None
    ]
    return [*lines, *(["", *same] if same else [])]


LINES: dict[str, Callable[[Report], list[str]]] = {
    "train_step": train_step_lines,
    "inpaint": inpaint_lines,
    "end_to_end": end_to_end_lines,
    "build": build_lines,
    "loader": loader_lines,
    "shapes": shapes_lines,
    "growth": growth_lines,
    "parity": parity_lines,
    "demo": demo_lines,
}


def page(found: Mapping[Path, Report], pictures: Sequence[Path]) -> str:
    """The page of all `found` reports, with `pictures` where they belong."""
    lines = ["# What was measured", "", "Written by `python benchmarks/report.py` from the JSON files beside it.", ""]
    for benchmark, title in TITLES.items():
        for kind in ("gpu", "cpu"):
            files = [path for path in found if is_of(path, found[path], benchmark, kind)]
            if not files:
                continue
            lines += [f"## {title}, {kind.upper()}", ""]
            lines += [f"![{title}]({path.name})\n" for path in pictures if path.stem == f"{benchmark}-{kind}"]
            for path in files:
                facts = ", ".join(f"{name} {value}" for name, value in found[path]["machine"].items())
                lines += [f"[{path.name}]({path.name}): {facts}.", ""]
                lines += [f"`{command(name_of(path), found[path], path.name)}`", ""]
                lines += LINES[benchmark](found[path])
    others = [path for path in found if found[path].get("benchmark") not in TITLES]
    if others:
        lines += ["## In one line each", "", *(line for path in others for line in one_line(path, found[path])), ""]
    return "\n".join(lines)


def one_line(path: Path, report: Report) -> list[str]:
    """An item of a list: what was found, when, of which commit, and by which command."""
    facts = report.get("machine", report)
    where = f"{facts.get('gpu') or facts['cpu']}, {facts['date']}, commit {facts['commit']}"
    told = [f"- [{path.name}]({path.name}): {summary(name_of(path), report)}".rstrip(": ")]
    return [*told, f"  {where}:", f"  `{command(name_of(path), report, path.name)}`"]


def name_of(path: Path) -> str:
    """What a result is called: its file, without the device."""
    return path.stem.removesuffix("-cpu").removesuffix("-gpu")


def is_of(path: Path, report: Report, benchmark: str, kind: str) -> bool:
    """Whether the report at `path` is of `benchmark` on `kind`, "cpu" or "gpu"."""
    return report.get("benchmark") == benchmark and path.stem.endswith(f"-{kind}")


def order(path: Path) -> tuple[bool, bool, bool, str]:
    """The prior first, whole networks before adapters, and levers behind all."""
    return "levers" in path.stem, "decoder" in path.stem, "lora" in path.stem, path.name


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "results")
    folder = parser.parse_args(given).folder
    paths = sorted(folder.glob("*.json"), key=order)
    found = {path: json.loads(path.read_text()) for path in paths}
    pictures = []
    for benchmark, draw in (("train_step", draw_train_steps), ("loader", draw_loader), ("growth", draw_growth)):
        for kind in ("gpu", "cpu"):
            reports = [report for path, report in found.items() if is_of(path, report, benchmark, kind)]
            reports = [report for report in reports if not report["settings"].get("cold")]
            if reports:
                pictures.append(folder / f"{benchmark}-{kind}.png")
                draw(reports, pictures[-1])
    pictures += folder.glob("demo-*.png")
    (folder / "README.md").write_text(page(found, pictures), encoding="utf-8")
    for path in (folder / "README.md", *pictures):
        print(path)


if __name__ == "__main__":
    main()
