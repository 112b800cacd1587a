"""The job scripts of docs/clusters.md, run by bash beside programs that answer as Slurm's and the launchers do."""

import re
import signal
import subprocess
from pathlib import Path

import pytest
from documents import ROOT, blocks_of

BUILD, TRAIN = (block.text for block in blocks_of(ROOT / "docs" / "clusters.md") if block.text.startswith("#!"))
PROGRAMS = {
    # Its own options end with the first word that is none; a signal but SIGTERM goes to what it started.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "kcache": 'echo "kcache $*" >>log; exit "$ENDS_WITH"',
    "torchrun": """
        trap 'echo "told" >>log; exit 1' USR1
        echo "torchrun $*" >>log; echo started >ready
        [ "$ENDS_WITH" = told ] || exit "$ENDS_WITH"
        while read -r _ <>never; do :; done""",
    "rsync": "true",
    "scontrol": 'echo "scontrol $*" >>log',
}
JOB = {
    "SLURM_JOB_ID": "60",
    "SLURM_ARRAY_JOB_ID": "60",  # as the last job of an array has it
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_CPUS_PER_TASK": "8",
}


def _started(script: str, folder: Path, ends_with: str) -> subprocess.Popen[bytes]:
    programs = folder / "bin"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    subprocess.run(["mkfifo", "ready", "never"], cwd=folder, check=True)
    environment = {**JOB, "PATH": f"{programs}:/usr/bin:/bin", "ENDS_WITH": ends_with}
    return subprocess.Popen(["bash", "-c", script], cwd=folder, env=environment)


def _said(folder: Path) -> list[str]:
    """What was called, each by its first three words."""
    return [" ".join(line.split()[:3]) for line in (folder / "log").read_text().splitlines()]


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (143, False), (128 + signal.SIGUSR1, True)])
def test_a_build_that_was_told_of_its_limit_starts_again_alone(tmp_path: Path, code: int, again: bool) -> None:
    assert _started(BUILD, tmp_path, str(code)).wait(60) == code
    assert _said(tmp_path) == ["kcache cache-build photos/", *["scontrol requeue 60_7"] * again]


@pytest.mark.parametrize("code", [0, 1])
def test_a_run_that_ends_by_itself_is_not_started_again(tmp_path: Path, code: int) -> None:
    job = _started(TRAIN, tmp_path, str(code))
    (tmp_path / "ready").read_text()
    assert job.wait(60) == code
    assert len(_said(tmp_path)) == 1


def test_a_run_that_was_told_of_its_limit_starts_again(tmp_path: Path) -> None:
    job = _started(TRAIN, tmp_path, "told")
    (tmp_path / "ready").read_text()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 1
    assert _said(tmp_path)[1:] == ["told", "scontrol requeue 60"]


def test_the_times_of_a_run_fit_into_each_other() -> None:
    warned, killed = re.search(r"USR1@(\d+)", TRAIN), re.search(r"--shutdown-timeout (\d+)", TRAIN)
    assert warned is not None
    assert killed is not None
    assert int(killed[1]) + 60 < int(warned[1])  # Slurm warns up to a minute early
