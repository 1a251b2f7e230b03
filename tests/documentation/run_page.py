"""Runs the code blocks of a page in the current directory, in order and as they are written.

    python -m tests.documentation.run_page PAGE

Python blocks share their names, as in one session. The current directory is a workplace (see
`workplace.py`), whose `bin/` comes first in PATH.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from .blocks import Block, read_blocks
from .workplace import SERVERS


def main(page: Path) -> None:
    """Run the blocks of a page that are not marked, and stop the servers that they started."""
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for block in read_blocks(page):
            if block.needs is None:
                began = time.perf_counter()
                print(f"---- {block.place}", flush=True)
                _run(block, names)
                print(f"---- {block.place}: {time.perf_counter() - began:.1f} s", flush=True)
    finally:
        _stop_servers(Path(SERVERS))


def _run(block: Block, names: dict[str, Any]) -> None:
    match block.language:
        case "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
        case "python":
            if "InferenceClient" in block.code:
                constants.HF_HUB_OFFLINE = False  # else it sends nothing, to any address
            exec(compile(block.code, block.place, "exec"), names)
        case _:
            raise ValueError(f"{block.place}: {block.language} cannot be run; mark it with what it needs")


def _stop_servers(pids: Path) -> None:
    for pid in pids.read_text().split() if pids.exists() else []:
        os.kill(int(pid), signal.SIGTERM)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
