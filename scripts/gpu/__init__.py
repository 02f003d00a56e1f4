"""The sections of `scripts/gpu_check.py`, one module for each group of measurements.

`runs.py` and `processes.py` run a section in a process of its own and record what it finds; `checkpoints.py` writes the
random model that the sections quantize; `summary.py` prints the last tables.
"""
