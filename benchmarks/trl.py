"""A training step of TRL's nearest trainer, GRPOTrainer, against our stage ``grpo``.

The same model, prompts, samples of a prompt, temperature, reward (the demo's answer is right) and optimizer;
micro-batches of at most as many tokens, padding counted. A step is whole: sampling, reward, advantages, loss, AdamW,
weights to the sampler. TRL samples by transformers: it can't bring new weights to a vLLM on the CPU ("'Parameter'
object has no attribute 'weight_loader'": vLLM packs its weights there). It needs packages of its own
(requirements/bench-trl.txt): ``make bench BENCH=trl`` installs them.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import Contender, Prepare, Run, compare, started
from benchmarks.report import Options, Report, ahead_of
from benchmarks.worlds import beside, write_demo, write_settings

PROMPTS, SAMPLES, PROMPT, RESPONSE, ROWS, LR, KV_GIB = 16, 8, 8, 64, 32, 1e-5, 0.25
OURS, TRL = "ours", "TRL's GRPOTrainer"


def run(options: Options) -> Report:
    size = {"hidden": 64, "layers": 2} if options.small else {"hidden": 320, "layers": 6}
    with tempfile.TemporaryDirectory() as folder:
        write_demo(Path(folder), **size, positions=128)
        settings = {"folder": folder}
        contenders = [
            Contender(OURS, "benchmarks.trl:ours", settings),
            Contender(TRL, "benchmarks.trl:grpo_trainer", settings),
        ]
        what = f"a step of {PROMPTS} prompts, {SAMPLES} samples of at most {RESPONSE} tokens each"
        with started(contenders) as running:
            comparison = compare(what, {}, running, options.rounds, warm_up=2)
    figures = ahead_of(comparison, TRL, f"a GRPO step: against {TRL}, which samples by transformers", ">= 1")
    about = (
        "Tokens trained on per second of a whole step, one thread, float32, no reference model; a policy of random "
        "weights, so responses end at random. Ours verifies answers in a process of its own, whose time is in it."
    )
    return Report("trl", about, [comparison], figures)


def ours(settings: dict[str, Any]) -> Prepare:
    """``EMLoop`` with every sink and record that a run has."""
    from tempo_megatron.config.load import load_config
    from tempo_megatron.loop import load_libraries

    folder = Path(settings["folder"])
    file = write_settings(Path(tempfile.mkdtemp(dir=folder)), folder, ranks=1, steps=10**6)
    config = load_config(
        file,
        [
            "stage=grpo",
            "critic=null",
            f"actor.optimizer.lr={LR}",
            f"actor.max_tokens_per_microbatch={ROWS * (PROMPT + RESPONSE)}",
            f"data.labeled_prompts_per_step={PROMPTS}",
            "data.unlabeled_prompts_per_step=0",
            f"data.max_response_tokens={RESPONSE}",
            f"rollout.samples_per_prompt={SAMPLES}",
            f"rollout.kv_cache_gib={KV_GIB}",
            f"rollout.max_num_seqs={PROMPTS * SAMPLES}",
            "rollout.max_num_batched_tokens=4096",  # as TRL has it
            f"launch.threads_per_rank={settings['threads']}",
        ],
    )
    load_libraries(config)
    from tempo_megatron.loop.em import EMLoop
    from tempo_megatron.loop.session import Session

    open_ = ExitStack()
    session = open_.enter_context(Session(config))
    loop = EMLoop(session)
    open_.enter_context(session.running(0))
    loop.begin()

    def prepare(case: dict[str, Any]) -> Run:
        def measured() -> dict[str, Any]:
            loop.step += 1
            outcome = loop.train_step()
            loop.step_boundary(outcome)
            mean = outcome.metrics["response/tokens/mean"]
            return {"work": PROMPTS * SAMPLES * (PROMPT_TOKENS + mean), "response_tokens": mean, "open": bool(open_)}

        return measured

    return prepare


#: Of every prompt of the demo's task.
PROMPT_TOKENS = 6


def grpo_trainer(settings: dict[str, Any]) -> Prepare:
    """``GRPOTrainer.train()`` in a thread that stops before every step until it is measured."""
    sys.path.append(str(beside("trl")))
    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(settings["threads"])
    folder = Path(settings["folder"])
    table = pq.read_table(folder / "data" / "train.parquet").to_pylist()
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in table if row["answer"] is not None]
    tokens: list[int] = []

    def right(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [float(text == answer) for text, answer in zip(columns["completions"], columns["answer"], strict=True)]

    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class InTurns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            done.release()
            go.acquire()

    trainer = GRPOTrainer(
        model=str(folder / "model"),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        reward_funcs=right,
        train_dataset=Dataset.from_list(rows),
        callbacks=[InTurns()],
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(dir=folder),
            use_cpu=True,
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=PROMPTS * SAMPLES // ROWS,
            num_generations=SAMPLES,
            max_completion_length=RESPONSE,
            learning_rate=LR,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            beta=0.0,
            loss_type="grpo",
            max_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            model_init_kwargs={"dtype": torch.float32},
        ),
    )
    thread = threading.Thread(target=trainer.train, daemon=True)
    thread.start()
    _turn(done, thread)

    def prepare(case: dict[str, Any]) -> Run:
        def measured() -> dict[str, Any]:
            tokens.clear()
            go.release()
            _turn(done, thread)
            return {"work": PROMPTS * SAMPLES * PROMPT_TOKENS + sum(tokens), "response_tokens": sum(tokens)}

        return measured

    return prepare


def _turn(done: threading.Semaphore, thread: threading.Thread) -> None:
    """Wait until the trainer stands before its next step."""
    while not done.acquire(timeout=1.0):
        if not thread.is_alive():
            raise RuntimeError("the trainer's thread has ended")
