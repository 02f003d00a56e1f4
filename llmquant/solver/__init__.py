"""Quantization of the linears of one decoder block, and the measurements that it uses."""
