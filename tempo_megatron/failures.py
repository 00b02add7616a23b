"""The one place that turns exceptions into messages and exit codes.

No traceback is shown for what the user can mend (``TempoError``), for what the system has no more of, and for a rank
whose peers are gone.  No torch here: texts of its errors are compared.
"""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Iterator, Sequence

from tempo_megatron.cluster.launch import RankInfo
from tempo_megatron.cluster.lifetime import EXIT_LOST_PEER, say
from tempo_megatron.errors import RunError, TempoError

#: Seconds that a rank waits before it tells what rank 0, or a rank that knows the cause, has most likely told:
#: the launcher ends all ranks with the first that leaves, so that one line is all that is seen.
FOLLOWER_GRACE_S = 5.0

#: Parts of the RuntimeErrors by which gloo, NCCL and the TCP store tell that the other side is gone.
LOST_PEER_TEXTS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection was likely closed",
    "failed to recv, got 0 bytes",
    "ncclremoteerror",
    "remote process exited or there was a network error",
    "nccl communicator was aborted",
)

#: Parts of the errors by which gloo, NCCL and the TCP store tell that a peer did not come in time.
TIMEOUT_TEXTS = (
    "timed out waiting",
    "operation timed out",
    "application timeout caused pair closure",
    "collective operation timeout",
    "wait timeout after",
)

#: Errors of the system that tell of limits and full disks, not of faults of this program.
EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
#: Parts of the RuntimeErrors by which torch's allocators, on the CPU and on a GPU, tell of memory.
OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "cannot allocate memory", "out of memory")


def tell(error: Exception, place: RankInfo | None) -> int:
    """Say what is to be said about ``error`` on this rank; returns the exit code."""
    if isinstance(error, TempoError):
        message = f"error: {' '.join(str(error).split())}"
        if place is not None and place.rank != 0:
            time.sleep(FOLLOWER_GRACE_S)  # what every rank meets is told by rank 0
            message = f"rank {place.rank}: {message}"
        say(message)
        return error.exit_code
    if place is not None and is_lost_peer(error):
        time.sleep(FOLLOWER_GRACE_S)
        say(f"rank {place.rank}: stopped, another rank has ended")
        return EXIT_LOST_PEER
    if place is not None and _is_error_of_ranks(error, TIMEOUT_TEXTS):
        from tempo_megatron.parallel.distributed import missing_ranks

        missing = missing_ranks()
        time.sleep(FOLLOWER_GRACE_S * min(place.rank, 2))  # rank 0, or rank 1 where that is the one, tells
        say(f"error: the ranks waited longer than launch.timeout_s for {missing}")
        return EXIT_LOST_PEER
    exhausted = _exhausted(error)
    if exhausted is not None:
        say("error: " + (f"rank {place.rank}: " if place else "") + exhausted)
        return RunError.exit_code
    say((f"rank {place.rank}: " if place else "") + "".join(traceback.format_exception(error)).rstrip())
    return 1


def _exhausted(error: BaseException) -> str | None:
    """What the system had no more of; None where that is not what ``error`` is about."""
    for cause in _chain(error):
        text = (str(cause).splitlines() or [""])[0]
        if isinstance(cause, OSError) and cause.errno in EXHAUSTED:
            return f"{cause.filename or 'input/output'}: {cause.strerror}; what was saved before is complete"
        if isinstance(cause, MemoryError):
            return f"out of memory: {text or 'the address space is limited (ulimit -v)'}"
        if isinstance(cause, RuntimeError) and any(part in text.lower() for part in OUT_OF_MEMORY_TEXTS):
            return f"out of memory: {text}"
        if isinstance(cause, RuntimeError) and "can't start new thread" in text:
            return "no further thread can be started: limits on processes or memory (ulimit -u, -v)"
    return None


def is_lost_peer(error: BaseException) -> bool:
    """Whether ``error``, or what it was raised from, is a collective that failed because a peer is gone."""
    return _is_error_of_ranks(error, LOST_PEER_TEXTS)


def _is_error_of_ranks(error: BaseException, texts: Sequence[str]) -> bool:
    return any(
        isinstance(cause, RuntimeError) and any(text in str(cause).lower() for text in texts) for cause in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
