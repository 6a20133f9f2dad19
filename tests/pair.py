"""Two processes of one program on this machine, started as a launcher starts them."""

import os
import subprocess
import sys

from tests.training.test_distributed import ROOT, free_port


def run_pair(*arguments: str) -> None:
    """Run `python ARGUMENTS` as both ranks of a pair, and fail with what either of them says."""
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for item in processes:
            _, errors = item.communicate(timeout=300)
            assert item.returncode == 0, errors
    finally:
        for item in processes:
            item.kill()
