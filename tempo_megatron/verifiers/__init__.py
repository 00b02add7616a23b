"""Does a response give the right answer?  One function, ``verify``, over a registry of kinds of answer.

Responses are hostile text: no kind ever executes it, and what is parsed is short.  The trainer calls ``verify`` through
``verifiers.service``, which bounds time and memory in processes of their own.  docs/verifiers.md says what each kind
accepts.
"""

from __future__ import annotations

from tempo_megatron.verifiers.registry import answer_problem, cluster_answers, kind_names, self_problem, verify
from tempo_megatron.verifiers.verdict import Clustered, Verdict

__all__ = ["Clustered", "Verdict", "answer_problem", "cluster_answers", "kind_names", "self_problem", "verify"]
