"""Checkpoints: where they lie, what they hold, how a run is saved and goes on."""
