from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deploy.monitored import Monitored, running_pair, running_workers
from tests.reliability.daemons import Daemons


@pytest.fixture(scope="session")
def monitored(daemons: Daemons, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    """One daemon and one Prometheus for all tests that look at a run."""
    with running_pair(tmp_path_factory.mktemp("monitored"), daemons) as pair:
        yield pair


@pytest.fixture(scope="session")
def monitored_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    """The same of a daemon with workers."""
    with running_workers(tmp_path_factory.mktemp("workers")) as pair:
        yield pair
