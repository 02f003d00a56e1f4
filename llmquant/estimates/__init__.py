"""Estimates of the memory, disk space and duration of a run, made before any weight is read."""
