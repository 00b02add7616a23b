"""A Megatron model with its optimizer, for the actor or the critic.

Every rank knows the facts of all rows, and the ranks of a data-parallel shard hold the tokens of its rows.  Outputs
stay by row on the ranks that computed them, those of the shard's last pipeline stage: nothing of a token's size travels
between shards.  A loss is given as a function of one micro-batch's outputs that returns that micro-batch's share of the
global loss: shares of all micro-batches and ranks add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from types import NoneType
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from transformers import PretrainedConfig

from tempo_megatron.cluster.pulse import ping
from tempo_megatron.config.schema import CriticConfig, OptimizerConfig, RoleConfig
from tempo_megatron.data.ragged import Ragged
from tempo_megatron.errors import RunError
from tempo_megatron.model.build import DTYPES, build_model
from tempo_megatron.model.held import megatron_holdings
from tempo_megatron.model.hf_tensors import Role
from tempo_megatron.model.log_probs import output_weight, vocab_parallel_log_probs
from tempo_megatron.model.weights import HFWeightStream, named_parameters
from tempo_megatron.parallel.device import device
from tempo_megatron.parallel.distributed import sum_dicts, world_size
from tempo_megatron.parallel.groups import ModelParallelGroups
from tempo_megatron.patching import replace_value
from tempo_megatron.reshard.holdings import Holdings, WeightSource
from tempo_megatron.training import mixed_dtypes
from tempo_megatron.training.microbatch import MicroBatch, MicroBatches, Sequences, make_microbatches
from tempo_megatron.training.offload import EngineParts

#: outputs of one micro-batch -- per token ``[n, L]`` (actor) or per state ``[n, L + 1]`` (critic) -- and their rows
#: -> (share of the global loss, additive statistics)
LossFunction = Callable[[dict[str, Tensor], list[int]], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gives back, the same on every rank.

    Attributes:
        loss: the global loss before the step.
        sums: statistics of the loss function, summed over micro-batches and ranks.
        outputs: as ``MegatronEngine.forward`` returns them, of the weights before the step.
        grad_norm: global gradient norm before clipping.
        lr: learning rate of the step.
    """

    loss: float
    sums: dict[str, float]
    outputs: dict[str, Ragged]
    grad_norm: float
    lr: float


class MegatronEngine:
    """One role's model, optimizer and schedule on this rank. All methods are collective over the world.

    One that is not ``trainable`` has weights only: no gradients, no optimizer, no ``step``.

    Attributes:
        parts: what it holds, and whether that is on the device: RunError for a use of what is not.
    """

    def __init__(
        self,
        role: Role,
        config: RoleConfig,
        hf_config: PretrainedConfig,
        groups: ModelParallelGroups,
        *,
        seed: int,
        temperature: float = 1.0,
        head_bias: float = 0.5,
        trainable: bool = True,
    ) -> None:
        self.role, self.config, self.hf_config, self.groups = role, config, hf_config, groups
        self.temperature = temperature
        self.lr_scale = 1.0  #: factor on the schedule's learning rate, which a run may lower as it goes
        with groups.active():
            tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
            self.models: list[GPTModel] = build_model(hf_config, role, config, groups, head_bias)
            self.megatron_config = self.models[0].config
            ddp_config = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=config.optimizer.distributed,
                overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
            )
            bf16 = self.megatron_config.bf16
            self.ddp = [Float16Module(self.megatron_config, m) if bf16 else m for m in self.models]
            if trainable:  # gradient buffers: as much memory as float32 weights
                self.ddp = [DistributedDataParallel(self.megatron_config, ddp_config, m) for m in self.ddp]
                # gradients are reduced when the last micro-batch is through, not after each
                no_sync = [ddp.no_sync for ddp in self.ddp]
                held: Any = no_sync if len(no_sync) > 1 else no_sync[0]
                replace_value(self.megatron_config, "no_sync_func", held, NoneType)
            self.optimizer: Any = None
            self.parts = EngineParts(role, self.ddp, lambda: self.optimizer)
            finalize: Any = _finalize_without_scaling
            replace_value(self.megatron_config, "finalize_model_grads_func", finalize, NoneType)

    def start_optimizer(self) -> None:
        """Make optimizer and schedule; call it after the weights are loaded (fp32 masters are copied from them)."""
        settings, dtype = self.config.optimizer, DTYPES[self.config.dtype]
        megatron_settings = MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.grad_clip,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=settings.distributed,
        )
        with self.groups.active():
            self.optimizer = get_megatron_optimizer(
                megatron_settings, self.ddp, use_gloo_process_groups=self.groups.has_gloo
            )
            replace_value(self.megatron_config, "grad_scale_func", self.optimizer.scale_loss, NoneType)
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            if part.optimizer is not None:
                mixed_dtypes.repair(part)
                # Adam's moments come with the first step, but a role held back from it is checkpointed too
                part.init_state_fn(part.optimizer, part.config)
                for group in part.optimizer.param_groups:
                    group.setdefault("step", 0)
        self.scheduler = _scheduler(self.optimizer, settings)

    def go_on_from(self, schedule: dict[str, Any]) -> None:
        """Take the position in the schedule from a checkpoint whose optimizer state has just been loaded.

        Rates, decay and Adam's constants are this run's: they came back with the optimizer's parameter groups.
        """
        settings = self.config.optimizer
        for group in self.optimizer.param_groups:
            group |= {"max_lr": settings.lr, "min_lr": settings.min_lr if settings.decay != "constant" else 0.0}
            group |= {"betas": settings.betas, "eps": settings.eps}
        self.scheduler.num_steps = 0
        self.scheduler.step(schedule["num_steps"])

    def forward(self, sequences: Sequences) -> dict[str, Ragged]:
        """Outputs of this shard's rows, CPU float32, by name; on ranks of other pipeline stages of no row.

        Actor: ``log_probs``, T_i a row, of the response tokens at the rollout temperature, and ``entropy``, T_i.
        Critic: ``values``, T_i + 1; number t is V(x, y_<t), number T_i the value after the last token.
        """
        self.parts.weights.require(f"a forward of the {self.role}")
        homes = self.homes(sequences)
        return self._by_sequence(sequences, homes, self._run(self._microbatches(sequences, homes), loss=None))

    def step(self, sequences: Sequences, loss: LossFunction) -> StepResult:
        """Forward, backward and one optimizer step over all rows.

        Raises RunError on every rank, before the optimizer moves, if the loss is not finite; and after it if the
        gradient norm is not (the weights are then lost, checkpoints are not touched).
        """
        self.parts.require(f"a step of the {self.role}")
        for ddp in self.ddp:
            ddp.train()
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        homes = self.homes(sequences)
        results = self._run(self._microbatches(sequences, homes), loss=loss)
        mine: dict[str, list[Any]] = {}
        for _, _, sums in results:
            for key, value in sums.items():
                mine.setdefault(key, []).append(value)
        totals = sum_dicts(
            {"_loss": 0.0, **({k: _sum(v) for k, v in mine.items()} if self.groups.owns_outputs else {})}
        )
        total_loss = totals.pop("_loss")
        if not math.isfinite(total_loss):
            raise RunError(f"{self.role} loss is {total_loss}: the step was not taken, no checkpoint was touched")
        for group in self.optimizer.param_groups:  # the schedule sets them anew after each step
            group["lr"] *= self.lr_scale
        lr = float(self.optimizer.param_groups[0]["lr"])
        with self.groups.active():
            ping()
            _, grad_norm, _ = self.optimizer.step()
        ping()
        grad_norm = float(grad_norm)
        if not math.isfinite(grad_norm):
            raise RunError(f"{self.role} gradient norm is {grad_norm}; go on from the last checkpoint")
        self.scheduler.step(1)
        return StepResult(total_loss, totals, self._by_sequence(sequences, homes, results), grad_norm, lr)

    def weight_stream(self, bucket_mib: int) -> HFWeightStream:
        """The current weights as HF tensors, for every rank, bucket by bucket."""
        check = self.parts.weights.lease(f"a weight stream of the {self.role}")
        return HFWeightStream(self.models, self.hf_config, self.role, self.groups, bucket_mib << 20, check)

    def weight_source(self) -> WeightSource:
        """The current weights where they are, for whoever takes rectangles of them."""
        check = self.parts.weights.lease(f"an update of the rollout's weights by the {self.role}")
        return WeightSource(
            self._holdings, named_parameters(self.models, self.hf_config, self.role, self.groups), check
        )

    @cached_property
    def _holdings(self) -> Holdings:
        return megatron_holdings(self.hf_config, self.role, self.config.parallel, world_size())

    def homes(self, sequences: Sequences) -> Tensor:
        """``[N]`` int64: the data-parallel shard that computes each row."""
        return sequences.dealt(self.groups.dp_size, self.hf_config.hidden_size)

    def _microbatches(self, sequences: Sequences, homes: Tensor) -> MicroBatches:
        """This rank's, of one pass over all rows; as many as every shard has."""
        groups, layout = self.groups, self.config.parallel
        return make_microbatches(
            sequences,
            homes,
            self.config.max_tokens_per_microbatch,
            (groups.dp_rank, groups.dp_size),
            (groups.cp_rank, groups.cp_size),
            align=(groups.tp_size if layout.sequence_parallel else 1) * self.config.fp8.multiple,
            # the interleaved schedule hands micro-batches on in groups of as many as there are stages; sending their
            # shapes ahead, as the plain one does, mixes up or deadlocks two stages (0.16.1), so they are of one shape
            multiple=groups.pp_size if self.is_interleaved else 1,
            equal_lengths=self.is_interleaved,
        )

    @property
    def is_interleaved(self) -> bool:
        return self.config.parallel.virtual_pipeline_model_parallel_size > 1

    def _run(self, microbatches: MicroBatches, loss: LossFunction | None) -> list[Any]:
        """Megatron's schedule over this rank's micro-batches; on the last stage a list of (rows, outputs, sums)."""
        if loss is None:
            for ddp in self.ddp:
                ddp.eval()
        iterators = [iter(microbatches) for _ in self.ddp]
        with self.groups.active(), torch.set_grad_enabled(loss is not None):
            results: list[Any] = get_forward_backward_func()(
                forward_step_func=partial(self._forward_step, loss),
                data_iterator=iterators if self.is_interleaved else iterators[0],
                model=self.ddp if self.is_interleaved else self.ddp[0],
                num_microbatches=len(microbatches),
                seq_length=microbatches.sizes[0],
                micro_batch_size=1,
                forward_only=loss is None,
            )
        return results

    def _forward_step(self, loss: LossFunction | None, data: Iterator[MicroBatch], model: Any) -> Any:
        ping()
        mb = next(data)
        # Float16Module would turn hidden states into float32
        as_they_are = {"fp32_output": False} if self.megatron_config.bf16 else {}
        output = model(mb.input_ids, mb.position_ids, None, packed_seq_params=mb.packed, **as_they_are)
        return output, partial(self._finish, mb, loss)

    def _finish(self, mb: MicroBatch, loss: LossFunction | None, output: Tensor) -> Any:
        """Last stage: model output ``[1, t, *]`` -> loss share and (rows, detached outputs, sums).

        All stay on the device, which nothing waits for until the schedule is through.
        """
        no_tokens = torch.zeros((), dtype=torch.int, device=output.device)
        outputs = self._by_row(mb, output[0])
        if not mb.rows:  # a filler: every data-parallel rank runs as many micro-batches, with all parameters in each
            nothing = torch.stack([x.sum() for x in outputs.values()]).sum()
            return nothing, no_tokens, ([], {}, {"_loss": 0.0})
        kept = {name: outputs[name].detach() for name in self._output_names}
        if loss is None:
            return output.new_zeros(()), no_tokens, (mb.rows, kept, {})
        share, sums = loss(outputs, mb.rows)
        sums = {name: value.detach() if isinstance(value, Tensor) else value for name, value in sums.items()}
        return share, no_tokens, (mb.rows, kept, {**sums, "_loss": share.detach()})

    def _by_row(self, mb: MicroBatch, output: Tensor) -> dict[str, Tensor]:
        """Outputs ``[t / cp, *]`` of this context rank's tokens -> padded outputs of the micro-batch's rows."""
        if self.role == "critic":
            head = mb.by_row(mb.gather(output.squeeze(-1), self.groups.cp_group), final_state=True)
            if isinstance(self.config, CriticConfig) and self.config.head == "sigmoid":
                return {"values": head.sigmoid(), "logits": head}
            return {"values": head}
        log_probs, entropy = vocab_parallel_log_probs(
            output[mb.predicting],
            output_weight(self.models[-1]),
            mb.targets,
            vocab_size=self.hf_config.vocab_size,
            tp_group=self.groups.tp_group,
            temperature=self.temperature,
        )
        empty = log_probs.new_zeros(output.shape[0])
        return {
            name: mb.by_row(mb.gather(empty.index_put((mb.predicting,), flat), self.groups.cp_group), final_state=False)
            for name, flat in (("log_probs", log_probs), ("entropy", entropy))
        }

    @property
    def _output_names(self) -> tuple[str, ...]:
        return ("values",) if self.role == "critic" else ("log_probs", "entropy")

    def _by_sequence(self, sequences: Sequences, homes: Tensor, results: list[Any]) -> dict[str, Ragged]:
        """Outputs of the micro-batches, where this rank has computed them, in the order of the sequences."""
        mine = (homes == self.groups.dp_rank) & self.groups.is_last_stage
        lengths = torch.where(mine, sequences.response_lengths + int(self.role == "critic"), 0)
        tokens = int(lengths.sum())
        found = {name: Ragged.of_lengths(torch.zeros(tokens), lengths) for name in self._output_names}
        for rows, outputs, _ in results:
            for name in self._output_names if rows else ():
                found[name].put(rows, outputs[name].float().cpu())
        return found


def _sum(values: list[Any]) -> float:
    """Of numbers and of tensors with one number on the device, in float64, with one copy."""
    return sum(torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device()) for v in values]).tolist())


def _finalize_without_scaling(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    # losses are divided by their global count already: passing num_tokens would divide again
    finalize_model_grads(model, None, **kwargs)


def _scheduler(optimizer: Any, settings: OptimizerConfig) -> OptimizerParamScheduler:
    decay_steps = settings.decay_steps or settings.warmup_steps + 1
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr if settings.decay != "constant" else 0.0,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(decay_steps, settings.warmup_steps + 1),
        lr_decay_style=settings.decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
