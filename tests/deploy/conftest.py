from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deploy.monitored import Monitored, running_pair
from tests.reliability.handling import shared_daemons


@pytest.fixture(scope="session")
def monitored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Monitored]:
    """One daemon and one Prometheus for all tests that look at a run."""
    daemons = shared_daemons(request, tmp_path_factory)
    with running_pair(tmp_path_factory.mktemp("monitored"), daemons) as pair:
        yield pair
