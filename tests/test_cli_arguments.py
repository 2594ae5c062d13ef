# SPDX-License-Identifier: BSD-3-Clause
"""Texts on the command line that are no number, or not the right one."""

from __future__ import annotations

import pytest

from resnet_fused.cli.arguments import share, three_numbers
from resnet_fused.cli.main import main

THREE = "must be three numbers such as 0.5,0.5,0.5, got"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compare a b --fail-slower much", "--fail-slower: must be a percentage such as 5%, got"),
        ("compare a b --fail-slower 5%%", "--fail-slower: must be a percentage such as 5%, got"),
        ("compare a b --fail-slower inf", "--fail-slower: must be a percentage such as 5%, got"),
        ("compare a b --fail-slower=-1", "--fail-slower: must be a percentage such as 5%, got"),
        (
            "compare a b --fail-flips few",
            "--fail-flips: must be an integer of at least 0, got 'few'",
        ),
        (
            "compare a b --fail-flips 1.5",
            "--fail-flips: must be an integer of at least 0, got '1.5'",
        ),
        ("compare a b --fail-flips=-1", "--fail-flips: must be an integer of at least 0, got '-1'"),
        ("bench --scenario server --rate fast", "--rate: must be above 0, got 'fast'"),
        ("bench --scenario server --rate=-1", "--rate: must be above 0, got '-1'"),
        ("predict x --max-errors=-1", "--max-errors: must be an integer of at least 0, got '-1'"),
        ("predict x --max-errors no", "--max-errors: must be an integer of at least 0, got 'no'"),
        (f"predict x --batch-size {10**20}", "--batch-size: must be at most 2147483647, got 1000"),
        (f"bench --seed {10**20}", "--seed: must be an integer from 0 to 2147483647, got '1000"),
        ("profile --seed x", "--seed: must be an integer from 0 to 2147483647, got 'x'"),
        ("predict x --mean a,b,c", f"--mean: {THREE} 'a,b,c'"),
        ("predict x --std 1,2", f"--std: {THREE} '1,2'"),
        ("predict x --std 1,2,3,x", f"--std: {THREE} '1,2,3,x'"),
        ("predict x --mean nan,0,0", f"--mean: {THREE} 'nan,0,0'"),
    ],
)
def test_what_is_no_number_is_told(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks if the message names a function of this package instead of the rule, or a value that
    means nothing (a negative count of errors) is taken."""
    with pytest.raises(SystemExit):
        main(command.split())
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_is_a_number_is_read() -> None:
    """Breaks if a check refuses or changes what it should take."""
    assert share("5%") == share("5") == 0.05 and share("0") == 0
    assert three_numbers("0.5,1,-2e-1") == (0.5, 1.0, -0.2)
