"""TensorBoard's event files, where writing them goes wrong. (What is in them: test_training.py, test_sweeps.py.)"""

import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

ON_A_DISK_THAT_IS_FULL = """
import resource, sys
from pathlib import Path
from src.board import Board

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
board = Board(Path(sys.argv[1]), global_step=0)
for step in range(100):
    board.scalars(step, {"train/loss": 1.0})
board.flush()
board.scalars(100, {"train/loss": 1.0})
board.close()
print("training goes on")
"""


def test_a_full_disk_ends_the_curves_with_one_line_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_A_DISK_THAT_IS_FULL, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "training goes on\n")
    line = "TensorBoard's events cannot be written ([Errno 27] File too large): the curves of this process end here"
    assert done.stderr.splitlines() == [line]
