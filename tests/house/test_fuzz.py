"""Whatever stands in a file, reading it succeeds or raises a KcacheError: tests/support/fuzzing.py tries far more."""

from pathlib import Path

import pytest
from fuzzing import TARGETS, Lab, run_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# numpy warns of headers that Python 2 wrote; a damaged one may look like that.
pytestmark = pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header parsing")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("target", list(TARGETS))
def test_damaged_files_are_read_or_refused(lab: Lab, target: str) -> None:
    outcomes = {run_case(target, seed, lab) for seed in range(200)}
    assert len(outcomes) > 1, "some are refused and some are not"


@given(target=st.sampled_from(sorted(TARGETS)), seed=st.integers(100_000, 2**62))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_other_damage_each_time(lab: Lab, target: str, seed: int) -> None:
    run_case(target, seed, lab)


def test_what_is_damaged_is_put_right_again(lab: Lab, tmp_path: Path) -> None:
    fresh = Lab(tmp_path)
    names = {path.relative_to(lab.cache) for path in lab.cache.rglob("*")}
    assert names == {path.relative_to(fresh.cache) for path in fresh.cache.rglob("*")}
    assert (lab.cache / "manifest.json").read_bytes() == (fresh.cache / "manifest.json").read_bytes()
