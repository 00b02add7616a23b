"""Numbers of few bits: their formats, scales and rounding, on plain tensors."""
