"""The first signal asks, a second ^C insists."""

import os
import signal
import subprocess
import sys

from src.preemption import StopSignals
from tests.conftest import REPOSITORY


def test_a_signal_is_noted_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM):
        with StopSignals() as stop:
            assert stop.requested is None
            os.kill(os.getpid(), number)
            assert stop.requested == number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_control_c_ends_the_process_at_once() -> None:
    script = (
        "import os, signal\n"
        "from src.preemption import StopSignals\n"
        "with StopSignals():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('never')\n"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode == -signal.SIGINT
    assert process.stdout == "still here\n"
