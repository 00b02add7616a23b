"""``python -m tests.slurm.cluster [NODES]``: a cluster to try things on by hand, until Ctrl-C."""

from __future__ import annotations

import signal
import sys

from tests.slurm.cluster import SlurmCluster


def main() -> None:
    with SlurmCluster(nodes=int(sys.argv[1]) if len(sys.argv) > 1 else 2) as cluster:
        print(cluster.run("sinfo"), end="")
        print(
            f"In another shell: export SLURM_CONF={cluster.env['SLURM_CONF']}    Ctrl-C ends the cluster.", flush=True
        )
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
