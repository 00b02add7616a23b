"""Prompt and SFT records (parquet), their encoding, samplers whose state can be saved, rollouts, packing.

Nothing is imported here: the readers also run in light processes that must not load torch.
"""
