"""What each phase of a step needs on the device: the one table, for the run and for who plans it. Knows no torch."""

from __future__ import annotations

SYNC = "sync"
ROLLOUT_WEIGHTS, KV_CACHE = "rollout.weights", "rollout.kv_cache"

#: Phase -> the parts that are on the device in it. Whatever else may leave, leaves.
NEEDS: dict[str, frozenset[str]] = {
    "rollout": frozenset({ROLLOUT_WEIGHTS, KV_CACHE}),
    "values": frozenset({"critic.weights"}),
    "e_step": frozenset({"critic.weights", "critic.gradients", "critic.optimizer"}),
    "log_probs": frozenset({"actor.weights"}),
    "m_step": frozenset({"actor.weights", "actor.gradients", "actor.optimizer"}),
    SYNC: frozenset({"actor.weights", ROLLOUT_WEIGHTS}),
    "evaluate": frozenset({ROLLOUT_WEIGHTS, KV_CACHE, "critic.weights"}),
}
