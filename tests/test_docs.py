"""Documents agree with the code that they quote."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_quoted_lines_are_in_their_files():
    blocks = re.findall(r"```\w+\n(?:#|//) (\S+)\n(.*?)```", (ROOT / "docs" / "adding_an_op.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    for file, block in blocks:
        source = iter((ROOT / file).read_text().splitlines())
        for line in block.splitlines():
            assert line.strip() == "..." or line in source, f"{file} has no such line, or not there: {line}"
