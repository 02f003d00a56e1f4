"""The entry point of `python -m llmquant` and `torchrun -m llmquant`: the same as the `llmquant` command."""

from llmquant.cli import main

if __name__ == "__main__":
    main()
