"""HF config -> Megatron-Core model, for both roles; one declarative weight map per family."""
