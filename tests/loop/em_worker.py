"""The program that runs the cases of em_runs: light, because each run's child processes import it once more."""

from __future__ import annotations

if __name__ == "__main__":
    from tests.loop import em_runs

    em_runs.main()
