"""`python -m kcache_cli`: the `kcache` command, for launchers that start Python modules."""

from kcache_cli.app import main

if __name__ == "__main__":
    main()
