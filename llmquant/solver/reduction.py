"""The order in which the statistics of calibration samples are summed.

The samples are divided, in order, into NUM_CHUNKS chunks. Each chunk is summed on its own, and the chunks are added one
after the other, so that the sum does not depend on the number of processes that share the samples.
"""

NUM_CHUNKS = 8
"""Number of chunks that are summed on their own; at most this many ranks can share the samples."""


def chunk_of(sample: int, num_samples: int) -> int:
    """Return the chunk of a sample."""
    return NUM_CHUNKS * sample // num_samples


def split_of(sample: int, num_samples: int) -> int:
    """Return the split of the text, 0 or 1, to which a sample belongs; non-empty chunks alternate between splits."""
    return (chunk_of(sample, num_samples) if num_samples >= NUM_CHUNKS else sample) % 2
