"""The runs of a sweep, as the [[run]] tables of a TOML file give them: what all share, and what each changes."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kcache.config.train import TrainConfig
from kcache.errors import ConfigError
from kcache.settings import marks_of, read_toml, settings_from

_FORM = (
    "a [[run]] table per run and nothing else, such as\n\n"
    '  [[run]]\n  name = "slow"\n  learning_rate = 1e-5\n\n'
    "settings that all runs share are flags"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep, as it will be trained."""

    name: str
    settings: Mapping[str, Any]
    """Those that its table gives."""
    config: TrainConfig


def plan_sweep(path: Path, config: TrainConfig) -> tuple[PlannedRun, ...]:
    """The runs that the TOML file at `path` asks for: `config` with what each [[run]] table changes.

    Raises ConfigError for a file without runs, names that are missing, repeated or no names of folders, and settings
    that do not exist, do not fit or that runs of one sweep cannot differ in.
    """
    if not path.exists():
        raise ConfigError(f"there is no file {path}; correct the path, or write one: {_FORM}")
    table = read_toml(path)
    tables = table.pop("run", None)
    if table or not isinstance(tables, list) or not tables or not all(isinstance(run, dict) for run in tables):
        raise ConfigError(f"{path} has {', '.join(table) or 'no runs'}; expected {_FORM}")
    if config.resume_from_checkpoint not in (None, "latest"):
        raise ConfigError(
            f"--resume-from-checkpoint {config.resume_from_checkpoint} was given beside --sweep; expected none: every "
            "run goes on from its own latest checkpoint; leave it out"
        )
    runs = tuple(_plan_run(path, number, run, config) for number, run in enumerate(tables, start=1))
    _check_distinct(path, "name", [run.name for run in runs])
    uploaded = [run.config.hub_model_id for run in runs if run.config.push_to_hub]
    _check_distinct(path, "hub_model_id", [name for name in uploaded if name is not None])
    return runs


def _check_distinct(path: Path, what: str, values: Sequence[str]) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise ConfigError(
            f"{path}: several runs have the {what} {', '.join(map(repr, repeated))}, and would overwrite each other; "
            f"give each run a {what} of its own"
        )


def _plan_run(path: Path, number: int, table: Mapping[str, Any], config: TrainConfig) -> PlannedRun:
    name = table.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{path}: run {number} has the name {name!r}; expected letters, digits, dots, dashes and underscores: it "
            'names a folder; write name = "slow"'
        )
    where = f"{path}, run {name!r}"
    marks = marks_of(TrainConfig)
    unswept = {name for name in marks if not marks[name].swept}
    shared = [key for key in table if key.replace("-", "_") in unswept]
    if shared:
        raise ConfigError(
            f"{where}: runs of one sweep cannot differ in {', '.join(shared)}; take it out, or give a flag"
        )
    given = {key: value for key, value in table.items() if key != "name"}
    settings = settings_from(given, TrainConfig, marks, where=where)
    run_dir = str(Path(config.output_dir) / name)
    try:
        own = replace(config, **settings, output_dir=run_dir, resume_from_checkpoint="latest")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return PlannedRun(name=name, settings=settings, config=own)
