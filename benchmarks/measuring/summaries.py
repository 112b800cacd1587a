"""What `report.py` says in one line of results that have no table: what was found, and the command for it.

Results are named as their files are, without the device: "kills" for kills-cpu.json. All numbers are the files' own.
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

Report = Mapping[str, Any]
FOLDER = "benchmarks/results"


def command(name: str, report: Report, file: str) -> str:
    """What to type to measure the report called `name` once more: as it was noted, or by its settings."""
    if "command" in report:
        threads = report["machine"].get("omp_wait_policy", "not set")
        return report["command"] if threads == "not set" else f"OMP_WAIT_POLICY={threads} {report['command']}"
    script = f"python benchmarks/{name}.py"
    if name == "estimate":
        (side,) = {table.split("-")[1] for row in report["results"] for table in row["tables"] if "-" in table}
        return f"{script} FOLDER --samples {report['samples']} --resolution {side} > {FOLDER}/{file}"
    if name in ("kills", "bucket_kills"):
        return f"{script} {options(report['arguments'])} > {FOLDER}/{file}"
    settings = dict(report.get("settings", {}))
    if name == "scale":
        settings = {
            "samples": report["results"]["large cache"]["samples"],
            "pictures": report["results"]["nothing to do"]["samples"],
        }
    return f"{script} {options(settings)} --output {FOLDER}/{file}"


def options(settings: Mapping[str, Any]) -> str:
    """`settings` as options of a command; those that are off are left out."""
    words = []
    for name, value in settings.items():
        if value is not None and value is not False:  # 0 is a value
            given = " ".join(map(str, value)) if isinstance(value, list) else value
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {given}"))
    return " ".join(words)


def startup(report: Report) -> str:
    ways = "; ".join(f"{way} {row['all']} s" for way, row in report["results"].items())
    return f"From the command to the end of the first step: {ways}."


def scale(report: Report) -> str:
    cache, rest = report["results"]["large cache"], report["results"]["nothing to do"]
    opening = statistics.median(run["open_seconds"] for run in cache["open"]) * 1e3
    first = cache["loader, full shuffle"]["first_batch_seconds"] * 1e3
    page = f", its report takes {cache['report']['report_seconds']:.1f} s" if "report" in cache else ""
    return (
        f"A cache of {cache['samples']:,} samples opens in {opening:.0f} ms and gives its first batch in {first:.0f} "
        f"ms{page}. A build of {rest['samples']:,} pictures that finds nothing to do takes "
        f"{rest['remembered_seconds']:.1f} s, and {rest['rehashed_seconds']:.1f} s where it reads them all again."
    )


def kills(report: Report) -> str:
    found = [row for form in report["results"].values() for row in form.values()]
    total = {name: sum(row.get(name, 0) for row in found) for name in ("kills", "rows_lost", "rows_doubled")}
    late = sum(row.get("finished_before_the_kill", 0) for row in found)
    differing = sum(len(row["differing"]) for row in found)
    stops = [form["stops"] for form in report["results"].values() if "stops" in form]
    stopped = sum(sum(row["codes"].values()) for row in stops)
    left = sum(len(row["left_behind"]) for row in stops)
    return (
        f"{total['kills']:,} builders killed, {late} of them too late to interrupt anything: {total['rows_lost']} rows "
        f"lost, {total['rows_doubled']} twice, {differing} caches with other bytes. Of {stopped} stopped by a signal, "
        f"{left} left scratch files behind. It took {report['seconds'] / 60:.0f} minutes."
    )


def bucket_kills(report: Report) -> str:
    found = [row for form in report["results"].values() for row in form.values()]
    together = sum(row.get("runs", 0) for row in found)
    failing = [row for row in found if "happened" in row]
    failed = sum(row["happened"] for row in failing)
    at_once = sum(row["codes"] == [0] for row in failing)
    return (
        f"In a bucket: {kills(report)} {together} builds were by four builders at once. Of {len(failing)} builds among "
        f"{failed:,} failing requests of {len(report['arguments']['kinds'])} kinds, {at_once} ended at the first try."
    )


def estimate(report: Report) -> str:
    forms = (
        f"{row['format']} {row['bytes_estimated'] / row['bytes']:.3f} of the bytes and {row['seconds_ratio']:.2f} of "
        "the seconds"
        for row in report["results"]
    )
    return f"What `--dry-run` foretold of builds of {report['samples']:,} pictures: {', '.join(forms)} that they took."


def integrity(report: Report) -> str:
    parts = []
    for form, found in report["faults"].items():
        kinds = found["kinds"].values()
        faults = sum(kind["faults"] for kind in kinds)
        noticed = sum(kind["by verifying"] for kind in kinds)
        speed = report["speed"][form]["gigabytes_per_second"]
        parts.append(f"{form} {noticed:,} of {faults:,} noticed, {len(found['silent'])} silent, {speed} GB/s")
    return f"Faults put into a cache that verifying notices, and how fast it verifies: {'; '.join(parts)}."


def read_checks(report: Report) -> str:
    stages = (
        f"{stage} {row['check_share']:.3%} of the CPU time of a step (runs with and without, in turns: "
        f"{row['cpu_ratio']:.2f}, quartiles {row['cpu_ratio_quartiles'][0]:.2f} to {row['cpu_ratio_quartiles'][2]:.2f})"
        for stage, row in report["results"].items()
    )
    return f"What it costs to verify each row that training reads: {'; '.join(stages)}."


def streaming(report: Report) -> str:
    waits = report["results"]["waits"]
    return (
        f"Of a consumer's time, waiting for streamed rows: {waits['twice']['all']:.1%} where the store gives twice "
        f"what is needed; {waits['half']['all']:.0%} where it gives half, {waits['half']['store']:.0%} for the store."
    )


def small_training(report: Report) -> str:
    ways = (
        f"{way}: weights {row['weights_bytes'] / 1e9:.2f} GB, state {row['state_bytes'] / 1e9:.2f}, peak "
        f"{row['peak_bytes'] / 1e9:.2f}, losses {', '.join(f'{loss:.4f}' for loss in row['losses'])}"
        for way, row in report["results"].items()
    )
    settings = report["settings"]
    return (
        f"Steps of the whole decoder, {settings['model_size']} size, on one picture of {settings['resolution']} "
        f"pixels: {'; '.join(ways)}."
    )


def demo_weights(report: Report) -> str:
    ways = ("float32", "bfloat16")
    shares = {way: [row["scores"][way]["everything"] for _, row in sorted(report["results"].items())] for way in ways}
    means = " and ".join(f"{statistics.mean(of_way):.1f} % in {way}" for way, of_way in shares.items())
    each = "; ".join(f"{way} {', '.join(f'{share:.1f}' for share in of_way)}" for way, of_way in shares.items())
    pictures = next(iter(report["results"].values()))["pictures"]
    return (
        f"Pictures of the demo, {pictures} a seed, right in digit, ink and paper by networks whose weights learnt in "
        f"float32 with AdamW and in bfloat16 with 8-bit AdamW: {means} ({each})."
    )


def engine(report: Report) -> str:
    rows = (
        f"{slots} at {row['of_linear']:.3f} of linear, {'the same' if row['same_bytes'] else 'OTHER'} bytes"
        for slots, row in report["results"].items()
    )
    return f"Slots of a Ray cluster whose encoders wait at each batch: {'; '.join(rows)}."


def many_samples(report: Report) -> str:
    plan, cache, read = (report["results"][name] for name in ("plan", "make_cache", "read"))
    return (
        f"{report['settings']['samples']:,} samples: planned in {plan['seconds']:.0f} s with "
        f"{plan['peak_bytes'] / 1e9:.1f} GB, an index of {cache['index_bytes'] / 1e9:.1f} GB written in "
        f"{cache['index_seconds']:.0f} s, opened in {read['open_seconds']:.2f} s with "
        f"{read['open_anonymous_bytes'] / 1e6:.0f} MB, first batch of a full shuffle after "
        f"{read['first_batch_seconds']:.0f} s with {read['first_batch_anonymous_bytes'] / 1e9:.1f} GB."
    )


def know_your_data(report: Report) -> str:
    captions, colours, scale = (report["results"][name] for name in ("captions", "colours", "scale"))
    at = colours["thresholds"]["0.97"]
    found = ", ".join(f"{share:.1%} {name}" for name, share in at["found"].items())
    return (
        f"True captions against false ones: AUC {captions['auc']:.4f}. Near-duplicates of very different pictures at "
        f"0.97: {found}, and {at['false']:.1%} false. {scale['rows']:,} rows compared in "
        f"{scale['processor_seconds'] / 60:.0f} minutes of processor time ({scale['seconds'] / 60:.0f} on the clock), "
        f"{scale['planted_found']:.1%} of those planted from 0.95 on found."
    )


def forecast(report: Report) -> str:
    ratios = [row["ratio"] for row in report["results"]]
    seconds = [row["rehearsal_processor_seconds"] for row in report["results"]]
    return (
        f"Of {len(ratios)} settings dry runs foretold {min(ratios):.1%} to {max(ratios):.1%} of the memory of a step, "
        f"in {min(seconds):.0f} to {max(seconds):.0f} s of a processor's time each."
    )


def forecast_full(report: Report) -> str:
    return forecast(report)


SUMMARIES: dict[str, Callable[[Report], str]] = {
    function.__name__: function
    for function in (
        startup,
        scale,
        kills,
        bucket_kills,
        estimate,
        forecast,
        forecast_full,
        integrity,
        read_checks,
        streaming,
        small_training,
        demo_weights,
        engine,
        many_samples,
        know_your_data,
    )
}


def summary(name: str, report: Report) -> str:
    """One line on the report called `name`, empty where there is none for it."""
    return SUMMARIES[name](report) if name in SUMMARIES else ""
