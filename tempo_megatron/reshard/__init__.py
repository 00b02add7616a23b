"""Weights from one layout of ranks into another: the plan as pure data, its execution, and the proof."""
