"""Tiny models for the whole session; the vLLM engine of one of them, in a world of one, for a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()  # as in every run: before vLLM, which replaces some of the same functions

from tempo_megatron.rollout.engine import RolloutEngine  # noqa: E402
from tests.rollout.tiny_models import (  # noqa: E402
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
    streams = {name: getattr(torch.cuda, name) for name in ("Event", "Stream", "current_stream", "stream")}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    from vllm.distributed.parallel_state import destroy_distributed_environment

    destroy_distributed_environment()  # the world, and what vLLM keeps of it for the process
    # v1/worker/cpu/shm.py replaces them; Megatron's dispatcher of tokens to experts, which a run builds before it
    # starts vLLM, would get one without events
    for name, ours in streams.items():
        setattr(torch.cuda, name, ours)


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
