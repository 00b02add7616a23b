"""A step and a forward of the training engine against transformers with AdamW, equal and ragged lengths.

The same model, rows, loss (mean negative log-likelihood of the response) and threads; micro-batches of at most as many
tokens, padding counted. transformers gets no attention mask: right-padded causal rows do not need one, and without it
attention is faster. Our engine computes the entropy too.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Contender, Prepare, Run, compare_afresh
from benchmarks.report import Options, Report, ahead_of
from benchmarks.worlds import join_world, long_tail, token_ids, write_random_model

VOCAB, PROMPT, MEAN, ROWS, BUDGET = 8192, 16, 96, 16, 1024
OURS, PADDED, SORTED = "ours", "transformers + AdamW, padded", "transformers + AdamW, sorted and padded"


def run(options: Options) -> Report:
    rows = 4 if options.small else ROWS
    size = {"hidden": 64, "layers": 2} if options.small else {"hidden": 320, "layers": 6}
    comparisons, figures = [], []
    with tempfile.TemporaryDirectory() as folder:
        model = {"model": str(write_random_model(Path(folder), vocab_size=VOCAB, **size))}
        contenders = [
            Contender(OURS, "benchmarks.train:ours", model),
            Contender(PADDED, "benchmarks.train:transformers_adamw", {**model, "sorted": False}),
            Contender(SORTED, "benchmarks.train:transformers_adamw", {**model, "sorted": True}),
        ]
        for lengths, target in (("equal", ">= 1.0"), ("ragged", ">= 1.3")):
            compared = contenders if lengths == "ragged" else contenders[:2]  # equal rows: nothing to sort
            for mode in ("step", "forward"):
                case = {"lengths": lengths, "mode": mode, "rows": rows}
                found = compare_afresh(f"{mode}, {lengths} lengths", case, compared, options.rounds)
                comparisons.append(found)
                figures += ahead_of(found, PADDED, f"{mode}, {lengths} lengths: against {PADDED}", target)
                if lengths == "ragged":
                    figures += ahead_of(found, SORTED, f"{mode}, {lengths} lengths: against {SORTED}")
    about = (
        "Tokens per second of a step (forward, backward, AdamW) and of a forward, one thread, float32; each round with "
        "new processes."
    )
    return Report("train", about, comparisons, figures)


def rows_of(case: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of a case, the same for all contenders."""
    lengths = [MEAN] * case["rows"] if case["lengths"] == "equal" else long_tail(case["rows"], MEAN, seed=7)
    return token_ids([PROMPT] * len(lengths), VOCAB, seed=1), token_ids(lengths, VOCAB, seed=2)


def ours(settings: dict[str, Any]) -> Prepare:
    """``MegatronEngine`` as the SFT stage uses it."""
    join_world(settings["threads"])
    from functools import partial

    import torch

    from tempo_megatron.checkpoint.hf_engine import load_initial_weights
    from tempo_megatron.checkpoint.hf_read import load_hf_config
    from tempo_megatron.config.schema import OptimizerConfig, ParallelConfig, RoleConfig
    from tempo_megatron.locate import resolve_init
    from tempo_megatron.loop.sft import nll
    from tempo_megatron.parallel.groups import ModelParallelGroups
    from tempo_megatron.training.engine import MegatronEngine
    from tempo_megatron.training.microbatch import Sequences

    optimizer = OptimizerConfig(lr=1e-5, weight_decay=0.0)
    config = RoleConfig(init=settings["model"], dtype="float32", optimizer=optimizer, max_tokens_per_microbatch=BUDGET)
    source = resolve_init(settings["model"], "actor.init")
    groups = ModelParallelGroups(ParallelConfig(), 600)
    engine = MegatronEngine("actor", config, load_hf_config(source.hf_dir), groups, seed=0)
    load_initial_weights(engine, source)
    engine.start_optimizer()

    def prepare(case: dict[str, Any]) -> Run:
        prompts, responses = rows_of(case)
        lengths = torch.tensor([len(r) for r in responses])
        tokens = int(lengths.sum())

        def measured() -> dict[str, Any]:
            sequences = Sequences.of(prompts, responses)
            if case["mode"] == "step":
                loss = engine.step(sequences, partial(nll, lengths=lengths, tokens=tokens)).loss
            else:
                loss = -float(engine.forward(sequences)["log_probs"].values.sum()) / tokens
            return {"work": sum(map(len, prompts + responses)), "loss": loss}

        return measured

    return prepare


def transformers_adamw(settings: dict[str, Any]) -> Prepare:
    """The plain loop: padded micro-batches, cross entropy of the response's logits, clipping, fused AdamW."""
    import torch

    torch.set_num_threads(settings["threads"])
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)

    def prepare(case: dict[str, Any]) -> Run:
        prompts, responses = rows_of(case)
        total = sum(map(len, responses))

        def share(rows: list[int]) -> torch.Tensor:
            """Of the loss, of one padded micro-batch."""
            width = max(len(prompts[i]) + len(responses[i]) for i in rows)
            ids = torch.zeros(len(rows), width, dtype=torch.long)
            labels = torch.full_like(ids, -100)
            for k, i in enumerate(rows):
                whole = prompts[i] + responses[i]
                ids[k, : len(whole)] = torch.tensor(whole)
                labels[k, len(prompts[i]) : len(whole)] = torch.tensor(responses[i])
            logits, wanted = model(ids, use_cache=False).logits[:, :-1], labels[:, 1:]
            inside = wanted >= 0
            return torch.nn.functional.cross_entropy(logits[inside], wanted[inside], reduction="sum") / total

        def measured() -> dict[str, Any]:
            packs = padded_packs([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], settings["sorted"])
            loss = 0.0
            if case["mode"] == "step":
                model.train()
                for rows in packs:
                    part = share(rows)
                    part.backward()
                    loss += float(part.detach())
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            else:
                model.eval()
                with torch.no_grad():
                    loss = sum(float(share(rows)) for rows in packs)
            return {"work": sum(map(len, prompts + responses)), "loss": loss}

        return measured

    return prepare


def padded_packs(lengths: list[int], by_length: bool) -> list[list[int]]:
    """Rows in micro-batches whose padded area is at most ``BUDGET`` tokens."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__) if by_length else list(range(len(lengths)))
    packs: list[list[int]] = [[]]
    for i in order:
        if packs[-1] and max(lengths[k] for k in [*packs[-1], i]) * (len(packs[-1]) + 1) > BUDGET:
            packs.append([])
        packs[-1].append(i)
    return packs
