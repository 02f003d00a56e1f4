"""The main pipeline: it quantizes a checkpoint block by block, verifies the result, and moves it to OUT."""
