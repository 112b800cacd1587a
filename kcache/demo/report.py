"""The demo as one HTML page that needs nothing else: what was asked, what came out, how fast, and what knew what."""

from pathlib import Path

from kcache.demo.picture import draw_part, show_drawn, show_inputs, show_learning, show_measurements, show_time
from kcache.demo.result import DemoResult
from kcache.demo.tiny import WEIGHTS
from kcache.report.page import Section, Table, Text, write_page


def write_report(result: DemoResult, path: Path) -> None:
    """Write the page to `path`; raises CacheWriteError when it cannot be written."""
    write_page(
        path,
        "kcache: encode once, train many times",
        [_outcome(result), _learning(result), _measured(result), _inputs(result)],
    )


def _knowledge(result: DemoResult) -> str:
    if result.encoders == WEIGHTS:
        encoders = (
            "which come trained, had seen all 240 combinations of digit, ink and paper, as the published encoders have "
            "seen nearly everything, but none of the scans kept for tests"
        )
    else:
        encoders = f"those of {result.encoders}, had seen what its training.json says"
    return (
        f"What each network had seen. The frozen encoders, {encoders}. The prior and the decoder, trained here from "
        "random weights, never saw the 40 combinations asked for: no green five on any paper. The judges of digits "
        "know only the real scans that the networks learned from, and no drawn picture."
    )


def _outcome(result: DemoResult) -> Section:
    exam, samples = result.exam, result.size.samples
    variety = (("drawn", exam.drawn_variety), ("unseen real scans", exam.real_variety))
    return Section(
        title="What came out",
        blocks=[
            Text(
                text=f"{exam.pictures} pictures of {len(exam.drawn)} prompts whose digit and ink never went together "
                "in training, drawn by the stock pipelines and judged from their pixels."
            ),
            Table(
                head=["right in per cent", "digit", "ink", "paper", "all three"],
                rows=[[name, *one.cells] for name, one in exam.compared.items()],
            ),
            Text(text=_knowledge(result)),
            draw_part(
                lambda panel, result: show_drawn(panel, result, samples), samples + 0.6, result,
                f"{samples} pictures of one prompt for each digit, all from different noise, none picked out.",
            ),
            Table(
                head=["digits right in per cent, by judge", "drawn", "unseen real scans through the MoVQ"],
                rows=[[one.judge, f"{one.drawn:.1f}", f"{one.ceiling:.1f}"] for one in exam.judges],
            ),
            Text(
                text="Are they copies? How far pictures are from each other and from the nearest scan that was "
                "there to learn from: root mean squares of how much ink covers each of a scan's 64 pixels, from 0 to 1."
            ),
            Table(
                head=["", "two pictures of a prompt", "to the nearest known scan"],
                rows=[[name, f"{one.spread:.3f}", f"{one.to_known:.3f}"] for name, one in variety],
            ),
        ],
    )  # fmt: skip


def _learning(result: DemoResult) -> Section:
    caption = "The same prompts from the same noise after so many optimizer steps."
    drawn = draw_part(show_learning, len(result.looks) + 0.6, result, caption)
    return Section(title="While the decoder learned", blocks=[drawn])


def _measured(result: DemoResult) -> Section:
    return Section(
        title="From the cache, and with the encoders in the loop",
        blocks=[
            Table(
                head=[
                    "images per second", "batch size", "encoders in the loop", "from the cache", "times as fast",
                    "losses of both",
                ],
                rows=[
                    [
                        stage.stage, f"{stage.batch_size}", f"{stage.online.samples_per_second:,.0f}",
                        f"{stage.cached.samples_per_second:,.0f}", f"{stage.speedup:.1f}",
                        f"{stage.equality} over {stage.repeated} steps",
                    ]
                    for stage in result.stages
                ],
            ),
            draw_part(
                show_measurements, 2.75, result,
                "Losses and speed of both stages; the shorter run lies below the other.",
            ),
            draw_part(show_time, 0.95, result, "The comparison is the second training of both stages' first steps."),
        ],
    )  # fmt: skip


def _inputs(result: DemoResult) -> Section:
    return Section(
        title="What went in",
        blocks=[
            Text(
                text=f"{result.images:,} pictures and {result.captions:,} captions, encoded in "
                f"{result.build_seconds:.1f} s into {result.cache_bytes / 1e6:.1f} MB ({result.format}); building "
                f"again took {result.rebuild_seconds:.1f} s. The digits are scans by E. Alpaydin and C. Kaynak, "
                "Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998, CC BY 4.0, coloured."
            ),
            draw_part(show_inputs, 1.75, result, "One of each digit, with a caption."),
        ],
    )
