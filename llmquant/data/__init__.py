"""Calibration and evaluation text: its sources, its records, and its tokens."""
