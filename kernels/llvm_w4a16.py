"""The program of backend `llvm`: y = x @ W.T from 4-bit codes, written in LLVM assembly for any x86 processor.

A vector holds 16 output features, so that no sum crosses lanes. One 32-bit word holds eight columns of one feature.
With column k = 8 s + 2 p + e (p in 0 … 3, e in 0, 1):

    word[n, s], nibble p + 4 e   is   code[n, 8 s + 2 p + e]

Nibbles p and p + 4 are neighbours in K and lie sixteen bits apart. For x in bfloat16, `(word >> 4p) & 0x000F000F |
0x43004300` is a pair of weights as the processor's dot product reads them: 0x4300 has the bits of 128, and the code
fills its lowest mantissa bits. This takes two instructions for 32 weights. For x in float32, each code is extracted
and converted.

All columns of a block share one scale and one zero-point per feature. In float32, the program subtracts the zero-point
from each code. In bfloat16 that would cost as much as decoding, so the sum of a block's products starts at
-(128 + zero) times the sum of the block's x. Each block then adds scale * sum to the total, in float32. Weights are
never rounded.

For few rows of x (`fused`), the program takes five rows and 64 features at a time and decodes the words as it reads
them. For many rows, it decodes the codes of 64 features and some blocks once into a `panel`, and multiplies all rows of
a chunk by the panel, six rows at a time. Both ways add in the same order, so a row of y has the same bits in any batch
and with any number of threads.

The module has four entry points. All threads call `@sums` and then `@matmul`; a single thread calls only `@matmul`,
which then computes the sums first. `@unpack` writes the dense weight. `@dense` multiplies by a bfloat16 weight, for a
head that stays in 16 bits.

Letters: M rows of x, N out_features, S slots (columns of x, see `layout`), B blocks of them, P planes (2 for 8-bit
codes: the high and the low nibbles, as two weights over the same x), T tiles of 64 features.

All arrays are contiguous: x [M, S]; words uint32 [T, P*S/8, 64], for `@dense` pairs of bfloat16 [T, S/2, 64, 2]; scale
[T, P*B, 64]; zero uint8 [T, P*B, 64]; bias float32 [N] or null; sums float32 [M, B], which `@sums` fills; y in the
dtype of x, [M, N], or [S, N] from `@unpack`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmquant.kernels.assembly import DECLARATIONS, FLOATS, LANES, WORDS, Function, floats, ints

TILE_FEATURES = 64
"""Output features in a tile, whose words are stored side by side. The words of 16 features fill one cache line."""
COLUMNS_PER_WORD = 8
"""Columns whose 4-bit codes one word holds."""
MAX_BLOCK = 128
"""Columns of the widest block that the backend uses."""
PANEL = 512
"""Columns that are decoded into one panel. In bfloat16, a panel takes 64 KiB and stays in the second-level cache."""
MAX_CHUNK = 240
"""Largest number of rows of x in a chunk. The rows of a chunk share a panel. Their float32 totals take 60 KiB of a
thread's stack, and the panel takes another 64 KiB (bfloat16) or 128 KiB (float32)."""
FUSED_BELOW_ROWS = 24
"""Rows of a chunk from which decoding into a panel is faster, measured by `scripts/bench/linear.py`."""

ARGUMENTS = dict.fromkeys(("x", "words", "scale", "zero", "bias", "sums", "y"), "ptr") | dict.fromkeys(
    ("num_rows", "out_features", "num_blocks", "words_per_block", "num_planes", "chunk", "num_threads"), "i64"
)
"""Fields of the struct that the entry points take: name -> LLVM type. `words_per_block` counts words per feature,
`chunk` the rows of x in a task."""
ENTRY_POINTS = ("sums", "matmul", "unpack", "dense")
"""Functions that can be called from outside; see the module docstring."""

_INTRINSICS = """
declare float @llvm.vector.reduce.fadd.v8f32(float, <8 x float>)
declare <16 x float> @llvm.masked.load.v16f32.p0(ptr, i32, <16 x i1>, <16 x float>)
declare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, i32, <16 x i1>)
declare void @llvm.masked.store.v16bf16.p0(<16 x bfloat>, ptr, i32, <16 x i1>)
"""
"""Declarations of the LLVM functions that this program calls beyond `assembly.DECLARATIONS`."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A variant of the program. Its LLVM text depends on these fields."""

    x: str
    """LLVM type of x and y: "bfloat" (for processors with a dot product of bfloat16 pairs) or "float"."""
    scale: str
    """LLVM type of the scales: "half", "bfloat" or "float"."""
    wide: bool
    """Whether there are 32 registers of 512 bits (AVX-512) rather than 16 of 256 bits (AVX2)."""

    @property
    def x_bytes(self) -> int:
        """Bytes of an element of x."""
        return 2 if self.x == "bfloat" else 4

    @property
    def operands_per_word(self) -> int:
        """Operands of 32 bits that a word decodes to: 4 pairs of bfloat16 weights, or 8 single float32 weights."""
        return COLUMNS_PER_WORD * self.x_bytes // 4

    @property
    def fused_rows(self) -> int:
        """Rows of x that `fused` takes at a time."""
        return 5

    @property
    def panel_rows(self) -> int:
        """Rows of x that `panel` and `dense` take at a time."""
        return 6

    def vectors(self, rows: int) -> int:
        """Vectors of 16 features to take with this number of rows, so that the sums fit into the registers."""
        if self.wide or rows == 1:
            return 4
        return 2 if rows == 2 else 1

    def text(self) -> str:
        """Return the whole program as LLVM text."""
        functions = [_fused_tile(self, rows) for rows in range(1, self.fused_rows + 1)]
        functions += [_panel_tile(self, rows) for rows in range(1, self.panel_rows + 1)]
        functions += [_chunk(self), _matmul(self), _sums(self), _unpack(self)]
        functions += [_dense_tile(self, rows) for rows in range(1, self.panel_rows + 1)]
        functions += [_dense(self)]
        return DECLARATIONS + _INTRINSICS + "\n".join(function.text() for function in functions)


def _decode(f: Function, program: Program, word: str, operand: int, zero: str) -> str:
    """Decode one operand of each of 16 words: two weights 128 + code in bfloat16, or one code - zero in float32."""
    if program.x == "float":
        level = f(f"fsub {FLOATS} {_code(f, word, operand)}, {zero}")
        return f(f"bitcast {FLOATS} {level} to {WORDS}")
    pair = f.shifted(word, 4 * operand)
    return f(f"or {WORDS} {f(f'and {WORDS} {pair}, {ints(0x000F000F)}')}, {ints(0x43004300)}")


def _code(f: Function, word: str, column: int) -> str:
    """Extract the code of one of the eight columns from each of 16 words, as float32."""
    code = f(f"and {WORDS} {f.shifted(word, 4 * (column // 2) + 16 * (column % 2))}, {ints(15)}")
    return f(f"sitofp {WORDS} {code} to {FLOATS}")


def _multiply(f: Function, program: Program, weight: str, x: str, total: str) -> str:
    """Emit total + weight * x in 16 lanes of float32; weight and x have 32 bits per lane."""
    if program.x == "bfloat":
        return f.dot_pairs(weight, x, total)
    return f.fma(f(f"bitcast {WORDS} {weight} to {FLOATS}"), f(f"bitcast {WORDS} {x} to {FLOATS}"), total)


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """A tile of y: some rows and 16 * vectors features. Its fields are names of values in the generated function."""

    totals: list[list[str]]
    """Address of the 16 float32 totals of each [row][vector]."""
    row: str
    """Index of the first row."""
    feature: str
    """Index of the first feature."""

    @property
    def vectors(self) -> int:
        """Vectors of 16 features."""
        return len(self.totals[0])


def _num_slots(f: Function) -> str:
    """Emit S, the number of slots."""
    return f.mul(f.mul(f.argument("num_blocks"), f.argument("words_per_block")), COLUMNS_PER_WORD)


def _index_of(f: Function, feature: str, block: str, width: str | int = 1) -> str:
    """Emit the index of a feature and a block in an array [T, P*B, width, 64]. Blocks are counted over all planes."""
    blocks = f.mul(f.argument("num_blocks"), f.argument("num_planes"))
    line = f.mul(f.add(f.mul(f(f"lshr i64 {feature}, 6"), blocks), block), width)
    return f.add(f.mul(line, TILE_FEATURES), f(f"and i64 {feature}, {TILE_FEATURES - 1}"))


def _rows_of_x(f: Function, program: Program, tile: _Tile, start: str | int) -> list[str]:
    """Emit the address of the slot `start` in each row of x of a tile."""
    x, num_slots = f.argument("x"), _num_slots(f)
    rows = [f.mul(f.add(tile.row, row), num_slots) for row in range(len(tile.totals))]
    return [f.at(x, f.add(row, start), program.x) for row in rows]


def _load_weights(f: Function, panel: str, line: str, offset: str, vectors: int) -> list[str]:
    """Load decoded weights from one line of a panel [operands, 64], in vectors of 16 features from `offset` on."""
    first = f.at(panel, f.add(f.mul(line, TILE_FEATURES), offset), "i32")
    return [f.load(f.at(first, LANES * vector, "i32"), WORDS, 4) for vector in range(vectors)]


def _add_products(
    f: Function, program: Program, weights: list[str], x_rows: list[str], index: str, sums: list[list[str]]
) -> None:
    """Emit sums[row][vector] += weights[vector] * x[row] for operand `index` of each row of x."""
    for x_row, row_sums in zip(x_rows, sums, strict=True):
        x = f.splat(f.load(f.at(x_row, index, "i32"), "i32", 4), "i32")
        for weight, total in zip(weights, row_sums, strict=True):
            f.store(total, FLOATS, _multiply(f, program, weight, x, f.load(total, FLOATS)))


def _add_block(f: Function, program: Program, tile: _Tile, block: str, block_of_x: str, panel: str | None) -> None:
    """Emit totals += scale * (the products of one block of columns).

    panel: address of the block's decoded weights; if None, decode the words here.
    """
    words_per_block = f.argument("words_per_block")
    sums = _initial_sums(f, program, tile, block, block_of_x)
    x_rows = _rows_of_x(f, program, tile, f.mul(f.mul(block_of_x, words_per_block), COLUMNS_PER_WORD))
    words = f.at(f.argument("words"), _index_of(f, tile.feature, block, words_per_block), "i32")
    offset = f(f"and i64 {tile.feature}, {TILE_FEATURES - 1}")
    zeros = (
        _load_zeros(f, tile.feature, block, tile.vectors)
        if panel is None and program.x == "float"
        else [""] * tile.vectors
    )
    with f.loop(0, words_per_block) as word_index:
        if panel is None:
            line = f.at(words, f.mul(word_index, TILE_FEATURES), "i32")
            words_of_vectors = [f.load(f.at(line, LANES * vector, "i32"), WORDS, 4) for vector in range(tile.vectors)]
        for operand in range(program.operands_per_word):
            index = f.add(f.mul(word_index, program.operands_per_word), operand)
            if panel is None:
                weights = [
                    _decode(f, program, word, operand, zero) for word, zero in zip(words_of_vectors, zeros, strict=True)
                ]
            else:
                weights = _load_weights(f, panel, index, offset, tile.vectors)
            _add_products(f, program, weights, x_rows, index, sums)
    for vector in range(tile.vectors):
        scale = _load_scale(f, program, _index_of(f, f.add(tile.feature, LANES * vector), block))
        for row_sums, totals in zip(sums, tile.totals, strict=True):
            total = f.fma(f.load(row_sums[vector], FLOATS), scale, f.load(totals[vector], FLOATS, 64))
            f.store(totals[vector], FLOATS, total)


def _initial_sums(f: Function, program: Program, tile: _Tile, block: str, block_of_x: str) -> list[list[str]]:
    """Emit the initial sums [row][vector] of a block: -(128 + zero) * sum of x for bfloat16, else zeros."""
    if program.x == "float":
        return [[f.variable(FLOATS, "zeroinitializer") for _ in row_sums] for row_sums in tile.totals]
    bases = [f(f"fsub {FLOATS} {floats(-128)}, {zero}") for zero in _load_zeros(f, tile.feature, block, tile.vectors)]
    sums = []
    for row in range(len(tile.totals)):
        index = f.add(f.mul(f.add(tile.row, row), f.argument("num_blocks")), block_of_x)
        sum_of_x = f.splat(f.load(f.at(f.argument("sums"), index, "float"), "float"), "float")
        sums.append([f.variable(FLOATS, f(f"fmul {FLOATS} {base}, {sum_of_x}")) for base in bases])
    return sums


def _load_scale(f: Function, program: Program, index: str) -> str:
    """Load the scales of 16 features, as float32."""
    scale = f.load(f.at(f.argument("scale"), index, program.scale), f"<16 x {program.scale}>", 2)
    return scale if program.scale == "float" else f(f"fpext <16 x {program.scale}> {scale} to {FLOATS}")


def _load_zeros(f: Function, feature: str, block: str, vectors: int) -> list[str]:
    """Load the zero-points of some vectors of 16 features, as float32."""
    zeros = []
    for vector in range(vectors):
        index = _index_of(f, f.add(feature, LANES * vector), block)
        zero = f.load(f.at(f.argument("zero"), index, "i8"), "<16 x i8>", 1)
        zeros.append(f(f"uitofp <16 x i8> {zero} to {FLOATS}"))
    return zeros


def _write_tile(f: Function, program: Program, tile: _Tile) -> None:
    """Store y = totals + bias, rounded once."""
    bias = f.argument("bias")
    has_bias = f(f"icmp ne ptr {bias}, null")
    for vector in range(tile.vectors):
        feature = f.add(tile.feature, LANES * vector)
        remaining, mask = _remaining_features(f, feature)
        added = f.variable(FLOATS, "zeroinitializer")
        # Branch, because a masked load from an invalid address takes hundreds of cycles.
        with f.when(has_bias):
            call = f"call {FLOATS} @llvm.masked.load.v16f32.p0(ptr {f.at(bias, feature, 'float')}, i32 4"
            f.store(added, FLOATS, f(f"{call}, <16 x i1> {mask}, {FLOATS} zeroinitializer)"))
        for row, totals in enumerate(tile.totals):
            value = f(f"fadd {FLOATS} {f.load(totals[vector], FLOATS, 64)}, {f.load(added, FLOATS)}")
            _store(f, program, value, f.add(tile.row, row), feature, remaining, mask)


def _remaining_features(f: Function, feature: str) -> tuple[str, str]:
    """Emit the number of features from this one on, and a mask that marks which of the next 16 exist."""
    remaining = f(f"sub nsw i64 {f.argument('out_features')}, {feature}")
    lanes = "<" + ", ".join(f"i64 {lane}" for lane in range(LANES)) + ">"
    return remaining, f(f"icmp slt <16 x i64> {lanes}, {f.splat(remaining, 'i64')}")


def _store(f: Function, program: Program, value: str, row: str, feature: str, remaining: str, mask: str) -> None:
    """Round 16 float32 to the dtype of y and store them; features beyond the last are not written."""
    kind, suffix = FLOATS, "f32"
    if program.x == "bfloat":
        kind, suffix = "<16 x bfloat>", "bf16"
        value = f(f"fptrunc {FLOATS} {value} to {kind}")
    address = f.at(f.argument("y"), f.add(f.mul(row, f.argument("out_features")), feature), program.x)
    is_whole = f(f"icmp sge i64 {remaining}, {LANES}")
    with f.when(is_whole):
        f.emit(f"store {kind} {value}, ptr {address}, align {program.x_bytes}")
    with f.when(f(f"xor i1 {is_whole}, true")):
        call = f"call void @llvm.masked.store.v16{suffix}.p0({kind} {value}, ptr {address}, i32 {program.x_bytes}"
        f.emit(f"{call}, <16 x i1> {mask})")


def _fused_tile(program: Program, rows: int) -> Function:
    """Return the function `fused<rows>`, which computes `rows` rows and 64 features of y from the words."""
    f = Function(f"fused{rows}", ARGUMENTS, "i64 %row, i64 %feature")
    vectors = program.vectors(rows)
    with f.loop(0, TILE_FEATURES, LANES * vectors) as offset:
        totals = [[f.variable(FLOATS, "zeroinitializer") for _ in range(vectors)] for _ in range(rows)]
        tile = _Tile(totals=totals, row="%row", feature=f.add("%feature", offset))
        num_blocks = f.argument("num_blocks")
        with f.loop(0, f.argument("num_planes")) as plane:
            first = f.mul(plane, num_blocks)
            with f.loop(0, num_blocks) as block:
                _add_block(f, program, tile, f.add(first, block), block, None)
        _write_tile(f, program, tile)
    return f


def _panel_tile(program: Program, rows: int) -> Function:
    """Return the function `panel<rows>`, which adds the products of the blocks %first … %stop - 1 of one plane to
    totals in memory [rows, 64]. The panel begins with block %first."""
    f = Function(
        f"panel{rows}",
        ARGUMENTS,
        "ptr %panel, ptr %memory, i64 %row, i64 %feature, i64 %plane, i64 %first, i64 %stop",
    )
    vectors = program.vectors(rows)
    size = f.mul(f.mul(f.argument("words_per_block"), program.operands_per_word), TILE_FEATURES)
    before = f.mul("%plane", f.argument("num_blocks"))
    with f.loop(0, TILE_FEATURES, LANES * vectors) as offset:
        memory = [
            [f.at("%memory", f.add(offset, TILE_FEATURES * row + LANES * vector), "float") for vector in range(vectors)]
            for row in range(rows)
        ]
        totals = [[f.variable(FLOATS, f.load(address, FLOATS, 64)) for address in row_sums] for row_sums in memory]
        tile = _Tile(totals=totals, row="%row", feature=f.add("%feature", offset))
        with f.loop("%first", "%stop") as block:
            panel = f.at("%panel", f.mul(f(f"sub nsw i64 {block}, %first"), size), "i32")
            _add_block(f, program, tile, f.add(before, block), block, panel)
        for addresses, row_sums in zip(memory, totals, strict=True):
            for address, total in zip(addresses, row_sums, strict=True):
                f.store(address, FLOATS, f.load(total, FLOATS))
    return f


def _chunk(program: Program) -> Function:
    """Return the function `chunk`. It computes 64 features of the rows %row … %stop - 1, at most MAX_CHUNK, one panel
    at a time."""
    f = Function("chunk", ARGUMENTS, "i64 %row, i64 %stop, i64 %feature")
    panel = f.variable(f"[{PANEL // COLUMNS_PER_WORD * program.operands_per_word * TILE_FEATURES} x i32]")
    totals = f.variable(f"[{MAX_CHUNK * TILE_FEATURES} x float]")
    vectors = TILE_FEATURES // LANES
    with f.loop("%row", "%stop") as row:
        line = f.at(totals, f.mul(f(f"sub nsw i64 {row}, %row"), TILE_FEATURES), "float")
        for vector in range(vectors):
            f.store(f.at(line, LANES * vector, "float"), FLOATS, "zeroinitializer")
    num_blocks, words_per_block = f.argument("num_blocks"), f.argument("words_per_block")
    blocks_per_panel = f(f"sdiv i64 {PANEL // COLUMNS_PER_WORD}, {words_per_block}")
    num_panels = f(f"sdiv i64 {f(f'sub nsw i64 {f.add(num_blocks, blocks_per_panel)}, 1')}, {blocks_per_panel}")
    with f.loop(0, f.argument("num_planes")) as plane, f.loop(0, num_panels) as panel_index:
        first = f.mul(panel_index, blocks_per_panel)
        last = f.minimum(f.add(first, blocks_per_panel), num_blocks)
        with f.loop(first, last) as block:
            plane_block = f.add(f.mul(plane, num_blocks), block)
            words = f.at(f.argument("words"), _index_of(f, "%feature", plane_block, words_per_block), "i32")
            before = f.mul(f(f"sub nsw i64 {block}, {first}"), words_per_block)
            zeros = _load_zeros(f, "%feature", plane_block, vectors) if program.x == "float" else [""] * vectors
            with f.loop(0, words_per_block) as word_index:
                for vector, zero in enumerate(zeros):
                    word = f.load(f.at(words, f.add(f.mul(word_index, TILE_FEATURES), LANES * vector), "i32"), WORDS, 4)
                    for operand in range(program.operands_per_word):
                        line = f.add(f.mul(f.add(before, word_index), program.operands_per_word), operand)
                        address = f.at(panel, f.add(f.mul(line, TILE_FEATURES), LANES * vector), "i32")
                        f.store(address, WORDS, _decode(f, program, word, operand, zero))
        with f.loop("%row", "%stop", program.panel_rows) as row:
            rows = f.minimum(f(f"sub nsw i64 %stop, {row}"), program.panel_rows)
            line = f.at(totals, f.mul(f(f"sub nsw i64 {row}, %row"), TILE_FEATURES), "float")
            arguments = f"ptr %arguments, ptr {panel}, ptr {line}, i64 {row}, i64 %feature"
            arguments += f", i64 {plane}, i64 {first}, i64 {last}"
            f.call_for_rows(rows, "panel", program.panel_rows, arguments)
    with f.loop("%row", "%stop") as row:
        line = f.at(totals, f.mul(f(f"sub nsw i64 {row}, %row"), TILE_FEATURES), "float")
        row_sums = [f.at(line, LANES * vector, "float") for vector in range(vectors)]
        _write_tile(f, program, _Tile(totals=[row_sums], row=row, feature="%feature"))
    return f


def _num_tiles(f: Function) -> str:
    """Emit T, the number of tiles of 64 features."""
    return f(f"sdiv i64 {f.add(f.argument('out_features'), TILE_FEATURES - 1)}, {TILE_FEATURES}")


def _matmul(program: Program) -> Function:
    """Return the entry point `matmul`. A task is 64 features of a chunk of rows."""
    f = Function("matmul", ARGUMENTS, entry=True)
    num_rows, size = f.argument("num_rows"), f.argument("chunk")
    tiles = _num_tiles(f)
    chunks = f(f"sdiv i64 {f(f'sub nsw i64 {f.add(num_rows, size)}, 1')}, {size}")
    with f.when(f(f"icmp eq i64 {f.argument('num_threads')}, 1")):
        f.emit("call void @sums(ptr %arguments)")
    first, stop = f.task_range(f.mul(tiles, chunks))
    with f.loop(first, stop) as task:
        feature = f.mul(f(f"srem i64 {task}, {tiles}"), TILE_FEATURES)
        row = f.mul(f(f"sdiv i64 {task}, {tiles}"), size)
        last = f.minimum(f.add(row, size), num_rows)
        rows = f(f"sub nsw i64 {last}, {row}")
        is_fused = f(f"icmp slt i64 {rows}, {FUSED_BELOW_ROWS}")
        with f.when(f(f"xor i1 {is_fused}, true")):
            f.emit(f"call void @chunk(ptr %arguments, i64 {row}, i64 {last}, i64 {feature})")
        with f.when(is_fused):
            # Split the rows as evenly as possible: eight rows become four and four.
            num_row_blocks = f(f"sdiv i64 {f.add(rows, program.fused_rows - 1)}, {program.fused_rows}")
            with f.loop(0, num_row_blocks) as row_block:
                begin = f(f"sdiv i64 {f.mul(row_block, rows)}, {num_row_blocks}")
                end = f(f"sdiv i64 {f.mul(f.add(row_block, 1), rows)}, {num_row_blocks}")
                arguments = f"ptr %arguments, i64 {f.add(row, begin)}, i64 {feature}"
                f.call_for_rows(f(f"sub nsw i64 {end}, {begin}"), "fused", program.fused_rows, arguments)
    return f


def _sums(program: Program) -> Function:
    """Return the entry point `sums`: sums[m, b] = sum of x[m] over block b, for the rows of each thread."""
    f = Function("sums", ARGUMENTS, entry=True)
    if program.x == "float":
        return f  # In float32, zero-points are subtracted from the codes.
    words_per_block, num_blocks, num_slots = f.argument("words_per_block"), f.argument("num_blocks"), _num_slots(f)
    first, stop = f.task_range(f.argument("num_rows"))
    with f.loop(first, stop) as row, f.loop(0, num_blocks) as block:
        x_rows, row_start = f.argument("x"), f.mul(row, num_slots)
        block_start = f.mul(f.mul(block, words_per_block), COLUMNS_PER_WORD)
        start = f.at(x_rows, f.add(row_start, block_start), program.x)
        total = f.variable("<8 x float>")
        f.store(total, "<8 x float>", "zeroinitializer")
        with f.loop(0, words_per_block) as word_index:
            address = f.at(start, f.mul(word_index, COLUMNS_PER_WORD), program.x)
            x = f.load(address, f"<8 x {program.x}>", program.x_bytes)
            if program.x == "bfloat":
                x = f(f"fpext <8 x bfloat> {x} to <8 x float>")
            f.store(total, "<8 x float>", f(f"fadd <8 x float> {f.load(total, '<8 x float>')}, {x}"))
        whole = f(
            f"call reassoc float @llvm.vector.reduce.fadd.v8f32(float 0.0, <8 x float> {f.load(total, '<8 x float>')})"
        )
        f.store(f.at(f.argument("sums"), f.add(f.mul(row, num_blocks), block), "float"), "float", whole)
    return f


def _unpack(program: Program) -> Function:
    """Return the entry point `unpack`: y [S, N] = scale * (code - zero), rounded once. A task is a tile."""
    f = Function("unpack", ARGUMENTS, entry=True)
    num_blocks, num_planes = f.argument("num_blocks"), f.argument("num_planes")
    words_per_block = f.argument("words_per_block")
    first, stop = f.task_range(_num_tiles(f))
    with f.loop(first, stop) as tile, f.loop(0, num_blocks) as block, f.loop(0, TILE_FEATURES, LANES) as offset:
        feature = f.add(f.mul(tile, TILE_FEATURES), offset)
        remaining, mask = _remaining_features(f, feature)
        with f.loop(0, words_per_block) as word_index:
            for column in range(COLUMNS_PER_WORD):
                # The plane of the high nibbles comes first. The scale of the last plane applies to the joined code.
                level = f.variable(FLOATS, "zeroinitializer")
                scale = f.variable(FLOATS, "zeroinitializer")
                with f.loop(0, num_planes) as plane:
                    plane_block = f.add(f.mul(plane, num_blocks), block)
                    index = f.add(_index_of(f, feature, plane_block, words_per_block), f.mul(word_index, TILE_FEATURES))
                    word = f.load(f.at(f.argument("words"), index, "i32"), WORDS, 4)
                    code = _code(f, word, column)
                    (zero,) = _load_zeros(f, feature, plane_block, 1)
                    plane_level = f(f"fsub {FLOATS} {code}, {zero}")
                    f.store(level, FLOATS, f.fma(f.load(level, FLOATS), floats(16), plane_level))
                    f.store(scale, FLOATS, _load_scale(f, program, _index_of(f, feature, plane_block)))
                row = f.add(f.mul(f.add(f.mul(block, words_per_block), word_index), COLUMNS_PER_WORD), column)
                value = f(f"fmul {FLOATS} {f.load(level, FLOATS)}, {f.load(scale, FLOATS)}")
                _store(f, program, value, row, feature, remaining, mask)
    return f


def _dense_tile(program: Program, rows: int) -> Function:
    """Return the function `dense<rows>`, which computes `rows` rows and 64 features of y from a bfloat16 weight."""
    f = Function(f"dense{rows}", ARGUMENTS, "i64 %row, i64 %feature")
    vectors = program.vectors(rows)
    pairs = f(f"lshr i64 {_num_slots(f)}, 1")
    weight = f.at(f.argument("words"), f.mul(f.mul(f("lshr i64 %feature, 6"), pairs), TILE_FEATURES), "i32")
    with f.loop(0, TILE_FEATURES, LANES * vectors) as offset:
        totals = [[f.variable(FLOATS, "zeroinitializer") for _ in range(vectors)] for _ in range(rows)]
        tile = _Tile(totals=totals, row="%row", feature=f.add("%feature", offset))
        x_rows = _rows_of_x(f, program, tile, 0)
        with f.loop(0, pairs) as pair:
            words = _load_weights(f, weight, pair, offset, vectors)
            if program.x == "bfloat":
                _add_products(f, program, words, x_rows, pair, totals)
            else:
                index = f.mul(pair, 2)
                even = [f(f"shl {WORDS} {word}, {ints(16)}") for word in words]
                _add_products(f, program, even, x_rows, index, totals)
                odd = [f(f"and {WORDS} {word}, {ints(0xFFFF0000)}") for word in words]
                _add_products(f, program, odd, x_rows, f.add(index, 1), totals)
        _write_tile(f, program, tile)
    return f


def _dense(program: Program) -> Function:
    """Return the entry point `dense`. A task is a tile of 64 features."""
    f = Function("dense", ARGUMENTS, entry=True)
    num_rows = f.argument("num_rows")
    first, stop = f.task_range(_num_tiles(f))
    with f.loop(first, stop) as tile, f.loop(0, num_rows, program.panel_rows) as row:
        rows = f.minimum(f(f"sub nsw i64 {num_rows}, {row}"), program.panel_rows)
        feature = f.mul(tile, TILE_FEATURES)
        f.call_for_rows(rows, "dense", program.panel_rows, f"ptr %arguments, i64 {row}, i64 {feature}")
    return f
