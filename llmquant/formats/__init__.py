"""Storage formats: pure functions between a `QuantizedWeight` and named tensors."""
