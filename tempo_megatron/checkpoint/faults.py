"""What libraries raise over a file that cannot be read or written, as one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from megatron.core.dist_checkpointing.core import CheckpointingException
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from tempo_megatron.errors import TempoError

UNREADABLE = "the checkpoint cannot be read"


@contextmanager
def one_line(error_class: type[TempoError], what: str) -> Iterator[None]:
    """What torch and Megatron raise over a full disk, a file in the way or a damaged file, as one line."""
    try:
        yield
    except CheckpointException as error:  # no Exception; on the coordinator it holds what each rank met
        causes = [
            f"rank {at}: {str(cause) or type(cause).__name__}" for at, (cause, _) in sorted(error.failures.items())
        ]
        raise error_class(f"{what}: {causes[0] if causes else 'another rank could not'}") from error
    except (OSError, EOFError, json.JSONDecodeError, SafetensorError, UnpicklingError, CheckpointingException) as error:
        raise error_class(f"{what}: {str(error) or type(error).__name__}") from error
    except RuntimeError as error:
        if not any(name in str(error) for name in ("inline_container", "PytorchStream")):  # torch's zip files
            raise
        raise error_class(f"{what}: {str(error).splitlines()[0]}") from error
