"""``tempo-megatron doctor --mismatch``: why vLLM's log-probabilities are not Megatron's, one cause after the other.

vLLM samples a few responses, Megatron scores the same tokens; then each with one thing done otherwise. What the numbers
mean is ``algorithm.mismatch``'s.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from tempo_megatron.algorithm.diagnostics import LogProbDifference, log_prob_difference
from tempo_megatron.algorithm.mismatch import (
    Diagnosis,
    Evidence,
    Trial,
    diagnose,
    fit_temperature,
    growth,
    shifted,
    truncation,
)
from tempo_megatron.checkpoint.critic_format import open_hf_folder
from tempo_megatron.checkpoint.hf_engine import export_hf, load_initial_weights
from tempo_megatron.checkpoint.hf_write import SIDE_FILES
from tempo_megatron.checkpoint.manifest import read_manifest
from tempo_megatron.config.schema import Config
from tempo_megatron.data.ragged import Ragged
from tempo_megatron.data.tokenizer import CONFIG, GENERATION_CONFIG
from tempo_megatron.errors import RunError, TempoError
from tempo_megatron.locate import InitSource, resolve_init
from tempo_megatron.loop.data import SftData, read_data, read_eval_sets
from tempo_megatron.loop.hf_reference import reference_log_probs, rows_within_reach
from tempo_megatron.loop.runtime import Runtime, claim_output, start_rollout
from tempo_megatron.parallel.distributed import on_all_ranks, on_rank0, rank, start, world_size
from tempo_megatron.parallel.exchange import move_rows
from tempo_megatron.parallel.parts import awake
from tempo_megatron.rollout.collect import rollout
from tempo_megatron.rollout.engine import RolloutEngine
from tempo_megatron.rollout.prompts import PromptDraw
from tempo_megatron.rollout.sampling import sample_seed
from tempo_megatron.telemetry.environment import environment
from tempo_megatron.telemetry.metrics import json_safe
from tempo_megatron.training.microbatch import Sequences

MISMATCH_FILE = "doctor-mismatch.json"
FORMAT = 1
SAMPLES_PER_PROMPT = 2
TABLE_WIDTH = 140  # where there is no terminal to ask

_TOKENIZER_FILES = [name for name in SIDE_FILES if name not in (CONFIG, GENERATION_CONFIG)]


@dataclass(frozen=True)
class Sampled:
    """N responses, on every rank; ``log_probs`` are vLLM's, float32."""

    prompts: list[list[int]]
    responses: list[list[int]]
    log_probs: Ragged

    def with_prompts(self, prompts: list[list[int]]) -> Sampled:
        return Sampled(prompts, self.responses, self.log_probs)

    @property
    def longest(self) -> int:
        return max(len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True))


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        cause: what it looks for; empty for the two as they are.
        compared: in words.
        mean_abs, max_abs: of the difference, nats; None where it is not one of log-probabilities, or there is none.
        found: in words.
        kl_k3, ess: as ``mismatch/*`` has them; in the file alone.
    """

    cause: str
    compared: str
    mean_abs: float | None
    max_abs: float | None
    found: str
    kl_k3: float | None = None
    ess: float | None = None


class DoctorRuntime(Runtime):
    """The policy with its weights, and a few prompts; nothing that trains. The world is joined before.

    Attributes:
        prompts: (record id, token ids), at most ``count``.
    """

    def __init__(self, config: Config, count: int) -> None:
        super().__init__(config, f"doctor {Path(config.actor.init).name}", 1)
        with self.ledger.phase("data"):
            self.prompts = _read_prompts(self, count)
        self.build_engines(trainable=False)
        self.actor = self.engines["actor"]
        if config.stage == "sft":  # which samples nothing; the stages after it will, and train at that temperature
            self.actor.temperature = config.rollout.temperature
        with self.ledger.phase("load", "the weights of the actor"):
            load_initial_weights(self.actor, self.sources["actor"])


class Pair:
    """vLLM, which samples, and the trainer, which scores what was sampled. Every method is collective.

    Args:
        max_tokens: of a response.
    """

    def __init__(self, runtime: DoctorRuntime, engine: RolloutEngine, max_tokens: int) -> None:
        self.runtime, self.engine, self._max_tokens = runtime, engine, max_tokens
        self._version = 0

    def send_weights(self) -> None:
        """The trainer's to vLLM: the one place that does."""
        with self.runtime.ledger.phase("sync"):
            self.engine.update_weights(self.runtime.actor.weight_source(), self._version)

    def send_weights_anew(self) -> None:
        self._version += 1
        self.send_weights()

    def sample(self) -> Sampled:
        """Responses to the prompts, of the same seeds each time."""
        seed = self.runtime.config.seed
        draws = [
            PromptDraw(name, ids, labeled=False, seed=sample_seed(seed, "doctor", 0, name, 0))
            for name, ids in self.runtime.prompts
        ]
        with self.runtime.ledger.phase("rollout"):
            found = rollout(
                self.engine,
                draws,
                samples_per_prompt=SAMPLES_PER_PROMPT,
                max_response_tokens=self._max_tokens,
                version=self._version,
                decode=lambda responses: [""] * len(responses),  # nobody reads them
            )
        lengths, source = found.response_lengths, found.source
        return Sampled(
            found.prompt_token_ids,
            _to_all(found.response_token_ids, lengths, source).tolist(),
            _to_all(found.rollout_log_probs, lengths, source),
        )

    def score(self, sampled: Sampled, temperature: float | None = None) -> Ragged:
        """The trainer's log-probabilities of what was sampled, float32; at its own temperature unless one is given."""
        actor, sequences = self.runtime.actor, Sequences.of(sampled.prompts, sampled.responses)
        owners = [actor.groups.grid.owner(shard) for shard in actor.homes(sequences).tolist()]
        kept = actor.temperature
        try:
            actor.temperature = kept if temperature is None else temperature
            with self.runtime.ledger.phase("log_probs"):
                found = actor.forward(sequences)["log_probs"]
        finally:
            actor.temperature = kept
        return _to_all(found, sequences.response_lengths, torch.tensor(owners))


def examine_mismatch(config: Config, prompts: int, max_tokens: int, output: Path | None) -> None:
    """Compare the two, print the table, and write ``doctor-mismatch.json`` to ``output`` where one is given.

    Collective.

    Args:
        prompts: at most so many, of the evaluation sets, or else of the training files.
        max_tokens: of a response.

    Raises:
        TempoError: the model or the prompts cannot be used.
        RunError: the log-probabilities differ by more than the bound; the message names the most likely cause.
    """
    start(config.launch.threads_per_rank, config.launch.timeout_s, config.watchdog, output)
    with ExitStack() as closing:
        if output is not None:
            claim_output(output, closing)
        else:  # weights that leave the device need a folder all the same
            config = config.model_copy(update={"output_dir": tempfile.gettempdir()})
        runtime = DoctorRuntime(config, prompts)
        closing.callback(runtime.progress.close)
        engine = start_rollout(runtime)
        closing.callback(engine.close)
        pair = Pair(runtime, engine, min(max_tokens, config.data.max_response_tokens))
        runtime.residency.add_rollout(engine, pair.send_weights)
        pair.send_weights()
        examination = Examination(pair)
        runtime.progress.close()  # the table comes below it
        on_rank0(partial(_publish, runtime, examination, output))
    if examination.diagnosis.cause is not None:
        raise RunError(examination.conclusion)


class Examination:
    """Everything that is tried, in the order of the table; the same on every rank. Collective.

    Attributes:
        bound: the largest mean difference that is none.
        tokens: of the responses that were compared.
        diagnosis, conclusion: the most likely cause, and the same in one line.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair, self.runtime = pair, pair.runtime
        self.bound = _bound(self.runtime.config)
        self.sampled = pair.sample()
        self.trainer = pair.score(self.sampled)
        self.tokens = len(self.trainer.values)
        if not self.trainer.values.isfinite().all():
            bad = int((~self.trainer.values.isfinite()).sum())
            raise RunError(f"doctor: Megatron's log-probabilities of {bad} of {self.tokens} tokens are not finite")
        self.reference, self.reference_note = self._to_reference()
        self.changed_tensors = _changed_tensors(self.runtime)
        self.token_faults, self.token_note = self._look_at_tokens()
        self.temperature, at_temperature = self._temperature()
        truncated, sent_again = self._without_truncation(), self._weights_sent_again()
        trials = [sent_again, at_temperature, *self._shifts(), *self._other_prompts(), truncated]
        self.evidence = Evidence(
            bound=self.bound,
            plain=log_prob_difference(self.sampled.log_probs.values, self.trainer.values),
            trials=trials,
            to_reference=self.reference,
            growth=growth(self.sampled.log_probs, self.trainer),
            truncation=truncation(self.sampled.log_probs.values, self.trainer.values, self.bound),
            changed_tensors=self.changed_tensors or (),
            token_faults=self.token_faults,
        )
        self.diagnosis = diagnose(self.evidence)
        self.conclusion = _conclusion(self.evidence, self.diagnosis, self.tokens)

    def rows(self) -> list[Row]:
        evidence, sampling = self.evidence, self.runtime.config.rollout
        mismatch = self.diagnosis.cause is not None
        settings = f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, top_k {sampling.top_k}"
        rows = [self._distance("", f"vLLM and Megatron as the run has them ({settings})", evidence.plain)]
        by_cause: dict[str, list[Row]] = {}
        for trial in evidence.trials:
            found = "no" if mismatch else "\N{EN DASH}"  # nothing to explain
            if trial.left is None:
                found = trial.says
            elif trial is self.diagnosis.trial:
                found = "explains it"
            by_cause.setdefault(trial.cause, []).append(_row(trial.cause, trial.done, trial.left, found))
        by_cause["weights"].append(_row("weights", "tensors of the trainer and of its folder", None, self._tensors()))
        kernel = []
        if self.reference is None:
            kernel.append(_row("kernel", "transformers in float32", None, f"skipped: {self.reference_note}"))
        else:
            for side, distance in zip(("Megatron", "vLLM"), self.reference, strict=True):
                what = f"{side} and transformers in float32 ({self.reference_note})"
                kernel.append(self._distance("kernel", what, distance))
        first, last = evidence.growth.first, evidence.growth.last
        told = f"{first:.3g}, then {last:.3g}{': grows' if evidence.growth.grows and mismatch else ''}"
        kernel.append(_row("kernel", "vLLM and Megatron, first and last quarter of the positions", None, told))
        by_cause["kernel"] = kernel
        by_cause.setdefault("tokenizer", []).append(
            _row("tokenizer", "ids and files", None, "; ".join(self.token_faults) or self.token_note)
        )
        raised = f"at {evidence.truncation.raised:.0%} of the tokens" if mismatch else "\N{EN DASH}"
        by_cause["top_p"].append(_row("top_p", "vLLM's not below Megatron's", None, raised))
        for cause in ("weights", "kernel", "temperature", "position shift", "tokenizer", "top_p"):
            rows += by_cause[cause]
        return rows

    def _distance(self, cause: str, compared: str, distance: LogProbDifference) -> Row:
        return _row(cause, compared, distance, "agree" if distance.mean_abs <= self.bound else "differ")

    def _tensors(self) -> str:
        if self.changed_tensors is None:
            return "skipped: a checkpoint holds none to compare with, its files were verified"
        if not self.changed_tensors:
            return "equal"
        return f"{len(self.changed_tensors)} differ, the first is {self.changed_tensors[0]}"

    def _left(self, trainer: Tensor) -> LogProbDifference:
        return log_prob_difference(self.sampled.log_probs.values, trainer)

    def _weights_sent_again(self) -> Trial:
        self.pair.send_weights_anew()
        again = self.pair.sample()
        left = log_prob_difference(again.log_probs.values, self.pair.score(again).values)
        return Trial("weights", "with the weights sent again", "they agree once the weights are sent again", left)

    def _temperature(self) -> tuple[float, Trial]:
        own, wanted = self.runtime.actor.temperature, self.runtime.config.rollout.temperature
        found, left = fit_temperature(
            self.sampled.log_probs.values,
            lambda temperature: self.pair.score(self.sampled, temperature).values,
            list(dict.fromkeys([own, wanted, 1.0, 0.5, 2.0])),
        )
        says = (
            f"vLLM's are the trainer's at temperature {found:.4g}; the trainer has {own:g}, rollout.temperature is "
            f"{wanted:g}"
        )
        return found, Trial("temperature", f"Megatron at the temperature that fits best, {found:.4g}", says, left)

    def _shifts(self) -> Iterator[Trial]:
        for by, which in ((1, "next"), (-1, "previous")):
            left = shifted(self.sampled.log_probs, self.trainer, by)
            says = f"vLLM's of a token are the trainer's of the {which} one"
            yield Trial("position shift", f"vLLM's of a token, Megatron's of the {which} one", says, left)

    def _other_prompts(self) -> Iterator[Trial]:
        """The trainer on prompts of which vLLM may have made its own."""
        tokenizer, prompts = self.runtime.tokenizer, self.sampled.prompts
        texts = [tokenizer.decode(ids) for ids in prompts]
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        others: list[tuple[Any, str, list[list[int]]]] = [
            ("position shift", "without their first token", [ids[1:] for ids in prompts]),
            ("position shift", "without their last token", [ids[:-1] for ids in prompts]),
            ("position shift", "with a beginning-of-sequence token", [bos + ids for ids in prompts]),
            ("tokenizer", "encoded again", _encoded(tokenizer, texts, special=False)),
            ("tokenizer", "encoded again, with special tokens", _encoded(tokenizer, texts, special=True)),
        ]
        seen = [prompts]
        for cause, how, changed in others:
            other = self.sampled.with_prompts(changed)
            fits = all(changed) and other.longest <= self.runtime.config.actor.max_tokens_per_microbatch
            if fits and changed not in seen:
                seen.append(changed)
                says = f"vLLM's are the trainer's for prompts {how}"
                yield Trial(cause, f"Megatron on prompts {how}", says, self._left(self.pair.score(other).values))

    def _without_truncation(self) -> Trial:
        config = self.runtime.config.rollout
        if config.top_p == 1 and config.top_k < 1:
            return Trial("top_p", "sampled without top_p and top_k", "the run has none", None)
        with self.pair.engine.sampling(top_p=1.0, top_k=-1):
            whole = self.pair.sample()
        left = log_prob_difference(whole.log_probs.values, self.pair.score(whole).values)
        says = (
            f"they agree without top_p and top_k; with rollout.top_p {config.top_p:g} and rollout.top_k {config.top_k} "
            "vLLM's are of the tokens that are left, which the trainer's do not count in (algorithm.mstep.correction "
            "weighs for that)"
        )
        return Trial("top_p", "sampled without top_p and top_k", says, left)

    def _to_reference(self) -> tuple[tuple[LogProbDifference, LogProbDifference] | None, str]:
        """The distances of trainer and rollout, with whose weights; or None with the reason."""
        runtime, sampled = self.runtime, self.sampled
        lengths = [len(p) + len(r) for p, r in zip(sampled.prompts, sampled.responses, strict=True)]
        rows, why_not = on_rank0(partial(rows_within_reach, runtime.hf_config, lengths))
        if not rows:
            return None, why_not
        source, config = runtime.sources["actor"], runtime.config
        with tempfile.TemporaryDirectory() as made:
            folder, note = source.path, "the folder's weights"
            if source.kind == "checkpoint":
                folder, note = Path(made) / "actor", "the trainer's weights"
                try:
                    with awake(runtime.actor.parts.weights):
                        export_hf(runtime.actor, runtime.hf_dir, folder, config.rollout.bucket_mib)
                except RunError as error:
                    return None, str(error)

            def compute() -> tuple[list[float], str]:
                prompts, responses = sampled.prompts[:rows], sampled.responses[:rows]
                try:
                    return reference_log_probs(folder, prompts, responses, config.rollout.temperature).tolist(), ""
                except (OSError, ValueError) as error:
                    return [], f"transformers cannot load {folder}: {' '.join(str(error).split())[:200]}"

            with runtime.ledger.phase("reference"):
                found, why_not = on_rank0(compute)
        if not found:
            return None, why_not
        reference = torch.tensor(found)
        if rows < len(lengths):
            note += f", the first {rows} of {len(lengths)} responses"
        sides = (side.values[: len(reference)] for side in (self.trainer, sampled.log_probs))
        trainer, rollout_side = (log_prob_difference(side, reference) for side in sides)
        return (trainer, rollout_side), note

    def _look_at_tokens(self) -> tuple[list[str], str]:
        """What is wrong with ids and tokenizer files, and what there is to say of them otherwise."""
        runtime, sampled = self.runtime, self.sampled
        tokenizer, faults = runtime.tokenizer, []
        vocab_size, bos = runtime.hf_config.vocab_size, tokenizer.bos_token_id
        largest = max(max(ids) for ids in (*sampled.prompts, *sampled.responses))
        if largest >= vocab_size:
            faults.append(f"token id {largest} is beyond the model's vocab_size {vocab_size}")
        doubled = sum(ids[:2] == [bos, bos] for ids in sampled.prompts)
        if doubled:
            faults.append(f"{doubled} of {len(sampled.prompts)} prompts begin with two {tokenizer.bos_token}")
        if changed := on_rank0(partial(changed_tokenizer_files, runtime.sources["actor"])):
            faults.append(f"{', '.join(changed)} of the checkpoint are not those of the model that the run began with")
        known = set(tokenizer.get_vocab().values())
        unknown = sum(id not in known for ids in sampled.responses for id in ids)
        again = _encoded(tokenizer, [tokenizer.decode(ids) for ids in sampled.prompts], special=False)
        same = sum(a == b for a, b in zip(again, sampled.prompts, strict=True))
        note = f"{same} of {len(again)} prompts are the same ids when their text is encoded again"
        if unknown:
            note += f"; {unknown} of {self.tokens} sampled tokens are none of the tokenizer's"
        return faults, note


def _read_prompts(runtime: Runtime, count: int) -> list[tuple[str, list[int]]]:
    """Record ids and token ids, the first of the evaluation sets, or else of the training files. Collective."""
    config = runtime.config
    if config.evaluation.sets:
        few = [s.model_copy(update={"limit": min(count, s.limit or count)}) for s in config.evaluation.sets]
        limited = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"sets": few})})
        pools = [([r.id for r in s.records], s.token_ids) for s in read_eval_sets(limited, runtime.tokenizer)]
    else:
        data = read_data(config, runtime.tokenizer)
        if isinstance(data, SftData):
            pools = [([f"row {i}" for i in range(len(data.prompts))], data.prompts)]
        else:
            drawn = [pool for pool in (data.labeled, data.unlabeled) if pool is not None]
            pools = [([r.id for r in pool.records], pool.token_ids) for pool in drawn]
    found = [pair for names, token_ids in pools for pair in zip(names, token_ids, strict=True)][:count]
    if not found:
        raise TempoError("doctor: no prompts to sample; give --set NAME=FILE")
    return found


def _bound(config: Config) -> float:
    """``rollout.max_log_prob_diff`` as it is without top_p and top_k, and where there is no gate."""
    settings = config.rollout
    whole = {"top_p": 1.0, "top_k": -1, "max_log_prob_diff": settings.max_log_prob_diff or "auto"}
    bound = settings.model_copy(update=whole).log_prob_bound(config.actor.dtype, fp8=config.actor.fp8.is_on)
    assert bound is not None
    return bound


def _to_all(held: Ragged, lengths: Tensor, source: Tensor) -> Ragged:
    """A few rows for every rank. Collective."""
    return move_rows(held, lengths, source, lambda _: torch.ones(len(lengths), dtype=torch.bool))


def _encoded(tokenizer: Any, texts: list[str], *, special: bool) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=special)["input_ids"]]


def _changed_tensors(runtime: DoctorRuntime) -> list[str] | None:
    """Tensors that the trainer gives away and its HF folder has otherwise; None of a checkpoint. Collective."""
    source = runtime.sources["actor"]
    if source.kind == "checkpoint":
        return None
    stored = on_all_ranks(lambda: open_hf_folder(source.path, "actor") if rank() == 0 else None)
    changed: list[str] = []
    failure: TempoError | None = None
    with awake(runtime.actor.parts.weights):
        for name, tensor in runtime.actor.weight_stream(runtime.config.rollout.bucket_mib):
            if stored is None or failure is not None:  # the others wait for this rank to gather
                continue
            try:
                if not torch.equal(stored(name).to(tensor.dtype), tensor.cpu()):
                    changed.append(name)
            except TempoError as error:
                failure = error

    def tell() -> list[str]:
        if failure is not None:
            raise failure
        return changed

    return on_rank0(tell)


def changed_tokenizer_files(source: InitSource) -> list[str]:
    """Files of a checkpoint's tokenizer that are not those of the model its run began with, where that is there."""
    if source.kind != "checkpoint":
        return []
    try:
        init = read_manifest(source.path).config["actor"]["init"]
        model = resolve_init(init, "actor.init").hf_dir
    except (TempoError, KeyError):  # gone, or converted: the checkpoint's own is all there is
        return []
    return [name for name in _TOKENIZER_FILES if _content(model / name) != _content(source.hf_dir / name)]


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _row(cause: str, compared: str, distance: LogProbDifference | None, found: str) -> Row:
    if distance is None:
        return Row(cause, compared, None, None, found)
    return Row(cause, compared, distance.mean_abs, distance.max_abs, found, distance.kl_k3, distance.ess)


def _conclusion(evidence: Evidence, diagnosis: Diagnosis, tokens: int) -> str:
    found = (
        f"vLLM's and Megatron's log-probabilities differ by {evidence.plain.mean_abs:.3g} on average over {tokens} "
        f"tokens (bound {evidence.bound:g})"
    )
    if diagnosis.cause is None:
        if diagnosis.trial is not None:
            found += f"; still, nearly all of it is {diagnosis.trial.cause}: {diagnosis.because}"
        sides = evidence.to_reference
        if sides is not None and min(side.mean_abs for side in sides) > evidence.bound:
            found += f"; but both are {sides[0].mean_abs:.3g} from transformers in float32"
        return f"no mismatch: {found}"
    side = {
        "trainer": "; transformers agrees with vLLM: the trainer is off",
        "rollout": "; transformers agrees with the trainer: vLLM is off",
        None: "",
    }[diagnosis.side]
    return f"mismatch: {found}; most likely {diagnosis.cause}: {diagnosis.because}{side}"


def _publish(runtime: DoctorRuntime, examination: Examination, output: Path | None) -> None:
    """Rank 0: the file, then the table."""
    rows = examination.rows()
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    console.print(_table(rows, examination, f"{runtime.config.actor.init}, bound {examination.bound:g}"))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        path = output / MISMATCH_FILE
        partial_path = path.with_name(f"{path.name}.tmp")
        record = json_safe(_record(runtime, examination, rows))
        partial_path.write_text(json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n", "utf-8")
        os.replace(partial_path, path)
        console.print(str(path), soft_wrap=True)
    if examination.diagnosis.cause is None:  # a mismatch is told by the error that ends the process
        console.print(examination.conclusion, soft_wrap=True)


def _table(rows: list[Row], examination: Examination, title: str) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column("looked for")
    table.add_column("compared")
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("max", justify="right", no_wrap=True)
    table.add_column("found")
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1].cause != row.cause
        first = i == 0 or rows[i - 1].cause != row.cause
        style = "bold" if row.cause in ("", examination.diagnosis.cause) else ""
        cells = [row.cause if first else "", row.compared, _figure(row.mean_abs), _figure(row.max_abs), row.found]
        table.add_row(*(Text(cell, style=style) for cell in cells), end_section=last)
    return table


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return "\N{EN DASH}" if math.isnan(value) else f"{value:.2g}"  # no token has a neighbour


def _record(runtime: DoctorRuntime, examination: Examination, rows: list[Row]) -> dict[str, Any]:
    source, diagnosis = runtime.sources["actor"], examination.diagnosis
    return {
        "format": FORMAT,
        "model": {"path": str(source.path), "kind": source.kind},
        "environment": {**environment(), "world_size": world_size()},
        "config": runtime.config.model_dump(mode="json"),
        "prompts": len(runtime.prompts),
        "samples_per_prompt": SAMPLES_PER_PROMPT,
        "tokens": examination.tokens,
        "bound": examination.bound,
        "cause": diagnosis.cause,
        "because": diagnosis.because,
        "side": diagnosis.side,
        "temperature": examination.temperature,
        "rows": [asdict(row) for row in rows],
        "conclusion": examination.conclusion,
    }
