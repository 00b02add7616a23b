"""``train`` and then ``evaluate``, both as a user calls them, in one process; launched by ``test_evaluate``.

``evaluate_worker COMMANDS.json``: a list of argument lists for the command line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tempo_megatron import cli


def main() -> int:
    for words in json.loads(Path(sys.argv[1]).read_text()):
        code = cli.main(words)
        if code != 0:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
