"""Where the `kcache` command begins, also as `python -m kcache_cli`: being ended while it loads is no traceback."""

import os
import sys


def main() -> None:
    """Run the command line of this process, and exit: see `kcache_cli.app.main`."""
    try:
        from kcache_cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("KCACHE_DEBUG") == "1":
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())
        sys.exit(f"kcache could not be loaded ({why[:300]}); free some memory, or install it again with what it needs")
    run()


if __name__ == "__main__":
    main()
