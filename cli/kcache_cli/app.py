"""The `kcache` command: its list of commands, and what becomes of an error."""

import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from kcache.errors import KcacheError
from kcache.foreign import advice, is_fault, reason, tracebacks_are_wanted
from kcache.machine import keep_to_cores
from kcache.stopping import end_on_signals
from kcache_cli.build import cache_build
from kcache_cli.convert import cache_convert
from kcache_cli.demo import demo
from kcache_cli.doctor import doctor
from kcache_cli.duplicates import cache_duplicates
from kcache_cli.garbage import cache_gc
from kcache_cli.info import cache_info
from kcache_cli.merge import cache_merge
from kcache_cli.progress import note, write_any_text
from kcache_cli.report import report
from kcache_cli.sample import sample
from kcache_cli.streams import telling
from kcache_cli.train import train_decoder, train_prior
from kcache_cli.upstream_flags import translated
from kcache_cli.verify import cache_verify


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run the command, without what typer's own library puts before the reason for which it refuses a value."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


app = typer.Typer(
    cls=_Commands,
    name="kcache",
    help="Run Kandinsky 2.2's frozen encoders once, then train the prior and the decoder from their cached outputs.",
    epilog="Start with `kcache demo`. Every command explains itself: `kcache cache-build --help`.",
    no_args_is_help=True,
    context_settings={"max_content_width": 100},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("cache-build", no_args_is_help=True)(cache_build)
app.command("cache-info", no_args_is_help=True)(cache_info)
app.command("cache-duplicates", no_args_is_help=True)(cache_duplicates)
app.command("cache-verify", no_args_is_help=True)(cache_verify)
app.command("cache-convert", no_args_is_help=True)(cache_convert)
app.command("cache-merge", no_args_is_help=True)(cache_merge)
app.command("cache-gc", no_args_is_help=True)(cache_gc)
# Surplus arguments reach the commands, which know what people mean by them.
app.command("train-prior", no_args_is_help=True, context_settings={"allow_extra_args": True})(train_prior)
app.command("train-decoder", no_args_is_help=True, context_settings={"allow_extra_args": True})(train_decoder)
app.command("sample", no_args_is_help=True)(sample)
app.command("report", no_args_is_help=True)(report)
app.command("demo")(demo)
app.command("doctor")(doctor)


def dashed(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--some_flag=value` spelt `--some-flag=value`; values, and what follows `--`, are kept."""
    spelt: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            return spelt + list(arguments[position:])
        flag, equals, value = argument.partition("=")
        spelt.append(flag.replace("_", "-") + equals + value if argument.startswith("--") else argument)
    return spelt


def main() -> None:
    """Run the command line of this process and exit: 0 done, 1 refused, 2 usage, 3 inputs rejected, 4 corrupt.

    Ctrl-C exits with 130, SIGTERM with 143 and any other of `STOP_SIGNALS` with 128 and its number, after clearing up.
    Whatever else goes wrong is one line, too; all of it is shown with KCACHE_DEBUG=1.
    """
    write_any_text()
    keep_to_cores()
    threading.excepthook = _said_in_a_thread
    with telling():
        _run(end_on_signals())


def _run(came: Sequence[int]) -> None:
    try:
        app(args=translated(dashed(sys.argv[1:])), prog_name="kcache")
    except Exception as error:  # noqa: BLE001  # nobody is above this, and a traceback is of no use to whoever typed it
        if came:  # what a library makes of being ended in the middle is not what happened
            sys.exit(128 + came[0])
        if tracebacks_are_wanted():
            traceback.print_exc()
        else:
            note(f"kcache: {_one_line(error)}")
        sys.exit(error.exit_code if isinstance(error, KcacheError) else 1)


def _one_line(error: Exception) -> str:
    if isinstance(error, KcacheError):
        return str(error)
    if is_fault(error):
        told = reason(error)
        name = type(error).__name__
        told = told if told.startswith(name) else f"{name}: {told}"
        return f"{told}; this is a fault of kcache or of a library it uses: KCACHE_DEBUG=1 shows where it happened"
    what = advice(error)
    return f"{reason(error)}; {what}" if what else reason(error)


def _said_in_a_thread(told: threading.ExceptHookArgs) -> None:
    """What becomes of an error in a thread that nobody waits for."""
    if tracebacks_are_wanted():
        threading.__excepthook__(told)
    elif isinstance(told.exc_value, Exception):
        note(f"kcache: {_one_line(told.exc_value)}")
