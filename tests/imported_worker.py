"""Run by test_imports.py in a process that has imported all that a rank needs: tells what that has left."""

from __future__ import annotations

import json
import sys

import torch

from tempo_megatron.parallel import cpu_shim

if __name__ == "__main__":
    event = torch.cuda.Stream().record_event()
    streams = (torch.cuda.current_stream(), event)
    told = {
        "modules": sorted(name for name, module in sys.modules.items() if module is not None),
        "streams": all(isinstance(stream, cpu_shim._NoStream) for stream in streams),
    }
    print(json.dumps(told))
