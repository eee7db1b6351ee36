"""Start-up: importing the package, against importing torch, which it stands on. Each in a fresh process."""

import subprocess
import sys

import harness


def test_import(compare, tmp_path):
    def importing(module):
        return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], cwd=tmp_path, check=True)

    compare(
        harness.Case("import sparseft", "a fresh process"),
        importing("sparseft"),
        {"import torch": importing("torch")},
        rounds=7,
    )
