"""One vLLM replica inside the training processes, and the state machine of its weights."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tempo_megatron.cluster.pulse import ping
from tempo_megatron.config.rollout import RolloutConfig
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.imports import absent, uncollected
from tempo_megatron.model.hf_tensors import expected_tensors
from tempo_megatron.parallel.device import use_cuda
from tempo_megatron.reshard.holdings import WeightSource
from tempo_megatron.rollout import fp8, patches
from tempo_megatron.rollout.limits import check_model, read_hf_config
from tempo_megatron.rollout.sleep import RolloutParts
from tempo_megatron.rollout.update import Update, WeightUpdater

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm import LLMEngine, SamplingParams
    from vllm.outputs import CompletionOutput

#: What has been sampled, read when it is called: in whatever thread has the time.
ReadResponses = Callable[[], "list[SampledResponse]"]


@dataclass(frozen=True)
class GenerationRequest:
    """``num_samples`` responses to one prompt, of at most ``max_tokens`` tokens each.

    Sample i is drawn with the seed ``seed + i``: the same tokens whether the samples are asked for together or
    apart, in whatever order and company.
    """

    prompt_token_ids: list[int]
    seed: int
    num_samples: int
    max_tokens: int


@dataclass(frozen=True)
class SampledResponse:
    """One response: T token ids, the stop token last where ``finish_reason`` is ``"stop"``.

    ``log_probs`` are T floats, log p of each sampled token after temperature, top-k and top-p.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str


class RolloutEngine:
    """This rank's part of a vLLM replica of ``config.tensor_parallel_size`` consecutive ranks.

    The weights start as dummies and arrive by ``update_weights`` only; ``generate`` refuses to run before the
    first update, while an update is under way, after one that failed or was not proved, for any version but the loaded
    one, and while weights or KV cache are released (``parts``).

    Building is collective: every rank of the world builds its engine at the same point, after
    ``torch.distributed`` is initialised. The trainer's random states, thread count, environment, memory
    policy and process groups are the same afterwards.

    Args:
        hf_dir: folder with the ``config.json`` of the policy.
        config: the ``rollout`` section; ``kv_cache_gib`` a number (``planner.ledger.with_kv_cache``).
        max_model_len: longest prompt + response in tokens.
        seed: of vLLM's own global generator; samples have their own seeds.
        stop_token_ids: ids that end a response.
        sleeps: whether ``parts`` will be put to sleep (a GPU engine allocates otherwise then).

    Attributes:
        last_update: what the last update moved and proved.

    Raises:
        TempoError: the model or the settings are ones that vLLM cannot run.
    """

    def __init__(
        self,
        hf_dir: str | Path,
        config: RolloutConfig,
        *,
        max_model_len: int,
        seed: int,
        stop_token_ids: Sequence[int],
        sleeps: bool = False,
    ) -> None:
        self.max_model_len = max_model_len
        self._config = config
        self._stop_token_ids = list(stop_token_ids)
        self._version: int | None = None
        self._failure: str | None = None
        size = config.tensor_parallel_size
        world = dist.get_world_size()
        if world % size:
            raise TempoError(f"rollout.tensor_parallel_size: {size} does not divide the world of {world} ranks")
        self.num_replicas = world // size
        self.replica_index, within = divmod(dist.get_rank(), size)
        self.is_replica_leader = within == 0
        hf_config = read_hf_config(hf_dir)
        self._llm = _build_engine(str(hf_dir), hf_config, config, max_model_len, seed, sleeps=sleeps)
        self.parts = RolloutParts(self._llm, forget=self._forget)
        self._updater = WeightUpdater(self._llm, expected_tensors(hf_config, "actor"), config)
        self.last_update: Update | None = None

    @property
    def version(self) -> int | None:
        """Version of the loaded weights; None before the first update, during one, after a failed one and while the
        weights are released.
        """
        return self._version

    def _forget(self) -> None:
        self._version = None

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Bring all weights up to date, prove that they have landed, and forget everything computed with old ones.

        Collective over the world. Each rank gets the rectangles that its part of the model takes, as vLLM's own loader
        would slice them, from the nearest rank that has them (``reshard.plan``).

        Args:
            source: the weights as this rank has them; of all ranks together, each tensor of the model's HF checkpoint
                under its name there (a tied output layer is not one). Nothing is kept after the return.
            version: what ``generate`` will have to ask for.

        Raises:
            RunError: the weights' memory is released, ranks have made different plans, or what has landed differs from
                what the trainer holds. As after any other exception, the engine is unusable from then on.
            TempoError: the source does not hold the model's tensors.
        """
        self._require_usable()
        self.parts.weights.emptied()
        complete = self._version is None
        self._version, self._failure = None, f"the update to weights version {version} did not finish"
        self.last_update = self._updater.update(source, version, complete=complete)
        if not self._llm.reset_prefix_cache() or _cached_blocks(self._llm):
            raise RunError(f"rollout: vLLM kept its prefix cache in the update to weights version {version}")
        self.parts.weights.filled()
        self._version, self._failure = version, None

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        version: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[SampledResponse]:
        """Sample every response of ``requests`` on this replica; as ``generate_drawn``, in their order.

        Args:
            on_progress: called with the number of finished responses each time some finish.

        Returns:
            The responses of request 0, then those of request 1, ...: ``sum(r.num_samples)`` in all.
        """
        places = iter(range(len(requests)))
        found: list[ReadResponses] = [list] * len(requests)
        finished = 0

        def take(index: int, read: ReadResponses) -> None:
            nonlocal finished
            found[index] = read
            finished += requests[index].num_samples
            if on_progress is not None:
                on_progress(finished)

        self.generate_drawn(requests, version, lambda: next(places, None), take)
        return [response for read in found for response in read()]

    def generate_drawn(
        self,
        requests: Sequence[GenerationRequest],
        version: int,
        draw: Callable[[], int | None],
        on_finished: Callable[[int, ReadResponses], None],
    ) -> None:
        """Sample the requests that ``draw`` names, with continuous batching, until it names none.

        A request is drawn when fewer samples than ``max_num_seqs`` are unfinished, so that less than one request's
        samples wait for a place, and none while the KV cache has no room for those that wait. All ranks of the replica
        call it with equal arguments and draw the same. A response depends on its prompt, its seed and the weights alone
        (on the CPU bit by bit; on GPUs up to what kernels of another batch shape round differently).

        Args:
            requests: any number; each prompt must leave room for ``max_tokens`` within ``max_model_len``.
            version: the weights version that the caller means to sample from.
            draw: the index of the next request, none twice.
            on_finished: called with a request's index when all its samples are finished, while others are sampled; what
                it is given reads them, and raises RunError where a log-probability is not finite.

        Raises:
            RunError: another version is loaded (or none), weights or KV cache are released, or vLLM returned more or
                fewer responses than asked for.
        """
        self._require_usable()
        self.parts.require_awake("sampling")
        if version != self._version:
            raise RunError(f"rollout: asked to sample weights version {version}, but version {self._version} is loaded")
        self._failure = "generation did not finish"
        with patches.preserved_rng():
            self._run(requests, version, draw, on_finished)
        self._failure = None

    def as_leader_says(self, number: Callable[[], int]) -> int:
        """The first rank of the replica calls ``number``; the result, on all its ranks. Collective over the replica."""
        if self._config.tensor_parallel_size == 1:
            return number()
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        said = torch.tensor(number() if self.is_replica_leader else 0)
        dist.broadcast(said, src=group.first_rank, group=group.cpu_group)
        return int(said)

    @contextmanager
    def sampling(self, *, top_p: float, top_k: int) -> Iterator[None]:
        """Sample with these instead of ``config``'s, for the block."""
        kept = self._config
        self._config = kept.model_copy(update={"top_p": top_p, "top_k": top_k})
        try:
            yield
        finally:
            self._config = kept

    @property
    def max_num_seqs(self) -> int:
        """Samples that the replica runs at a time."""
        return self._config.max_num_seqs

    def close(self) -> None:
        """Free the engine and vLLM's process groups; another engine may be built afterwards. Collective."""
        from vllm.distributed.parallel_state import destroy_model_parallel

        self._version, self._failure = None, "it is closed"
        del self._updater
        self._llm.engine_core.shutdown()
        del self._llm
        destroy_model_parallel()

    def _require_usable(self) -> None:
        if self._failure is not None:
            raise RunError(f"rollout: the engine is unusable: {self._failure}")

    def _run(
        self,
        requests: Sequence[GenerationRequest],
        version: int,
        draw: Callable[[], int | None],
        on_finished: Callable[[int, ReadResponses], None],
    ) -> None:
        drawing, crowded = True, False
        while True:
            while drawing and not crowded and self._llm.get_num_unfinished_requests() < self.max_num_seqs:
                index = draw()
                if index is None:
                    drawing = False
                else:
                    self._add(index, requests[index])
            unfinished = self._llm.get_num_unfinished_requests()  # samples, not requests
            if not unfinished:
                self._land()
                return
            for output in self._llm.step():  # FINAL_ONLY: one output a request, with all its samples
                index = int(output.request_id)
                samples, wanted = output.outputs, requests[index].num_samples
                if len(samples) != wanted:
                    raise RunError(f"rollout: vLLM returned {len(samples)} responses, asked for {wanted}")
                on_finished(index, partial(_responses, samples, version))
            ping()
            # some had to wait although there were places: no KV cache is left, or no tokens of the step
            waiting = self._llm.engine_core.engine_core.scheduler.get_request_counts()[1]
            crowded = waiting > 0 and unfinished - waiting < self.max_num_seqs

    def _land(self) -> None:
        """Wait for steps that were begun before the last response ended.

        v1/engine/core.py, step_with_batch_queue: on GPUs the next step is scheduled while one runs, and computes a
        token too many of a response that ends with that one.  New weights, or a KV cache that goes, must not meet it.
        """
        while self._llm.engine_core.engine_core.batch_queue:
            self._llm.step()

    def _add(self, index: int, request: GenerationRequest) -> None:
        from vllm import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=request.prompt_token_ids)
        self._llm.add_request(str(index), prompt, self._sampling_params(request))

    def _sampling_params(self, request: GenerationRequest) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=request.num_samples,
            seed=request.seed,  # v1/engine/parallel_sampling.py: child i gets seed + i
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            top_k=self._config.top_k,
            max_tokens=request.max_tokens,
            stop_token_ids=self._stop_token_ids,
            logprobs=0,  # the sampled token only
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def _responses(samples: list[CompletionOutput], version: int) -> list[SampledResponse]:
    return [_response(sample, version) for sample in samples]


def load_vllm() -> None:
    """Import vLLM ahead of the first engine, where that does not touch a GPU; nothing else changes in the process."""
    if not use_cuda():
        patches.prepare_process()
        # env_override.py imports inductor's lowering, two thirds of a second, to patch it: nothing is compiled here;
        # multimodal/audio.py imports scipy.signal, a third: nothing is heard
        with absent("torch._inductor.lowering", "scipy.signal"), patches.shielded_import():
            import vllm.v1.worker.cpu_worker  # noqa: F401  (the largest of what an engine imports as it is built)
            from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt  # noqa: F401


def _response(sample: CompletionOutput, version: int) -> SampledResponse:
    token_ids = list(sample.token_ids)
    log_probs = list(sample.logprobs.logprobs) if sample.logprobs is not None else []
    if len(log_probs) != len(token_ids):
        raise RunError(f"rollout: vLLM returned {len(log_probs)} log-probabilities for {len(token_ids)} tokens")
    for position, (token, log_prob) in enumerate(zip(token_ids, log_probs, strict=True)):
        if not math.isfinite(log_prob):
            raise RunError(
                f"rollout: weights version {version} gave token {token} at position {position} of a response "
                f"the log-probability {log_prob}: the policy is not finite (version 0 is that of actor.init)"
            )
    if sample.finish_reason not in ("stop", "length"):
        raise RunError(f"rollout: vLLM ended a response with {sample.finish_reason!r}, not 'stop' or 'length'")
    return SampledResponse(token_ids, log_probs, sample.finish_reason)


def _cached_blocks(llm: LLMEngine) -> int:
    """Blocks of keys and values that a prompt could still be found to share."""
    pool: Any = llm.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return len(pool.cached_block_hash_to_block)


def _build_engine(
    hf_dir: str, hf_config: PretrainedConfig, config: RolloutConfig, max_model_len: int, seed: int, *, sleeps: bool
) -> LLMEngine:
    if torch.version.cuda is not None and not use_cuda():
        raise TempoError(
            f"rollout: torch {torch.__version__} is built for CUDA and sees no GPU, and vLLM's CUDA build samples on "
            "nothing else: tempo-megatron doctor says what is missing; to run on the CPU install the CPU stack (README)"
        )
    check_model(
        hf_dir,
        hf_config,
        config.tensor_parallel_size,
        on_cpu=not use_cuda(),
        expert_parallel=config.expert_parallel,
        weights=config.weights,
    )
    patches.prepare_process()
    gpu_bytes = torch.cuda.mem_get_info()[1] if use_cuda() else None
    given = engine_arguments(hf_dir, config, max_model_len, seed, dist.get_world_size(), gpu_bytes, sleeps=sleeps)
    token = torch.tensor(secrets.randbits(62))
    dist.broadcast(token, src=0)
    with patches.shielded(f"{token.item():x}"):
        with uncollected():
            from vllm import EngineArgs, LLMEngine

        try:
            return LLMEngine.from_engine_args(EngineArgs(**given, **fp8.overrides(config, hf_config)))
        except ValueError as error:  # vLLM's own checks of the settings: length, KV cache, divisibility
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise TempoError(f"rollout: vLLM cannot run {hf_dir}: {' '.join(lines)}") from error


def engine_arguments(
    hf_dir: str,
    config: RolloutConfig,
    max_model_len: int,
    seed: int,
    world_size: int,
    gpu_bytes: int | None,
    *,
    sleeps: bool,
) -> dict[str, Any]:
    """vLLM's ``EngineArgs`` by name.

    Args:
        world_size: ranks of the job.
        gpu_bytes: memory of this rank's GPU; None on the CPU.
        sleeps: whether weights and KV cache leave the device at times.
    """
    on_gpu = gpu_bytes is not None
    kv_bytes = config.kv_cache_bytes
    return {
        "model": hf_dir,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # not the folder's: every sampling parameter is ours
        "load_format": "dummy",
        "dtype": config.dtype,
        "seed": seed,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enable_expert_parallel": config.expert_parallel,
        # the external launcher is how vLLM learns of this rank's device and place; the plain executor would put every
        # replica of a node on GPU 0
        "distributed_executor_backend": "external_launcher" if world_size > 1 else None,
        "enforce_eager": not on_gpu,
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_num_seqs,
        # seeded sampling on the CPU dies in a prompt's second chunk ("CPU Generator does not use offset",
        # v1/worker/gpu_model_runner.py), and without chunks a step must hold the longest prompt
        "enable_chunked_prefill": on_gpu,
        "max_num_batched_tokens": max(config.max_num_batched_tokens, 0 if on_gpu else max_model_len),
        "kv_cache_memory_bytes": kv_bytes,
        # of a GPU's memory, what must be free as vLLM starts. v1/worker/utils.py, request_memory, asks for 0.92 by
        # default, also where the size of the KV cache is given: it would not start beside a trainer that holds a tenth
        "gpu_memory_utilization": 1.0 if gpu_bytes is None else min(1.0, kv_bytes / gpu_bytes),
        "enable_prefix_caching": True,  # the samples of one prompt share its keys and values
        "block_size": None if on_gpu else 32,  # the CPU's default of 128 shares no prompt below that length
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "enable_sleep_mode": sleeps and on_gpu,
    }
