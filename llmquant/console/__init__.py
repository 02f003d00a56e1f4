"""The output of the commands: one module per command, and shared modules."""
