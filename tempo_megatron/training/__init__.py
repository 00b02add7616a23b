"""One Megatron engine for both roles: forward-only, forward-backward, optimizer."""
