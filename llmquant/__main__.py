"""`python -m llmquant`, and `torchrun -m llmquant`, are the `llmquant` command."""

from llmquant.cli import main

if __name__ == "__main__":
    main()
