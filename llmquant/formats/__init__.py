"""Storage formats: pure functions that convert a `QuantizedWeight` to named tensors and back."""
