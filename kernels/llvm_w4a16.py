"""The program of backend `llvm`: y = x @ W.T from 4-bit codes, written in LLVM's assembly for any x86 processor.

A vector holds 16 output features, so that nothing is summed across lanes. One 32-bit word holds eight columns of one
feature; with k = 8 s + 2 p + e (p in 0 … 3, e in 0, 1)

    word[n, s], nibble p + 4 e   is   code[n, 8 s + 2 p + e]

Nibbles p and p + 4 are neighbours in K and lie sixteen bits apart. For x in bfloat16, `(word >> 4p) & 0x000F000F |
0x43004300` is a pair of weights as the processor's dot product takes them: 0x4300 has the bits of 128, and the code
falls into its lowest mantissa bits. Two instructions for 32 weights. For x in float32 a code is cut out and converted.

A block of columns shares one scale and one zero-point per feature. In float32 the zero-point is taken off each code. In
bfloat16 that would cost as much as decoding, so the sum of a block's products begins with -(128 + zero) * sum of x
instead. Once for a block: total += scale * sum, in float32. No weight is ever rounded.

Few rows of x (`fused`): five rows and 64 features at a time, the words decoded on the way, straight from memory. Many
rows: the codes of 64 features and some blocks are decoded once into a `panel`, and all rows of a chunk go over it, six
at a time. Both add in the same order, so a row of y has the same bits in any batch and with any number of threads.

Entry points: `@sums` and `@matmul`, to be called in this order by all threads (a single one calls `@matmul` alone,
which then begins with the sums); `@unpack`, the dense weight; and `@dense`, the same product with a weight in bfloat16,
for a head that stays in 16 bits.

Letters: M rows of x, N out_features, S slots (columns of x, see `layout`), B blocks of them, P planes (2 for 8-bit
codes: high and low halves as two weights over the same x), T tiles of 64 features.
Memory, all contiguous: x [M, S]; words uint32 [T, P*S/8, 64], for `@dense` pairs of bfloat16 [T, S/2, 64, 2]; scale and
zero uint8 [T, P*B, 64]; bias float32 [N] or null; sums float32 [M, B], filled by `@sums`; y in the dtype of x [M, N],
from `@unpack` [S, N].
"""

from __future__ import annotations

from dataclasses import dataclass

from llmquant.kernels.assembly import DECLARATIONS, FLOATS, LANES, WORDS, Function, floats, ints

TILE = 64
"""Output features whose words lie together: one cache line for 16 of them."""
STEP = 8
"""Columns in a word."""
MAX_BLOCK = 128
"""Columns of the widest block."""
PANEL = 512
"""Columns that are decoded at a time; in bfloat16 64 KiB, which stream from the second-level cache."""
MAX_CHUNK = 240
"""Rows that share a panel: their float32 totals lie on the stack of a thread, 60 KiB beside the panel's 64 or 128."""
FUSED_BELOW_ROWS = 24
"""Rows of a chunk from which decoding once is worth storing the weights, by `scripts/bench_linear`."""

ARGUMENTS = dict.fromkeys(("x", "words", "scale", "zero", "bias", "sums", "y"), "ptr") | dict.fromkeys(
    ("num_rows", "out_features", "num_blocks", "steps", "num_planes", "chunk", "num_threads"), "i64"
)
"""Fields of the struct that an entry point takes; `steps` are words of a block."""
ENTRY_POINTS = ("sums", "matmul", "unpack", "dense")

_MORE_DECLARATIONS = """
declare float @llvm.vector.reduce.fadd.v8f32(float, <8 x float>)
declare <16 x float> @llvm.masked.load.v16f32.p0(ptr, i32, <16 x i1>, <16 x float>)
declare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, i32, <16 x i1>)
declare void @llvm.masked.store.v16bf16.p0(<16 x bfloat>, ptr, i32, <16 x i1>)
"""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the text depends on."""

    x: str
    """LLVM type of x and y: "bfloat" (the processor multiplies pairs of bfloat16) or "float"."""
    scale: str
    """LLVM type of the scales: "half", "bfloat" or "float"."""
    wide: bool
    """32 registers of 512 bits (AVX-512), or 16 of 256 (AVX2)."""

    @property
    def x_bytes(self) -> int:
        return 2 if self.x == "bfloat" else 4

    @property
    def parts(self) -> int:
        """A word's columns as the multiplication takes them: 4 pairs of bfloat16 or 8 single float32, 32 bits each."""
        return STEP * self.x_bytes // 4

    @property
    def fused_rows(self) -> int:
        return 5

    @property
    def panel_rows(self) -> int:
        return 6

    def vectors(self, rows: int) -> int:
        """Vectors of 16 features beside so many rows, so that the sums fit into the registers."""
        if self.wide or rows == 1:
            return 4
        return 2 if rows == 2 else 1

    def text(self) -> str:
        """The whole program."""
        functions = [_fused_tile(self, rows) for rows in range(1, self.fused_rows + 1)]
        functions += [_panel_tile(self, rows) for rows in range(1, self.panel_rows + 1)]
        functions += [_chunk(self), _matmul(self), _sums(self), _unpack(self)]
        functions += [_dense_tile(self, rows) for rows in range(1, self.panel_rows + 1)]
        functions += [_dense(self)]
        return DECLARATIONS + _MORE_DECLARATIONS + "\n".join(function.text() for function in functions)


def _decode(f: Function, program: Program, word: str, part: int, zero: str) -> str:
    """16 words -> one part of each, as 32 bits: two weights 128 + code in bfloat16, or one code - zero in float32."""
    if program.x == "float":
        step = f(f"fsub {FLOATS} {_code(f, word, part)}, {zero}")
        return f(f"bitcast {FLOATS} {step} to {WORDS}")
    pair = f.shifted(word, 4 * part)
    return f(f"or {WORDS} {f(f'and {WORDS} {pair}, {ints(0x000F000F)}')}, {ints(0x43004300)}")


def _code(f: Function, word: str, column: int) -> str:
    """16 words -> the code of one column in each, as float32."""
    code = f(f"and {WORDS} {f.shifted(word, 4 * (column // 2) + 16 * (column % 2))}, {ints(15)}")
    return f(f"sitofp {WORDS} {code} to {FLOATS}")


def _multiply(f: Function, program: Program, weight: str, x: str, total: str) -> str:
    """total + weight * x in 16 lanes of float32; weight and x are 32 bits a lane."""
    if program.x == "bfloat":
        return f.dot_pairs(weight, x, total)
    return f.fma(f(f"bitcast {WORDS} {weight} to {FLOATS}"), f(f"bitcast {WORDS} {x} to {FLOATS}"), total)


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Some rows and 16 * vectors features of y, while a function works on them. Names of values in that function."""

    totals: list[list[str]]
    """[row][vector]: address of 16 float32."""
    row: str
    """The first row."""
    feature: str
    """The first feature."""

    @property
    def vectors(self) -> int:
        return len(self.totals[0])


def _num_slots(f: Function) -> str:
    return f.mul(f.mul(f.argument("num_blocks"), f.argument("steps")), STEP)


def _place(f: Function, feature: str, block: str, width: str | int = 1) -> str:
    """Index into [T, P*B, width, 64] of a feature and a block (of all planes)."""
    blocks = f.mul(f.argument("num_blocks"), f.argument("num_planes"))
    line = f.mul(f.add(f.mul(f(f"lshr i64 {feature}, 6"), blocks), block), width)
    return f.add(f.mul(line, TILE), f(f"and i64 {feature}, {TILE - 1}"))


def _rows_of_x(f: Function, program: Program, tile: _Tile, start: str | int) -> list[str]:
    """Where the tile's rows of x have the column `start`."""
    x, num_slots = f.argument("x"), _num_slots(f)
    rows = [f.mul(f.add(tile.row, row), num_slots) for row in range(len(tile.totals))]
    return [f.at(x, f.add(row, start), program.x) for row in rows]


def _weights(f: Function, panel: str, place: str, lane: str, vectors: int) -> list[str]:
    """Vectors of decoded weights, from line `place` of a panel [parts, 64] on."""
    line = f.at(panel, f.add(f.mul(place, TILE), lane), "i32")
    return [f.get(f.at(line, LANES * vector, "i32"), WORDS, 4) for vector in range(vectors)]


def _add_products(
    f: Function, program: Program, weights: list[str], x_rows: list[str], place: str, sums: list[list[str]]
) -> None:
    """sums[row][vector] += weights[vector] * x[row], for one part of the columns."""
    for x_row, of_row in zip(x_rows, sums, strict=True):
        x = f.splat(f.get(f.at(x_row, place, "i32"), "i32", 4), "i32")
        for weight, total in zip(weights, of_row, strict=True):
            f.set(total, FLOATS, _multiply(f, program, weight, x, f.get(total, FLOATS)))


def _add_block(f: Function, program: Program, tile: _Tile, block: str, block_of_x: str, panel: str | None) -> None:
    """totals += what one block of columns gives; the weights from its place in a panel, or decoded on the way."""
    steps = f.argument("steps")
    sums = _first_sums(f, program, tile, block, block_of_x)
    x_rows = _rows_of_x(f, program, tile, f.mul(f.mul(block_of_x, steps), STEP))
    words = f.at(f.argument("words"), _place(f, tile.feature, block, steps), "i32")
    lane = f(f"and i64 {tile.feature}, {TILE - 1}")
    zeros = (
        _zeros(f, tile.feature, block, tile.vectors) if panel is None and program.x == "float" else [""] * tile.vectors
    )
    with f.loop(0, steps) as step:
        if panel is None:
            line = f.at(words, f.mul(step, TILE), "i32")
            word = [f.get(f.at(line, LANES * vector, "i32"), WORDS, 4) for vector in range(tile.vectors)]
        for part in range(program.parts):
            place = f.add(f.mul(step, program.parts), part)
            if panel is None:
                weights = [_decode(f, program, one, part, zero) for one, zero in zip(word, zeros, strict=True)]
            else:
                weights = _weights(f, panel, place, lane, tile.vectors)
            _add_products(f, program, weights, x_rows, place, sums)
    for vector in range(tile.vectors):
        scale = _scale(f, program, _place(f, f.add(tile.feature, LANES * vector), block))
        for of_row, totals in zip(sums, tile.totals, strict=True):
            total = f.fma(f.get(of_row[vector], FLOATS), scale, f.get(totals[vector], FLOATS, 64))
            f.set(totals[vector], FLOATS, total)


def _first_sums(f: Function, program: Program, tile: _Tile, block: str, block_of_x: str) -> list[list[str]]:
    """What the products of a block are added to [row][vector]: -(128 + zero) * sum of x for bfloat16, else nothing."""
    if program.x == "float":
        return [[f.slot(FLOATS, "zeroinitializer") for _ in of_row] for of_row in tile.totals]
    bases = [f(f"fsub {FLOATS} {floats(-128)}, {zero}") for zero in _zeros(f, tile.feature, block, tile.vectors)]
    sums = []
    for row in range(len(tile.totals)):
        place = f.add(f.mul(f.add(tile.row, row), f.argument("num_blocks")), block_of_x)
        sum_of_x = f.splat(f.get(f.at(f.argument("sums"), place, "float"), "float"), "float")
        sums.append([f.slot(FLOATS, f(f"fmul {FLOATS} {base}, {sum_of_x}")) for base in bases])
    return sums


def _scale(f: Function, program: Program, place: str) -> str:
    scale = f.get(f.at(f.argument("scale"), place, program.scale), f"<16 x {program.scale}>", 2)
    return scale if program.scale == "float" else f(f"fpext <16 x {program.scale}> {scale} to {FLOATS}")


def _zeros(f: Function, feature: str, block: str, vectors: int) -> list[str]:
    """The zero-points of so many vectors of features, in float32."""
    zeros = []
    for vector in range(vectors):
        place = _place(f, f.add(feature, LANES * vector), block)
        zero = f.get(f.at(f.argument("zero"), place, "i8"), "<16 x i8>", 1)
        zeros.append(f(f"uitofp <16 x i8> {zero} to {FLOATS}"))
    return zeros


def _write(f: Function, program: Program, tile: _Tile) -> None:
    """y = totals + bias, rounded once."""
    bias = f.argument("bias")
    has_bias = f(f"icmp ne ptr {bias}, null")
    for vector in range(tile.vectors):
        feature = f.add(tile.feature, LANES * vector)
        left, there = _left(f, feature)
        added = f.slot(FLOATS, "zeroinitializer")
        # In a branch: a masked load that would fault, were it not for its mask, takes hundreds of cycles.
        with f.when(has_bias):
            call = f"call {FLOATS} @llvm.masked.load.v16f32.p0(ptr {f.at(bias, feature, 'float')}, i32 4"
            f.set(added, FLOATS, f(f"{call}, <16 x i1> {there}, {FLOATS} zeroinitializer)"))
        for row, totals in enumerate(tile.totals):
            value = f(f"fadd {FLOATS} {f.get(totals[vector], FLOATS, 64)}, {f.get(added, FLOATS)}")
            _store(f, program, value, f.add(tile.row, row), feature, left, there)


def _left(f: Function, feature: str) -> tuple[str, str]:
    """How many features there are from this one on, and which of the next 16 are among them."""
    left = f(f"sub nsw i64 {f.argument('out_features')}, {feature}")
    lanes = "<" + ", ".join(f"i64 {lane}" for lane in range(LANES)) + ">"
    return left, f(f"icmp slt <16 x i64> {lanes}, {f.splat(left, 'i64')}")


def _store(f: Function, program: Program, value: str, row: str, feature: str, left: str, there: str) -> None:
    """16 float32 to y, rounded to its dtype; features beyond the last are left alone."""
    kind, suffix = FLOATS, "f32"
    if program.x == "bfloat":
        kind, suffix = "<16 x bfloat>", "bf16"
        value = f(f"fptrunc {FLOATS} {value} to {kind}")
    address = f.at(f.argument("y"), f.add(f.mul(row, f.argument("out_features")), feature), program.x)
    is_whole = f(f"icmp sge i64 {left}, {LANES}")
    with f.when(is_whole):
        f.do(f"store {kind} {value}, ptr {address}, align {program.x_bytes}")
    with f.when(f(f"xor i1 {is_whole}, true")):
        call = f"call void @llvm.masked.store.v16{suffix}.p0({kind} {value}, ptr {address}, i32 {program.x_bytes}"
        f.do(f"{call}, <16 x i1> {there})")


def _fused_tile(program: Program, rows: int) -> Function:
    """So many rows and 64 features of y, from words to result."""
    f = Function(f"fused{rows}", ARGUMENTS, "i64 %row, i64 %feature")
    vectors = program.vectors(rows)
    with f.loop(0, TILE, LANES * vectors) as lane:
        totals = [[f.slot(FLOATS, "zeroinitializer") for _ in range(vectors)] for _ in range(rows)]
        tile = _Tile(totals=totals, row="%row", feature=f.add("%feature", lane))
        num_blocks = f.argument("num_blocks")
        with f.loop(0, f.argument("num_planes")) as plane:
            first = f.mul(plane, num_blocks)
            with f.loop(0, num_blocks) as block:
                _add_block(f, program, tile, f.add(first, block), block, None)
        _write(f, program, tile)
    return f


def _panel_tile(program: Program, rows: int) -> Function:
    """What the blocks %first … %stop - 1 of one plane give to so many rows and 64 features, added to totals in memory
    [rows, 64]; the panel begins with the first of them."""
    f = Function(
        f"panel{rows}",
        ARGUMENTS,
        "ptr %panel, ptr %memory, i64 %row, i64 %feature, i64 %plane, i64 %first, i64 %stop",
    )
    vectors = program.vectors(rows)
    size = f.mul(f.mul(f.argument("steps"), program.parts), TILE)
    before = f.mul("%plane", f.argument("num_blocks"))
    with f.loop(0, TILE, LANES * vectors) as lane:
        memory = [
            [f.at("%memory", f.add(lane, TILE * row + LANES * vector), "float") for vector in range(vectors)]
            for row in range(rows)
        ]
        totals = [[f.slot(FLOATS, f.get(address, FLOATS, 64)) for address in of_row] for of_row in memory]
        tile = _Tile(totals=totals, row="%row", feature=f.add("%feature", lane))
        with f.loop("%first", "%stop") as block:
            panel = f.at("%panel", f.mul(f(f"sub nsw i64 {block}, %first"), size), "i32")
            _add_block(f, program, tile, f.add(before, block), block, panel)
        for addresses, of_row in zip(memory, totals, strict=True):
            for address, total in zip(addresses, of_row, strict=True):
                f.set(address, FLOATS, f.get(total, FLOATS))
    return f


def _chunk(program: Program) -> Function:
    """64 features of the rows %row … %stop - 1, at most MAX_CHUNK: panel after panel, and all rows over each."""
    f = Function("chunk", ARGUMENTS, "i64 %row, i64 %stop, i64 %feature")
    panel = f.slot(f"[{PANEL // STEP * program.parts * TILE} x i32]")
    totals = f.slot(f"[{MAX_CHUNK * TILE} x float]")
    vectors = TILE // LANES
    with f.loop("%row", "%stop") as row:
        line = f.at(totals, f.mul(f(f"sub nsw i64 {row}, %row"), TILE), "float")
        for vector in range(vectors):
            f.set(f.at(line, LANES * vector, "float"), FLOATS, "zeroinitializer")
    num_blocks, steps = f.argument("num_blocks"), f.argument("steps")
    in_panel = f(f"sdiv i64 {PANEL // STEP}, {steps}")
    panels = f(f"sdiv i64 {f(f'sub nsw i64 {f.add(num_blocks, in_panel)}, 1')}, {in_panel}")
    with f.loop(0, f.argument("num_planes")) as plane, f.loop(0, panels) as which:
        first = f.mul(which, in_panel)
        last = f.less(f.add(first, in_panel), num_blocks)
        with f.loop(first, last) as block:
            of_plane = f.add(f.mul(plane, num_blocks), block)
            words = f.at(f.argument("words"), _place(f, "%feature", of_plane, steps), "i32")
            before = f.mul(f(f"sub nsw i64 {block}, {first}"), steps)
            zeros = _zeros(f, "%feature", of_plane, vectors) if program.x == "float" else [""] * vectors
            with f.loop(0, steps) as step:
                for vector, zero in enumerate(zeros):
                    word = f.get(f.at(words, f.add(f.mul(step, TILE), LANES * vector), "i32"), WORDS, 4)
                    for part in range(program.parts):
                        line = f.add(f.mul(f.add(before, step), program.parts), part)
                        address = f.at(panel, f.add(f.mul(line, TILE), LANES * vector), "i32")
                        f.set(address, WORDS, _decode(f, program, word, part, zero))
        with f.loop("%row", "%stop", program.panel_rows) as row:
            rows = f.less(f(f"sub nsw i64 %stop, {row}"), program.panel_rows)
            line = f.at(totals, f.mul(f(f"sub nsw i64 {row}, %row"), TILE), "float")
            arguments = f"ptr %arguments, ptr {panel}, ptr {line}, i64 {row}, i64 %feature"
            arguments += f", i64 {plane}, i64 {first}, i64 {last}"
            f.call_for(rows, "panel", program.panel_rows, arguments)
    with f.loop("%row", "%stop") as row:
        line = f.at(totals, f.mul(f(f"sub nsw i64 {row}, %row"), TILE), "float")
        of_row = [f.at(line, LANES * vector, "float") for vector in range(vectors)]
        _write(f, program, _Tile(totals=[of_row], row=row, feature="%feature"))
    return f


def _num_tiles(f: Function) -> str:
    return f(f"sdiv i64 {f.add(f.argument('out_features'), TILE - 1)}, {TILE}")


def _matmul(program: Program) -> Function:
    """This thread's share of y. A task is 64 features of a chunk of rows."""
    f = Function("matmul", ARGUMENTS, entry=True)
    num_rows, size = f.argument("num_rows"), f.argument("chunk")
    tiles = _num_tiles(f)
    chunks = f(f"sdiv i64 {f(f'sub nsw i64 {f.add(num_rows, size)}, 1')}, {size}")
    with f.when(f(f"icmp eq i64 {f.argument('num_threads')}, 1")):
        f.do("call void @sums(ptr %arguments)")
    first, stop = f.share(f.mul(tiles, chunks))
    with f.loop(first, stop) as task:
        feature = f.mul(f(f"srem i64 {task}, {tiles}"), TILE)
        row = f.mul(f(f"sdiv i64 {task}, {tiles}"), size)
        last = f.less(f.add(row, size), num_rows)
        rows = f(f"sub nsw i64 {last}, {row}")
        is_fused = f(f"icmp slt i64 {rows}, {FUSED_BELOW_ROWS}")
        with f.when(f(f"xor i1 {is_fused}, true")):
            f.do(f"call void @chunk(ptr %arguments, i64 {row}, i64 {last}, i64 {feature})")
        with f.when(is_fused):
            # Tiles of as equal heights as can be: eight rows are four and four.
            pieces = f(f"sdiv i64 {f.add(rows, program.fused_rows - 1)}, {program.fused_rows}")
            with f.loop(0, pieces) as piece:
                begin = f(f"sdiv i64 {f.mul(piece, rows)}, {pieces}")
                end = f(f"sdiv i64 {f.mul(f.add(piece, 1), rows)}, {pieces}")
                arguments = f"ptr %arguments, i64 {f.add(row, begin)}, i64 {feature}"
                f.call_for(f(f"sub nsw i64 {end}, {begin}"), "fused", program.fused_rows, arguments)
    return f


def _sums(program: Program) -> Function:
    """sums[m, b] = sum of x[m] over block b, for this thread's share of the rows."""
    f = Function("sums", ARGUMENTS, entry=True)
    if program.x == "float":
        return f  # Zero-points are taken off the codes there.
    steps, num_blocks, num_slots = f.argument("steps"), f.argument("num_blocks"), _num_slots(f)
    first, stop = f.share(f.argument("num_rows"))
    with f.loop(first, stop) as row, f.loop(0, num_blocks) as block:
        start = f.at(f.argument("x"), f.add(f.mul(row, num_slots), f.mul(f.mul(block, steps), STEP)), program.x)
        total = f.slot("<8 x float>")
        f.set(total, "<8 x float>", "zeroinitializer")
        with f.loop(0, steps) as step:
            x = f.get(f.at(start, f.mul(step, STEP), program.x), f"<8 x {program.x}>", program.x_bytes)
            if program.x == "bfloat":
                x = f(f"fpext <8 x bfloat> {x} to <8 x float>")
            f.set(total, "<8 x float>", f(f"fadd <8 x float> {f.get(total, '<8 x float>')}, {x}"))
        whole = f(
            f"call reassoc float @llvm.vector.reduce.fadd.v8f32(float 0.0, <8 x float> {f.get(total, '<8 x float>')})"
        )
        f.set(f.at(f.argument("sums"), f.add(f.mul(row, num_blocks), block), "float"), "float", whole)
    return f


def _unpack(program: Program) -> Function:
    """y = the dense weight [S, N], scale * (code - zero) rounded once, for this thread's share of the tiles."""
    f = Function("unpack", ARGUMENTS, entry=True)
    num_blocks, num_planes, steps = f.argument("num_blocks"), f.argument("num_planes"), f.argument("steps")
    first, stop = f.share(_num_tiles(f))
    with f.loop(first, stop) as tile, f.loop(0, num_blocks) as block, f.loop(0, TILE, LANES) as lane:
        feature = f.add(f.mul(tile, TILE), lane)
        left, there = _left(f, feature)
        with f.loop(0, steps) as step:
            for column in range(STEP):
                # Planes from the highest bits to the lowest; the last one has the scale of a whole step.
                distance = f.slot(FLOATS, "zeroinitializer")
                scale = f.slot(FLOATS, "zeroinitializer")
                with f.loop(0, num_planes) as plane:
                    of_plane = f.add(f.mul(plane, num_blocks), block)
                    place = f.add(_place(f, feature, of_plane, steps), f.mul(step, TILE))
                    word = f.get(f.at(f.argument("words"), place, "i32"), WORDS, 4)
                    digit = f(f"fsub {FLOATS} {_code(f, word, column)}, {_zeros(f, feature, of_plane, 1)[0]}")
                    f.set(distance, FLOATS, f.fma(f.get(distance, FLOATS), floats(16), digit))
                    f.set(scale, FLOATS, _scale(f, program, _place(f, feature, of_plane)))
                row = f.add(f.mul(f.add(f.mul(block, steps), step), STEP), column)
                value = f(f"fmul {FLOATS} {f.get(distance, FLOATS)}, {f.get(scale, FLOATS)}")
                _store(f, program, value, row, feature, left, there)
    return f


def _dense_tile(program: Program, rows: int) -> Function:
    """So many rows and 64 features of y from a weight in bfloat16."""
    f = Function(f"dense{rows}", ARGUMENTS, "i64 %row, i64 %feature")
    vectors = program.vectors(rows)
    pairs = f(f"lshr i64 {_num_slots(f)}, 1")
    weight = f.at(f.argument("words"), f.mul(f.mul(f("lshr i64 %feature, 6"), pairs), TILE), "i32")
    with f.loop(0, TILE, LANES * vectors) as lane:
        totals = [[f.slot(FLOATS, "zeroinitializer") for _ in range(vectors)] for _ in range(rows)]
        tile = _Tile(totals=totals, row="%row", feature=f.add("%feature", lane))
        x_rows = _rows_of_x(f, program, tile, 0)
        with f.loop(0, pairs) as pair:
            words = _weights(f, weight, pair, lane, vectors)
            if program.x == "bfloat":
                _add_products(f, program, words, x_rows, pair, totals)
            else:
                place = f.mul(pair, 2)
                even = [f(f"shl {WORDS} {word}, {ints(16)}") for word in words]
                _add_products(f, program, even, x_rows, place, totals)
                odd = [f(f"and {WORDS} {word}, {ints(0xFFFF0000)}") for word in words]
                _add_products(f, program, odd, x_rows, f.add(place, 1), totals)
        _write(f, program, tile)
    return f


def _dense(program: Program) -> Function:
    """This thread's share of y, by tiles of features."""
    f = Function("dense", ARGUMENTS, entry=True)
    num_rows = f.argument("num_rows")
    first, stop = f.share(_num_tiles(f))
    with f.loop(first, stop) as tile, f.loop(0, num_rows, program.panel_rows) as row:
        rows = f.less(f(f"sub nsw i64 {num_rows}, {row}"), program.panel_rows)
        f.call_for(rows, "dense", program.panel_rows, f"ptr %arguments, i64 {row}, i64 {f.mul(tile, TILE)}")
    return f
