"""``tempo-megatron demo --study``: every method on the demo task over several seeds, and what follows from it."""
