"""One vLLM engine per tiny model for the whole session, in a world of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tempo_megatron.rollout.engine import RolloutEngine
from tests.rollout.tiny_models import TinyModel, build, tiny_qwen3, tiny_tied_llama


@pytest.fixture(scope="session")
def world_of_one() -> Iterator[None]:
    torch.set_num_threads(1)
    owner = not dist.is_initialized()
    if owner:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if owner:
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_tied_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def qwen3_engine(world_of_one: None, qwen3: TinyModel) -> Iterator[RolloutEngine]:
    """Samples at temperature 1."""
    engine = build(qwen3.folder)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def llama_engine(world_of_one: None, tied_llama: TinyModel) -> Iterator[RolloutEngine]:
    """Samples at temperature 0.7 and top-p 0.9."""
    engine = build(tied_llama.folder, temperature=0.7, top_p=0.9)
    yield engine
    engine.close()
