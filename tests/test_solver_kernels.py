"""The quantizer's Triton kernels without a GPU: their results in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

pytest.importorskip("triton")
SUPPORT = Path(__file__).parent / "support"


@pytest.mark.slow
def test_kernels_agree_with_the_torch_form_in_the_interpreter():
    """Run `solver_cases.py` in its own process, since TRITON_INTERPRET must be set before kernels are imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(SUPPORT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUPPORT / "solver_cases.py")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
