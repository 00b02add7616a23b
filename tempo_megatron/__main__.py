"""``python -m tempo_megatron``: the same as the command ``tempo-megatron``."""

from __future__ import annotations

import sys

from tempo_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
