"""The order in which the statistics of calibration samples are summed.

The samples are divided, in order, into NUM_CHUNKS chunks, and each chunk into PIECES_PER_CHUNK pieces. Each piece is
summed on its own. The pieces of a chunk are added in order, and then the chunks are added one after the other. So the
sum does not depend on the number of processes that share the samples.

There are two levels to save memory. A process holds the sum of each whole chunk that it has, because it can add these
only after it has received the sum of the earlier chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llmquant.algorithms.statistics import InputStatistics

NUM_CHUNKS = 8
"""Number of chunks."""
PIECES_PER_CHUNK = 2
"""Number of pieces of a chunk."""
NUM_PIECES = NUM_CHUNKS * PIECES_PER_CHUNK
"""Number of pieces that are summed on their own; at most this many ranks can share the samples."""


def piece_of(sample: int, num_samples: int) -> int:
    """Return the piece of a sample."""
    return NUM_PIECES * sample // num_samples


def chunk_of(sample: int, num_samples: int) -> int:
    """Return the chunk of a sample, which is the chunk of its piece."""
    return chunk_of_piece(piece_of(sample, num_samples))


def chunk_of_piece(piece: int) -> int:
    """Return the chunk of a piece."""
    return piece // PIECES_PER_CHUNK


def starts_inside_chunk(piece: int) -> bool:
    """Return whether a piece is not the first of its chunk."""
    return piece % PIECES_PER_CHUNK > 0


def split_of(sample: int, num_samples: int) -> int:
    """Return the split of the text, 0 or 1, to which a sample belongs; non-empty chunks alternate between splits."""
    return (chunk_of(sample, num_samples) if num_samples >= NUM_CHUNKS else sample) % 2


@dataclass
class PieceSum:
    """A sum of pieces in order: the sum of whole chunks, and that of the pieces of a chunk that may go on."""

    closed: InputStatistics | None = None
    """The sum of the whole chunks; None if there are none."""
    open: InputStatistics | None = None
    """The sum of the pieces of the last chunk; None if there are none."""
    chunk: int = -1
    """Number of the chunk of `open`."""

    def add(self, chunk: int, statistics: InputStatistics) -> None:
        """Add the next piece of a chunk, or the sum of all its pieces. The caller gives the statistics away."""
        if self.open is not None and self.chunk == chunk:
            self.open.merge(statistics)
            return
        self.close()
        self.chunk, self.open = chunk, statistics

    def close(self) -> InputStatistics | None:
        """Add the last chunk to the others, and return their sum; None if nothing was added."""
        if self.closed is None:
            self.closed = self.open
        elif self.open is not None:
            self.closed.merge(self.open)
        self.open = None
        return self.closed


def sums_of_chunks(pieces: Iterable[tuple[int, InputStatistics]], first: int) -> Iterator[tuple[int, InputStatistics]]:
    """Yield the number and the sum of each chunk. Pieces of a chunk that began before `first` are yielded alone.

    pieces: the numbers of consecutive pieces and their statistics, in order. first: number of the first piece of all,
    which may have no statistics.
    """
    current = PieceSum()
    for piece, statistics in pieces:
        chunk = chunk_of_piece(piece)
        if chunk_of_piece(first) == chunk and starts_inside_chunk(first):
            yield chunk, statistics
        elif current.open is not None and current.chunk == chunk:
            current.add(chunk, statistics)
        else:
            if current.open is not None:
                yield current.chunk, current.open
            current = PieceSum(open=statistics, chunk=chunk)
        # Without `del`, this piece would stay in memory until the next piece is complete.
        del statistics
    if current.open is not None:
        yield current.chunk, current.open
