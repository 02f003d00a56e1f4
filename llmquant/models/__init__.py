"""The structure of a transformers model: decoder blocks, linears, and block-by-block execution."""
