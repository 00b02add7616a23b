"""A run's data, read and encoded before any model is built: what is wrong with it is told within seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from tempo_megatron.config.schema import Config, EvalSet
from tempo_megatron.data.answer_kinds import check_sources
from tempo_megatron.data.encode import encode_prompts, encode_sft
from tempo_megatron.data.isolated import read_eval_isolated, read_prompts_isolated
from tempo_megatron.data.prompts import PromptRecord, PromptSet
from tempo_megatron.data.sampler import PromptSampler
from tempo_megatron.data.sft import read_sft
from tempo_megatron.errors import TempoError
from tempo_megatron.parallel.distributed import on_all_ranks, on_rank0

#: The verifier's name for the files with the answers of D_U, which only the oracle asks about.
ORACLE_SOURCE = "data.oracle_files"


@dataclass(frozen=True)
class Pool:
    """Records of one kind with their token ids and the order in which they are drawn."""

    records: list[PromptRecord]
    token_ids: list[list[int]]
    sampler: PromptSampler


@dataclass(frozen=True)
class EvalPrompts:
    """An evaluation set without its answers."""

    settings: EvalSet
    records: list[PromptRecord]
    token_ids: list[list[int]]


@dataclass(frozen=True)
class PromptData:
    """What all stages but sft train on and evaluate.

    Attributes:
        labeled, unlabeled: D_L and D_U; None where the config draws none of them.
        answers: record id -> (answer, answer type) of the labelled records.
    """

    labeled: Pool | None
    unlabeled: Pool | None
    answers: dict[str, tuple[str, str]]
    eval_sets: list[EvalPrompts]


@dataclass(frozen=True)
class SftData:
    """Token ids of the demonstrations; responses end with EOS."""

    prompts: list[list[int]]
    responses: list[list[int]]


def read_data(config: Config, tokenizer: PreTrainedTokenizerFast) -> PromptData | SftData:
    """The data of the config's stage. Collective; TempoError on every rank for files or rows that cannot be used."""
    data = config.data
    if config.stage == "sft":
        demonstrations = on_all_ranks(lambda: read_sft(data.train_files))
        longest = data.max_prompt_tokens + data.max_response_tokens
        return SftData(*encode_sft(tokenizer, demonstrations, longest, data.chat_template_kwargs))
    records = on_rank0(lambda: _told(read_prompts_isolated(data.train_files, data.answer_types), "training data"))
    token_ids = encode_prompts(tokenizer, records, data.max_prompt_tokens, data.chat_template_kwargs)
    if data.oracle_files:
        on_rank0(lambda: _check_oracle(records, config))
    eval_sets = read_eval_sets(config, tokenizer)
    check_sources(data.answer_types, _sources([records, *(s.records for s in eval_sets)]))
    return PromptData(
        labeled=prompt_pool(records, token_ids, config, labeled=True),
        unlabeled=prompt_pool(records, token_ids, config, labeled=False),
        answers={r.id: (r.answer, r.answer_type) for r in records if r.labeled and r.answer is not None},
        eval_sets=eval_sets,
    )


def _told(found: PromptSet, what: str) -> list[PromptRecord]:
    """The records; what there is to say of them goes to the terminal."""
    for note in found.notes:
        print(f"{what}: {note}", file=sys.stderr, flush=True)
    return found.records


def _sources(groups: Iterable[list[PromptRecord]]) -> set[str]:
    return {record.source for records in groups for record in records}


def _check_oracle(records: list[PromptRecord], config: Config) -> None:
    files = config.data.oracle_files
    known = {r.id for r in _told(read_eval_isolated(files, config.data.answer_types), "oracle")}
    unknown = [r.id for r in records if not r.labeled and r.id not in known]
    if unknown:
        raise TempoError(
            f"data.oracle_files: {', '.join(files)} hold no record {unknown[0]!r} (nor {len(unknown) - 1} others) of "
            "data.train_files' unlabelled ones; records are found by their id (in verl's schema: FILE STEM/index)"
        )


def read_eval_sets(config: Config, tokenizer: PreTrainedTokenizerFast) -> list[EvalPrompts]:
    """The config's evaluation sets without their answers. Collective; TempoError as ``read_data``."""
    return [_eval_prompts(s, config, tokenizer) for s in config.evaluation.sets]


def prompt_pool(
    records: list[PromptRecord], token_ids: list[list[int]], config: Config, *, labeled: bool
) -> Pool | None:
    """D_L or D_U of the records; None where the config draws none of it. TempoError where there is none to draw."""
    kind = "labeled" if labeled else "unlabeled"
    wanted = getattr(config.data, f"{kind}_prompts_per_step")
    positions = [i for i, r in enumerate(records) if r.labeled is labeled]
    if labeled:
        positions = positions[: config.data.labeled_limit]
    if not wanted:
        return None
    if not positions:
        raise TempoError(
            f"data.{kind}_prompts_per_step: {wanted}, but {', '.join(config.data.train_files)} hold no {kind} record"
        )
    # D_L and D_U are shuffled apart, whatever their order in the files
    sampler = PromptSampler(len(positions), 2 * config.seed + int(labeled))
    return Pool([records[i] for i in positions], [token_ids[i] for i in positions], sampler)


def _eval_prompts(settings: EvalSet, config: Config, tokenizer: PreTrainedTokenizerFast) -> EvalPrompts:
    data = config.data
    what = f"evaluation set {settings.name}"
    records = on_rank0(lambda: _told(read_eval_isolated(settings.files, data.answer_types), what))[: settings.limit]
    token_ids = encode_prompts(tokenizer, records, data.max_prompt_tokens, data.chat_template_kwargs)
    return EvalPrompts(settings, records, token_ids)
