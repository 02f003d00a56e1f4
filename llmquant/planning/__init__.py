"""Decisions that need no weights: the linears to quantize, their grids, the engines' rules, and the held-out texts."""
