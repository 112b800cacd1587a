"""What all tests of runs do without."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def only_trained(undrawn: None) -> None:
    """Curves are drawn in the tests of `kcache.report`, and here where a test says so."""
