"""All groups of a rank wait for the network in one thread, and are groups as before."""

from __future__ import annotations

import json

import pytest

from tempo_megatron.parallel.gloo import _SharedDevices
from tests.launching import launch_ranks, patience


def test_many_groups_share_one_device() -> None:
    result = launch_ranks("tests.parallel.gloo_worker", nproc=2, timeout_s=60).check()
    ranks = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(ranks) == 2
    for told in ranks:
        assert told["sums"] == [2 * i + 1 for i in range(12)]
        assert told["loops"] == 1
        assert told["is_gloo"] and told["after"] == 2
    (waited,) = (told["waited"] for told in ranks if "waited" in told)
    assert 0.9 < waited < patience(10)


def test_interfaces_that_the_user_names(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = _SharedDevices()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,lo")
    assert len(shared._make_devices()) == 2
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert len(shared._make_devices()) == 1
