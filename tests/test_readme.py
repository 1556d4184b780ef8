"""What the README shows runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_your_own_network_is_fewer_than_fifteen_lines_that_end_with_a_regime():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own network")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("Verdict(regime='equilibrium'"), result.stderr
    assert len([line for line in code.splitlines() if line.strip()]) < 15


def test_every_option_of_the_command_line_is_in_the_readme():
    help_text = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    options = set(re.findall(r"(?<![\w-])--[a-z-]+", help_text)) - {"--help"}
    assert len(options) > 10 and all(f"`{option}" in readme for option in options), options
