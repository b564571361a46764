"""A short piece of `make chaos`."""

import pytest

from tests.chaos import main


def test_disturbed_at_random_it_ends_like_one_left_alone(credentials: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--kills", "4", "--seed", "3"]) == 0, capsys.readouterr().out
