"""Execution of quantized models: loading, generation, evaluation and benchmarks."""
