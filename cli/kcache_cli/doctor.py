"""`kcache doctor`: what this machine has for kcache, and what to do about what is missing or slow."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kcache.tally import counted
from kcache.urls import check_local
from kcache_cli.progress import bytes_text, say

if TYPE_CHECKING:
    from kcache.report.doctor import Fact

_STYLES = {"ok": "", "note": "yellow", "slow": "yellow", "broken": "bold red"}


def doctor(
    *,
    path: Annotated[
        Path | None,
        typer.Option(help="Folder whose disk is measured, by writing and reading a file of 64 MiB.", metavar="DIR"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Look at this machine: versions, devices, memory, disk; say what is slow or broken, why, and what to do.

    The exit code is 1 when something that kcache needs is broken.

    \b
    Examples:
      kcache doctor
      kcache doctor --path caches/
      kcache doctor --json | jq '.facts[] | select(.state != "ok")'
    """
    if path is not None:
        check_local(path)
    from kcache.report.doctor import examine

    facts = examine(path)
    broken = [fact for fact in facts if fact.state == "broken"]
    if as_json:
        say(json.dumps({"broken": len(broken), "facts": [dataclasses.asdict(fact) for fact in facts]}, indent=2))
    else:
        _print(facts, len(broken))
    if broken:
        raise typer.Exit(1)


def _print(facts: "list[Fact]", broken: int) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "", "found", "", "what to do"):
        table.add_column(heading, overflow="fold")
    area = ""
    for fact in facts:
        if fact.area != area and area:
            table.add_section()
        state = "" if fact.state == "ok" else fact.state
        table.add_row(
            fact.area if fact.area != area else "", fact.name, escape(_value_text(fact)), state, escape(fact.advice),
            style=_STYLES[fact.state],
        )  # fmt: skip
        area = fact.area
    terminal = Console()
    (terminal if terminal.is_terminal else Console(width=140)).print(table)
    say(f"{counted(broken, 'thing')} broken" if broken else "nothing is broken")


def _value_text(fact: "Fact") -> str:
    if fact.value is None:
        return "–"
    if isinstance(fact.value, bool):
        return "yes" if fact.value else "no"
    if fact.unit.startswith("bytes") and isinstance(fact.value, int):
        return bytes_text(fact.value) + fact.unit.removeprefix("bytes")
    return f"{fact.value}"
