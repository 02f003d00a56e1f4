"""Build functions in LLVM assembly, with values, variables, loops and branches.

A vector has 16 lanes of 32 bits. If registers have 256 bits, LLVM splits each vector into two.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

LANES = 16
FLOATS = "<16 x float>"
WORDS = "<16 x i32>"

DECLARATIONS = """
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()
declare i64 @llvm.smin.i64(i64, i64)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
"""
"""Declarations of the external functions that `Function` calls."""


class Function:
    """An LLVM function under construction.

    Values have numbered names. Variables live on the stack until LLVM's optimizer moves them into registers.
    """

    def __init__(self, name: str, fields: Mapping[str, str], parameters: str = "", *, entry: bool = False) -> None:
        """Begin the function `name`. Its first parameter, %arguments, points to a struct.

        fields: name -> LLVM type of each field of that struct; a field takes 64 bits.
        parameters: further parameters, as LLVM text.
        entry: whether the function can be called from outside the LLVM module.
        """
        parameters = ", ".join(["ptr %arguments", *([parameters] if parameters else [])])
        self.head = f"define {'' if entry else 'internal '}void @{name}({parameters}) nounwind noinline"
        self.fields = fields
        self.variables: list[str] = []
        self.lines: list[str] = []
        self.num_names = 0

    def text(self) -> str:
        """Return the function as LLVM text."""
        body = "\n  ".join(["entry:", *self.variables, *self.lines, "ret void"])
        return f"{self.head} {{\n{body}\n}}\n"

    def fresh_name(self, stem: str) -> str:
        """Return a name that the function does not use yet."""
        self.num_names += 1
        return f"{stem}{self.num_names}"

    def emit(self, text: str) -> None:
        """Append an instruction that has no result."""
        self.lines.append(text)

    def __call__(self, text: str) -> str:
        """Append an instruction and return the name of its result."""
        value = self.fresh_name("%v")
        self.emit(f"{value} = {text}")
        return value

    def variable(self, kind: str, value: str | None = None) -> str:
        """Declare a variable on the stack and return its address. `kind` is its LLVM type, here and below."""
        address = self.fresh_name("%variable")
        self.variables.append(f"{address} = alloca {kind}, align 64")
        if value is not None:
            self.store(address, kind, value)
        return address

    def load(self, address: str, kind: str, align: int | None = None) -> str:
        """Load a value. `align` is in bytes; the default is the natural alignment of the type."""
        return self(f"load {kind}, ptr {address}" + (f", align {align}" if align else ""))

    def store(self, address: str, kind: str, value: str) -> None:
        """Store a value at its natural alignment."""
        self.emit(f"store {kind} {value}, ptr {address}")

    def add(self, a: str | int, b: str | int) -> str:
        """Emit a + b in int64."""
        return self(f"add nsw i64 {a}, {b}")

    def mul(self, a: str | int, b: str | int) -> str:
        """Emit a * b in int64."""
        return self(f"mul nsw i64 {a}, {b}")

    def minimum(self, a: str | int, b: str | int) -> str:
        """Emit min(a, b) in int64."""
        return self(f"call i64 @llvm.smin.i64(i64 {a}, i64 {b})")

    def at(self, base: str, index: str | int, kind: str) -> str:
        """Emit the address of base[index]."""
        return self(f"getelementptr inbounds {kind}, ptr {base}, i64 {index}")

    def argument(self, name: str) -> str:
        """Emit the value of a field of the %arguments struct."""
        return self.load(self.at("%arguments", list(self.fields).index(name), "i64"), self.fields[name])

    def splat(self, value: str, kind: str) -> str:
        """Emit a vector with the value in each of its 16 lanes."""
        first = self(f"insertelement <{LANES} x {kind}> poison, {kind} {value}, i64 0")
        return self(f"shufflevector <{LANES} x {kind}> {first}, <{LANES} x {kind}> poison, {WORDS} zeroinitializer")

    def shifted(self, word: str, bits: int) -> str:
        """Emit a vector of words, shifted right by a constant number of bits."""
        return self(f"lshr {WORDS} {word}, {ints(bits)}") if bits else word

    def fma(self, a: str, b: str, c: str) -> str:
        """Emit a * b + c in 16 lanes of float32."""
        return self(f"call {FLOATS} @llvm.fma.v16f32({FLOATS} {a}, {FLOATS} {b}, {FLOATS} {c})")

    @contextmanager
    def loop(self, start: str | int, stop: str | int, step: int = 1) -> Iterator[str]:
        """Emit `for i in range(start, stop, step)`; the with block emits the body. Yields i, an int64."""
        head, body, end = self.fresh_name("head"), self.fresh_name("body"), self.fresh_name("end")
        counter = self.variable("i64", str(start))
        self.emit(f"br label %{head}\n{head}:")
        i = self.load(counter, "i64")
        self.emit(f"br i1 {self(f'icmp slt i64 {i}, {stop}')}, label %{body}, label %{end}\n{body}:")
        yield i
        self.store(counter, "i64", self.add(i, step))
        self.emit(f"br label %{head}\n{end}:")

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """Emit `if condition`; the with block emits the branch that is taken."""
        then, end = self.fresh_name("then"), self.fresh_name("end")
        self.emit(f"br i1 {condition}, label %{then}, label %{end}\n{then}:")
        yield
        self.emit(f"br label %{end}\n{end}:")

    def dot_pairs(self, weight: str, x: str, total: str) -> str:
        """Emit total + the dot products of 16 pairs of bfloat16, one pair per 32-bit lane. Needs AVX512-BF16."""
        kind = "<32 x bfloat>"
        weight, x = (self(f"bitcast {WORDS} {value} to {kind}") for value in (weight, x))
        call = f"call {FLOATS} @llvm.x86.avx512bf16.dpbf16ps.512"
        return self(f"{call}({FLOATS} {total}, {kind} {weight}, {kind} {x})")

    def thread_index_and_count(self) -> tuple[str, str]:
        """Emit the index of this thread and the number of threads, which OpenMP may set lower than requested."""
        addresses = [self.variable("i64", "0"), self.variable("i64", "1")]
        with self.when(self(f"icmp sgt i64 {self.argument('num_threads')}, 1")):
            for address, name in zip(addresses, ("thread_num", "num_threads"), strict=True):
                self.store(address, "i64", self(f"sext i32 {self(f'call i32 @omp_get_{name}()')} to i64"))
        return self.load(addresses[0], "i64"), self.load(addresses[1], "i64")

    def task_range(self, tasks: str) -> tuple[str, str]:
        """Emit the range of tasks of this thread: its first task, and the first task of the next thread."""
        thread, threads = self.thread_index_and_count()
        first = self(f"sdiv i64 {self.mul(thread, tasks)}, {threads}")
        return first, self(f"sdiv i64 {self.mul(self.add(thread, 1), tasks)}, {threads}")

    def call_for_rows(self, rows: str, function: str, max_rows: int, arguments: str) -> None:
        """Emit a call of the variant for this number of rows, from `function1` to `function<max_rows>`."""
        for count in range(1, max_rows + 1):
            with self.when(self(f"icmp eq i64 {rows}, {count}")):
                self.emit(f"call void @{function}{count}({arguments})")


def ints(value: int) -> str:
    """Return a constant vector with the value in each of its 16 int32 lanes."""
    return "<" + ", ".join([f"i32 {value}"] * LANES) + ">"


def floats(value: float) -> str:
    """Return a constant vector with the value, rounded to float32, in each of its 16 lanes."""
    bits = struct.pack(">d", struct.unpack("f", struct.pack("f", value))[0]).hex()
    return "<" + ", ".join([f"float 0x{bits.upper()}"] * LANES) + ">"
