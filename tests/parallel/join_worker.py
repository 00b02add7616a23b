"""One rank of two that joins as ``RANK PORT ADDRESS`` say, for at most 3 s.

``mute PORT``: both ranks, of which rank 1 joins and then does nothing.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

from tempo_megatron.errors import TempoError
from tempo_megatron.parallel import joining
from tempo_megatron.parallel.distributed import start

if __name__ == "__main__":
    if sys.argv[1] == "mute":
        os.environ.update(MASTER_PORT=sys.argv[2])
    else:
        own, port, address = sys.argv[1:]
        os.environ.update(RANK=own, LOCAL_RANK=own, WORLD_SIZE="2", MASTER_ADDR=address, MASTER_PORT=port)
    joining.RESOLVE_S = 1.0
    try:
        if sys.argv[1] == "mute" and os.environ["RANK"] == "1":
            joining.join_store(1, 2, timedelta(seconds=20))
            time.sleep(600)
        start(1, 3)
    except TempoError as error:
        print(error.exit_code, error, flush=True)
        os._exit(error.exit_code)
