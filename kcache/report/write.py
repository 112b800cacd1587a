"""A report from a path: of the run or the cache that is there, as one HTML file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kcache.config import CountReport
from kcache.errors import ConfigError
from kcache.hints import broken_link
from kcache.machine import check_device
from kcache.report.cache import ReportConfig, cache_sections
from kcache.report.page import Section, is_page, write_page
from kcache.report.run import read_run, run_sections
from kcache.store.manifest import MANIFEST
from kcache.store.run_directory import CONFIG_FILE, METRICS_FILE, is_run, run_of
from kcache.urls import check_local, is_read_afar, without_scheme


@dataclass(frozen=True, kw_only=True)
class Written:
    """A report that was written."""

    report: str
    """The HTML file."""
    kind: Literal["run", "cache"]
    bytes: int


def write_report(config: ReportConfig, report: CountReport | None = None) -> Written:
    """Write the report of what is at `config.path`.

    `report` is told what is done, how much of it and of how much. Raises ConfigError for what is neither a run
    directory nor a cache, for settings of the other and for a device that is not there, CacheWriteError when the file
    cannot be written, and the errors of what is read.
    """
    is_far = is_read_afar(config.path)
    for path in filter(None, (None if is_far else without_scheme(config.path), config.output)):
        check_local(path)
    folder = Path(without_scheme(config.path))
    kind = "cache" if is_far else _kind(folder)
    _check(config, kind)
    check_device(config.device)
    name = folder.resolve().name
    beside = Path() if is_far else folder.resolve().parent
    default = folder / "report.html" if kind == "run" else beside / f"{name}-report.html"
    output = default if config.output is None else Path(config.output)
    if output.is_dir():
        raise ConfigError(f"--output is {output}, a folder; expected a file, such as {output / 'report.html'}")
    if not output.parent.is_dir():
        raise ConfigError(f"--output is {output}, but {output.parent} is no folder; make it first, or choose another")
    if config.output is not None and output.exists() and not is_page(output):
        raise ConfigError(
            f"--output is {output}, a file that is no report; expected a new file, or an earlier report, whose place a "
            "new one takes; choose another, or remove that one"
        )
    sections = _sections(config, kind, report or (lambda name, done, total: None))
    write_page(output, f"{'Training run' if kind == 'run' else 'Cache'} {name}", sections)
    return Written(report=str(output), kind=kind, bytes=output.stat().st_size)


def _kind(folder: Path) -> Literal["run", "cache"]:
    if (folder / MANIFEST).is_file():
        return "cache"
    if is_run(folder):
        return "run"
    if (run_dir := run_of(folder)) is not None:
        raise ConfigError(f"{folder} is a part of a run; expected the run's directory: kcache report {run_dir}")
    if not folder.exists():
        found = broken_link(folder) or "there is nothing at that path"
    elif not folder.is_dir():
        found = "it is a file"
    else:
        names = sorted(entry.name for entry in folder.iterdir())
        found = "it is empty" if not names else f"it holds {', '.join(names[:5])}" + (", …" if len(names) > 5 else "")
    raise ConfigError(
        f"{folder} is neither a run nor a cache: {found}; expected a run directory ({CONFIG_FILE} and {METRICS_FILE}, "
        f"which training writes) or a finished cache ({MANIFEST}, which `kcache cache-build` writes last); name one"
    )


def _check(config: ReportConfig, kind: Literal["run", "cache"]) -> None:
    if kind == "run" and (config.source or config.pretrained_decoder_model_name_or_path):
        flag = "--source" if config.source else "--pretrained-decoder-model-name-or-path"
        raise ConfigError(f"{flag} is for the report of a cache; {config.path} is a run directory: leave it out")
    if config.source is None and config.reading.flags:
        raise ConfigError(
            f"{' and '.join(config.reading.flags)} say how a source is read; expected --source SOURCE beside it, which "
            "shows originals; give it, or leave them out"
        )
    if kind == "cache" and config.neighbours:
        raise ConfigError(f"--neighbours is for the report of a run; {config.path} is a cache: leave it out")


def _sections(config: ReportConfig, kind: Literal["run", "cache"], report: CountReport) -> list[Section]:
    if kind == "cache":
        return cache_sections(config, report)
    run = read_run(Path(without_scheme(config.path)))
    sections = run_sections(run)
    if config.neighbours:
        # Not at the top: only this needs torch.
        from kcache.report.neighbours import neighbours_section

        after = [section.title for section in sections].index("Pictures") + 1
        sections.insert(after, neighbours_section(run, config.device, report))
    return sections
