"""The arithmetic of who holds what, against the models that Megatron builds on every rank."""

from __future__ import annotations

import pytest
import torch

from tempo_megatron.parallel import cpu_shim

cpu_shim.install()

from megatron.core import tensor_parallel  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from tempo_megatron.config.schema import RoleConfig  # noqa: E402
from tempo_megatron.model.build import build_model  # noqa: E402
from tempo_megatron.model.held import megatron_holdings  # noqa: E402
from tempo_megatron.model.hf_tensors import expected_tensors  # noqa: E402
from tempo_megatron.model.weights import named_parameters  # noqa: E402
from tempo_megatron.parallel.groups import ModelParallelGroups, process_group  # noqa: E402
from tempo_megatron.reshard.regions import matrix_shape  # noqa: E402
from tests.model.parity_cases import Layout, config_of  # noqa: E402

CASES = [
    (1, "", "llama-tied"),
    (2, "tp2", "qwen2-tied"),
    (2, "tp2 kv1", "llama"),
    (4, "tp4 sp kv2", "qwen3"),
    (4, "tp2 pp2 vpp2", "qwen3"),
    (4, "pp4 first2 last1 layers6", "olmo3"),
    (4, "cp2", "qwen2"),
    (8, "tp2 cp2", "llama"),
    (4, "tp2 sp ep2", "qwen3-moe"),
    (4, "tp2 sp etp2", "qwen3-moe"),
    (8, "tp2 sp ep2 etp2", "qwen3-moe"),
    (8, "pp2 ep4", "qwen3-moe"),
    (8, "pp2 vpp2 ep2 layers5", "qwen3-moe"),
    (8, "cp2 ep8", "qwen3-moe"),
]


@pytest.mark.parametrize(("world", "layout", "family"), CASES)
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_every_rank_holds_what_its_model_has(world: int, layout: str, family: str, role: str) -> None:
    words = Layout(layout)
    config = config_of(family, **words.model_changes)
    found = megatron_holdings(config, role, words.parallel, world)
    assert found.shapes == expected_tensors(config, role)
    for rank in range(world):
        with process_group("fake", FakeStore(), rank, world):
            groups = ModelParallelGroups(words.parallel, 60)
            role_config = RoleConfig(init="-", dtype="float32", layer_spec="torch", parallel=words.parallel)
            with groups.active(), torch.device("meta"):
                tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
                models = build_model(config, role, role_config, groups)
            parameters = named_parameters(models, config, role, groups)
        mine = [part for part in found.parts if rank in found.groups[part.group]]
        assert sorted(map(str, parameters)) == sorted(str(part.name) for part in mine)
        for part in mine:
            rows, cols = matrix_shape(parameters[part.name].shape)
            held = [piece.local(piece.region) for _, piece in part.held]
            assert all(r.row + r.rows <= rows and r.col + r.cols <= cols for r in held)
            padded = part.name.megatron in ("embedding.word_embeddings.weight", "output_layer.weight")
            assert sum(r.numel for r in held) == rows * cols or (
                (padded and role == "actor") or part.name.layer is None
            )


@pytest.mark.parametrize(("world", "layout", "family"), CASES)
def test_every_element_is_in_one_part(world: int, layout: str, family: str) -> None:
    words = Layout(layout)
    found = megatron_holdings(config_of(family, **words.model_changes), "actor", words.parallel, world)
    for name, shape in found.shapes.items():
        times = torch.zeros(matrix_shape(shape))
        for _, mapped in found.by_tensor[name]:
            mapped.region.of(times).add_(1)
        assert (times == 1).all(), name
