"""What only shows how work goes, or makes its result good to look at: it may fail, and costs itself, not the work."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kcache.foreign import reason, tracebacks_are_wanted

logger = logging.getLogger(__name__)


@contextmanager
def decoration(what: str, said: set[str] | None = None) -> Iterator[None]:
    """Turn an exception in the block into one warning: `what` was not to be had, why, and that the work goes on.

    What stands in `said` is not said again: for what fails at every step.
    """
    try:
        yield
    except Exception as error:
        if said is not None and what in said:
            return
        if said is not None:
            said.add(what)
        logger.warning("%s (%s); the work goes on", what, reason(error), exc_info=tracebacks_are_wanted())


def drawing() -> Any:
    """Matplotlib, which draws into memory here: it needs no backend that MPLBACKEND names.

    A notebook tells its children of a backend that only the notebook has, and a matplotlibrc may hold anything. What
    else draws in this process finds both as they are, where they work. Raises what matplotlib makes of this machine.
    """
    if "matplotlib.figure" in sys.modules:
        return sys.modules["matplotlib"]
    asked = os.environ.pop("MPLBACKEND", None)
    try:
        library = _matplotlib()
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    if asked:
        with suppress(ValueError):  # there is no such backend
            library.rcParams["backend"] = asked
    return library


def _matplotlib() -> Any:
    try:
        import_module("matplotlib.figure")
    except ImportError:
        raise
    except Exception:
        # Of a file of settings that cannot be read: matplotlib looks for one here first, and its own is sound.
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]
        found = find_spec("matplotlib")
        if found is None or found.origin is None:
            raise
        with chdir(Path(found.origin).parent / "mpl-data"):
            import_module("matplotlib.figure")
    return sys.modules["matplotlib"]
