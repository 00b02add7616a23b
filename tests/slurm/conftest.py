from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """Six nodes, for all tests of this folder."""
    with SlurmCluster(nodes=6) as cluster:
        yield cluster
