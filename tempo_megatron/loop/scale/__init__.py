"""``train --dry-run --nodes N``: one step of a job of any size, walked through as a few of its ranks in one process.

What is called is what training calls, on tensors without numbers (``parallel.played``).
"""
