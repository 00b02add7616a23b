"""Does a response give the right answer?  One function, ``verify``, over a registry of kinds of answer.

Responses are hostile text: every kind works in time linear in the response and never evaluates it.  The trainer
calls ``verify`` through ``verifiers.service``, which bounds time and memory in a process of its own.
"""

from __future__ import annotations

from tempo_megatron.verifiers.registry import answer_problem, kind_names, verify
from tempo_megatron.verifiers.verdict import Verdict

__all__ = ["Verdict", "answer_problem", "kind_names", "verify"]
