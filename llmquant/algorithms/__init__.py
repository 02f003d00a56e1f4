"""The maths of quantization: functions of tensors that return tensors."""
