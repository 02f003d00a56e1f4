"""Checkpoint folders: validated lazy reading, crash-safe writing, and manifests."""
