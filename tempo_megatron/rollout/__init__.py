"""Sampling with vLLM inside the training processes.

``engine`` holds one vLLM replica per ``tensor_parallel_size`` ranks and the state machine of its weights,
``collect`` deals prompts to the replicas and gathers one batch, ``sampling`` derives the seeds, ``limits`` knows which
models vLLM takes, ``patches`` has everything that vLLM would otherwise do to the process it lives in.
"""
