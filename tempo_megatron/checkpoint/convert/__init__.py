"""HF folder to Megatron checkpoint and back, in one process for any layout."""
