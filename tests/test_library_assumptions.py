"""Every assumption on the inside of a library: what is replaced there, and who reads what was replaced.

A library that renames one of these is told at once (``tempo_megatron.patching``); that its reader has gone is told
here, where the pins are changed.  Behaviour that patches rely on is tested where they are used.
"""

from __future__ import annotations

import json

import pytest

from tests.launching import launch

MEGATRON = "megatron.core"
VLLM_CPU = "vllm.distributed.device_communicators.cpu_communicator:_CPUSHMDistributed"
P2P = f"{MEGATRON}.pipeline_parallel.p2p_communication"
WRITER = f"{MEGATRON}.dist_checkpointing.strategies.filesystem_async"
DISTRIBUTED = f"{MEGATRON}.optimizer.distrib_optimizer.DistributedOptimizer"
STRATEGY = f"{MEGATRON}.dist_checkpointing.strategies.torch"

#: Library -> what this package replaces in it.
REPLACED = {
    "torch 2.13": {
        *(f"torch.cuda.{n}" for n in ("set_device", "synchronize", "empty_cache", "current_device", "Stream", "Event")),
        *(f"torch.cuda.{n}" for n in ("current_stream", "default_stream", "stream", "manual_seed")),
        *(f"torch.cuda.{n}" for n in ("get_rng_state", "set_rng_state", "nvtx.range_push", "nvtx.range_pop")),
        *(f"torch.cuda.random.{n}" for n in ("get_rng_state", "set_rng_state")),
        *(f"torch.{n}" for n in ("tensor", "zeros", "ones", "empty", "empty_like", "set_num_threads")),
        "torch.Tensor.cuda",
        "torch.Tensor.type",
        "torch._dynamo.config.disable",
        "torch.distributed.distributed_c10d.ProcessGroupGloo",
    },
    "megatron-core 0.16.1": {
        f"{MEGATRON}.tensor_parallel.random._get_cuda_rng_state",
        f"{MEGATRON}.tensor_parallel.random._set_cuda_rng_state",
        f"{MEGATRON}.tensor_parallel.mappings._gather_along_first_dim",
        f"{MEGATRON}.tensor_parallel.mappings._reduce_scatter_along_first_dim",
        f"{MEGATRON}.tensor_parallel.layers._grad_accum_fusion_available",
        f"{MEGATRON}.distributed.param_and_grad_buffer.dist_reduce_scatter_func",
        f"{MEGATRON}.distributed.param_and_grad_buffer.dist_all_gather_func",
        f"{MEGATRON}.optimizer.clip_grads.multi_tensor_scale_impl",
        f"{MEGATRON}.optimizer.Adam",
        f"{MEGATRON}.optimizer.USING_PYTORCH_OPTIMIZER",
        f"{MEGATRON}.optimizer.distrib_optimizer.Adam",
        f"{MEGATRON}.optimizer.distrib_optimizer.HAVE_APEX_OR_TE",
        f"{MEGATRON}.optimizer.distrib_optimizer.USING_APEX_OPTIMIZER",
        f"{MEGATRON}.optimizer.optimizer.Float16OptimizerWithFloat16Params.sharded_state_dict",
        f"{DISTRIBUTED}.sharded_param_state_fully_reshardable",
        f"{DISTRIBUTED}.load_parameter_state_from_fully_reshardable",
        f"{MEGATRON}.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",
        f"{MEGATRON}.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
        f"{MEGATRON}.transformer.transformer_config.TransformerConfig.softmax_scale",
        f"{MEGATRON}.transformer.transformer_config.TransformerConfig.finalize_model_grads_func",
        f"{MEGATRON}.transformer.transformer_config.TransformerConfig.grad_scale_func",
        f"{MEGATRON}.transformer.transformer_config.TransformerConfig.no_sync_func",
        f"{MEGATRON}.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding.inv_freq",
        f"{MEGATRON}.models.gpt.gpt_model.GPTModel.rotary_pos_emb",
        f"{MEGATRON}.models.gpt.gpt_model.GPTModel.output_layer",
        *(f"{P2P}.{n}" for n in ("_batched_p2p_ops", "_p2p_ops")),
        *(f"{P2P}.P2PCommunicator.{n}" for n in ("_communicate", "_communicate_shapes")),
        f"{MEGATRON}.transformer.moe.router.topk_routing_with_score_function",
        f"{MEGATRON}.transformer.moe.token_dispatcher.gather_from_sequence_parallel_region",
        f"{MEGATRON}.optimizer.clip_grads.l2_norm_impl",
        "torch.nn.parameter.Parameter.allreduce",  # Megatron's mark on an expert's weight
        f"{WRITER}._results_queue",
        f"{MEGATRON}.parallel_state.create_group",
    },
    "vllm-cpu 0.32": {
        "vllm.v1.engine.core.cleanup_dist_env_and_memory",
        "torch.ops._C.init_cpu_memory_env",
        "torch.nn.modules.module.Module.cpu_linear",  # vLLM's linear layers on the CPU
        f"{VLLM_CPU.replace(':', '.')}.make_group_name",
        f"{VLLM_CPU.replace(':', '.')}._init_cpu_shm",
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod._setup_kernel",
        "vllm.model_executor.models.transformers.base.Base._decorate_cls_for_torch_compile",
        "vllm.triton_utils.dispatcher._rebind_kernels",
        "vllm.model_executor.layers.quantization.fp8.init_fp8_linear_kernel",
    },
}

#: (function of a library, a global, attribute or string that it must read for a patch or a mark of ours to count).
READ = [
    (f"{MEGATRON}.tensor_parallel.random:CudaRNGStatesTracker.fork", "_set_cuda_rng_state"),
    (f"{MEGATRON}.tensor_parallel.mappings:_GatherFromSequenceParallelRegion.forward", "_gather_along_first_dim"),
    (
        f"{MEGATRON}.tensor_parallel.mappings:_ReduceScatterToSequenceParallelRegion.forward",
        "_reduce_scatter_along_first_dim",
    ),
    (
        f"{MEGATRON}.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication.backward",
        "fused_weight_gradient_mlp_cuda",
    ),
    (f"{MEGATRON}.tensor_parallel.layers:ColumnParallelLinear.__init__", "_grad_accum_fusion_available"),
    # model/fp8.py: the products that are emulated
    *((f"{MEGATRON}.tensor_parallel.layers:{n}ParallelLinear.forward", "_forward_impl") for n in ("Column", "Row")),
    # model/layers.py and fp8.py: what a cast of the whole model does not reach
    ("torch.nn.modules.module:Module.bfloat16", "_apply"),
    # model/layers.py: where PackedSelfAttention turns queries and keys
    (f"{MEGATRON}.transformer.attention:Attention.forward", "_adjust_key_value_for_inference"),
    (
        f"{MEGATRON}.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_grad_sync",
        "dist_reduce_scatter_func",
    ),
    (f"{MEGATRON}.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_param_sync", "dist_all_gather_func"),
    (f"{MEGATRON}.optimizer.clip_grads:clip_grad_by_total_norm_fp32", "multi_tensor_scale_impl"),
    (f"{MEGATRON}.optimizer.clip_grads:get_grad_norm_fp32", "l2_norm_impl"),
    (f"{P2P}:P2PCommunicator.send_forward_recv_backward", "_communicate"),
    (f"{P2P}:P2PCommunicator.send_forward_backward_recv_forward_backward", "_communicate"),
    *((f"{P2P}:P2PCommunicator._communicate", n) for n in ("_communicate_shapes", "_batched_p2p_ops", "_p2p_ops")),
    (f"{MEGATRON}.transformer.moe.router:TopKRouter.routing", "topk_routing_with_score_function"),
    (
        f"{MEGATRON}.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.preprocess",
        "gather_from_sequence_parallel_region",
    ),
    (f"{MEGATRON}.optimizer:_get_megatron_optimizer_based_on_param_groups", "Adam"),
    (f"{MEGATRON}.optimizer:_get_megatron_optimizer_based_on_param_groups", "USING_PYTORCH_OPTIMIZER"),
    (f"{MEGATRON}.optimizer.distrib_optimizer:DistributedOptimizer.__init__", "Adam"),
    (f"{MEGATRON}.optimizer.distrib_optimizer:DistributedOptimizer.state_dict", "HAVE_APEX_OR_TE"),
    (f"{MEGATRON}.optimizer.distrib_optimizer:DistributedOptimizer.state_dict", "USING_APEX_OPTIMIZER"),
    (f"{MEGATRON}.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__", "torch.cuda.FloatTensor"),
    (f"{MEGATRON}.optimizer:_get_param_groups", "allreduce"),
    (f"{MEGATRON}.distributed.distributed_data_parallel:DistributedDataParallel.__init__", "allreduce"),
    (f"{MEGATRON}.distributed.finalize_model_grads:_allreduce_non_tensor_model_parallel_grads", "sequence_parallel"),
    (f"{MEGATRON}.transformer.moe.moe_utils:RouterGatingLinearFunction.forward", "te_general_gemm"),
    (
        f"{MEGATRON}.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
        "maybe_move_tensor_to_cpu",
    ),
    (f"{MEGATRON}.models.gpt.gpt_model:GPTModel._preprocess", "rotary_pos_emb"),
    (f"{MEGATRON}.models.gpt.gpt_model:GPTModel._postprocess", "output_layer"),
    (f"{MEGATRON}.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.get_freqs_non_repeated", "inv_freq"),
    (f"{MEGATRON}.pipeline_parallel.schedules:forward_backward_no_pipelining", "finalize_model_grads_func"),
    (f"{MEGATRON}.pipeline_parallel.schedules:backward_step", "grad_scale_func"),
    (f"{MEGATRON}.pipeline_parallel.schedules:forward_backward_no_pipelining", "no_sync_func"),
    (f"{WRITER}:_get_write_results_queue", "_results_queue"),
    (f"{MEGATRON}.parallel_state:initialize_model_parallel", "create_group"),
    # checkpoint/own_state.py; its rectangles are shards off any grid, which are saved where the tensor's lies
    (
        f"{MEGATRON}.optimizer.distrib_optimizer:DistributedOptimizer.sharded_state_dict",
        "sharded_param_state_fully_reshardable",
    ),
    (
        f"{MEGATRON}.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
        "load_parameter_state_from_fully_reshardable",
    ),
    (
        f"{MEGATRON}.optimizer.distrib_optimizer:DistributedOptimizer.get_parameter_state_dp_zero",
        "_get_main_param_and_optimizer_states",
    ),
    (f"{STRATEGY}:mcore_to_pyt_state_dict", "LocalShardsContainer"),
    # checkpoint/megatron_state.py: where the writer of a save is kept; what it has to say is asked of its queue
    (f"{STRATEGY}:TorchDistSaveShardedStrategy.async_save", "_get_save_and_finalize_callbacks"),
    (f"{WRITER}:FileSystemWriterAsync.retrieve_write_results", "results_queue"),
    ("torch.distributed.distributed_c10d:_new_process_group_helper", "ProcessGroupGloo"),
    # checkpoint/inprocess_writer.py: where digests are taken
    ("torch.distributed.checkpoint.filesystem:_write_item", "transform_save_stream"),
    ("vllm.v1.engine.core:EngineCore.shutdown", "cleanup_dist_env_and_memory"),
    ("vllm.v1.worker.cpu_worker:CPUWorker.__init__", "init_cpu_memory_env"),
    ("vllm.v1.worker.cpu_worker:CPUWorker.init_device", "set_num_threads"),
    (f"{VLLM_CPU}.__init__", "make_group_name"),
    (f"{VLLM_CPU}.__init__", "_init_cpu_shm"),
    (
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:"
        "UnquantizedFusedMoEMethod.process_weights_after_loading",
        "_setup_kernel",
    ),
    (
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod._setup_kernel",
        "_init_moe_kernel",
    ),
    (
        "vllm.model_executor.models.transformers.base:Base._decorate_for_torch_compile",
        "_decorate_cls_for_torch_compile",
    ),
    ("vllm.model_executor.layers.quantization.fp8:Fp8LinearMethod.create_weights", "init_fp8_linear_kernel"),
    ("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", "cpu_linear"),
    ("vllm.model_executor.layers.utils:cpu_unquantized_gemm", "cpu_linear"),
    # rollout/weights.py: what only packs, and how vLLM finishes a layer whose tensors have come
    ("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", "_supports_onednn"),
    *(
        ("vllm.model_executor.model_loader.reload.layerwise:_layerwise_process", n)
        for n in ("_already_called_process_weights_after_loading", "_copy_and_restore_kernel_tensors")
    ),
    # rollout/sleep.py: sizes of packed weights
    ("vllm.model_executor.model_loader.reload.layerwise:record_metadata_for_reloading", "restore_metadata"),
    ("vllm.usage.usage_lib:is_usage_stats_enabled", "VLLM_NO_USAGE_STATS"),
    ("vllm.v1.engine.llm_engine:LLMEngine.from_engine_args", "VLLM_ENABLE_V1_MULTIPROCESSING"),
    ("vllm.logger:_configure_vllm_root_logger", "VLLM_CONFIGURE_LOGGING"),
    ("vllm.triton_utils.dispatcher:register_kernels", "_rebind_kernels"),
    ("vllm.triton_utils.dispatcher:_rebind_kernels", "_kernel_arg_names"),
    (f"{VLLM_CPU}._init_cpu_shm", "barrier"),
    # checkpoint/convert/plan.py: each init wraps sys.excepthook
    ("torch.distributed.distributed_c10d:init_process_group", "excepthook"),
]


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    """All patches applied to the real libraries in a process of its own, and applied again without each target."""
    result = launch(["-m", "tests.library_worker", json.dumps(READ)], nproc=1, timeout_s=200).check()
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_what_is_replaced_is_what_is_stated(found: dict[str, dict[str, str]]) -> None:
    assert set(found["gone"]) == set.union(*REPLACED.values())


@pytest.mark.slow
@pytest.mark.parametrize(("library", "target"), sorted((lib, t) for lib, names in REPLACED.items() for t in names))
def test_a_renamed_target_is_told(found: dict[str, dict[str, str]], library: str, target: str) -> None:
    told = found["gone"][target]
    assert told.startswith(library)
    assert f": {target} does not exist, and tempo-megatron replaces it: install the version" in told


@pytest.mark.slow
def test_what_is_replaced_is_read(found: dict[str, list[str]]) -> None:
    assert found["unread"] == []


@pytest.mark.slow
def test_all_of_a_layout_is_switched(found: dict[str, list[str]]) -> None:
    """Globals of one layout that stay behind when another is in place give wrong groups, in silence."""
    assert found["outside"] == []
