"""``python -m tempo_megatron.demo.study.inputs FOLDER SEED``: a seed's data and untrained model, in a process of its
own because it loads torch and transformers."""

from __future__ import annotations

import sys
from pathlib import Path

from tempo_megatron.demo.run import DEMO

if __name__ == "__main__":
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    DEMO.prepare(folder, seed)
