"""The version of llmquant."""

__version__ = "0.1.0"
