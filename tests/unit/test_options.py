"""What the commands' options take and refuse."""

import argparse
import math

import pytest

from engine.cli.command import restore
from engine.cli.options import gibibytes


@pytest.mark.parametrize("text", ["0", "-1", "-0.5", "nan", "inf", "", "8GB", "1e9"])
def test_an_amount_of_memory_is_a_number_above_zero(text, capsys):
    with pytest.raises(argparse.ArgumentTypeError, match="expected gibibytes"):
        gibibytes(text)
    with pytest.raises(SystemExit) as caught:
        restore(["photo.png", f"--vram-budget={text}"])
    assert caught.value.code == 2
    assert "--vram-budget: expected gibibytes" in capsys.readouterr().err


def test_amounts_of_memory():
    assert gibibytes("7.5") == 7.5
    assert math.isclose(gibibytes("1e-3"), 0.001)
