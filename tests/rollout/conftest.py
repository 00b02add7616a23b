"""Tiny models for the whole session; the vLLM engine of one of them, in a world of one, for a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tempo_megatron.rollout.engine import RolloutEngine
from tests.rollout.tiny_models import (
    Engines,
    TinyModel,
    tiny_olmo3,
    tiny_qwen2,
    tiny_qwen3,
    tiny_qwen3_moe,
    tiny_tied_llama,
)


@pytest.fixture(scope="module")
def world_of_one() -> Iterator[None]:
    """Gone before the next file's tests, which may make a world of their own in this process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_tied_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_qwen3_moe(tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="session")
def olmo3(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_olmo3(tmp_path_factory.mktemp("olmo3"))


@pytest.fixture(scope="module")
def engines(world_of_one: None, request: pytest.FixtureRequest) -> Iterator[Engines]:
    engines = Engines(request.getfixturevalue)
    yield engines
    engines.close()


@pytest.fixture
def no_engine(engines: Engines) -> None:
    """For a test that builds its own."""
    engines.close()


@pytest.fixture
def qwen3_engine(engines: Engines) -> RolloutEngine:
    return engines.of("qwen3")
