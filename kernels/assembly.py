"""LLVM's assembly, written from Python: a function with its values, variables, loops and branches.

Vectors have 16 lanes of 32 bits; LLVM makes two of them where registers have 256 bits.
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
"""What `Function` calls."""


class Function:
    """A function while it is written. Values are numbered; variables live in stack slots until LLVM's optimizer puts
    them into registers."""

    def __init__(self, name: str, fields: Mapping[str, str], parameters: str = "", *, entry: bool = False) -> None:
        """`fields`: name -> LLVM type of the fields, 64 bits each, of the struct that %arguments points to, the first
        parameter of every function; an `entry` can be called from outside."""
        parameters = ", ".join(["ptr %arguments", *([parameters] if parameters else [])])
        self.head = f"define {'' if entry else 'internal '}void @{name}({parameters}) nounwind noinline"
        self.fields = fields
        self.slots: list[str] = []
        self.lines: list[str] = []
        self.count = 0

    def text(self) -> str:
        body = "\n  ".join(["entry:", *self.slots, *self.lines, "ret void"])
        return f"{self.head} {{\n{body}\n}}\n"

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def do(self, text: str) -> None:
        self.lines.append(text)

    def __call__(self, text: str) -> str:
        """The value of an instruction."""
        value = self.name("%v")
        self.do(f"{value} = {text}")
        return value

    def slot(self, kind: str, value: str | None = None) -> str:
        """A variable: its address."""
        address = self.name("%slot")
        self.slots.append(f"{address} = alloca {kind}, align 64")
        if value is not None:
            self.set(address, kind, value)
        return address

    def get(self, address: str, kind: str, align: int | None = None) -> str:
        return self(f"load {kind}, ptr {address}" + (f", align {align}" if align else ""))

    def set(self, address: str, kind: str, value: str) -> None:
        self.do(f"store {kind} {value}, ptr {address}")

    def add(self, a: str | int, b: str | int) -> str:
        return self(f"add nsw i64 {a}, {b}")

    def mul(self, a: str | int, b: str | int) -> str:
        return self(f"mul nsw i64 {a}, {b}")

    def less(self, a: str | int, b: str | int) -> str:
        return self(f"call i64 @llvm.smin.i64(i64 {a}, i64 {b})")

    def at(self, base: str, index: str | int, kind: str) -> str:
        """The address of base[index]."""
        return self(f"getelementptr inbounds {kind}, ptr {base}, i64 {index}")

    def argument(self, name: str) -> str:
        """A field of the struct."""
        return self.get(self.at("%arguments", list(self.fields).index(name), "i64"), self.fields[name])

    def splat(self, value: str, kind: str) -> str:
        first = self(f"insertelement <{LANES} x {kind}> poison, {kind} {value}, i64 0")
        return self(f"shufflevector <{LANES} x {kind}> {first}, <{LANES} x {kind}> poison, {WORDS} zeroinitializer")

    def shifted(self, word: str, bits: int) -> str:
        return self(f"lshr {WORDS} {word}, {ints(bits)}") if bits else word

    def fma(self, a: str, b: str, c: str) -> str:
        return self(f"call {FLOATS} @llvm.fma.v16f32({FLOATS} {a}, {FLOATS} {b}, {FLOATS} {c})")

    @contextmanager
    def loop(self, start: str | int, stop: str | int, step: int = 1) -> Iterator[str]:
        """for i in range(start, stop, step)"""
        head, body, end = self.name("head"), self.name("body"), self.name("end")
        slot = self.slot("i64", str(start))
        self.do(f"br label %{head}\n{head}:")
        i = self.get(slot, "i64")
        self.do(f"br i1 {self(f'icmp slt i64 {i}, {stop}')}, label %{body}, label %{end}\n{body}:")
        yield i
        self.set(slot, "i64", self.add(i, step))
        self.do(f"br label %{head}\n{end}:")

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        then, end = self.name("then"), self.name("end")
        self.do(f"br i1 {condition}, label %{then}, label %{end}\n{then}:")
        yield
        self.do(f"br label %{end}\n{end}:")

    def dot_pairs(self, weight: str, x: str, total: str) -> str:
        """total + the dot products of 16 pairs of bfloat16, 32 bits each; not every processor has it."""
        kind = "<32 x bfloat>"
        weight, x = (self(f"bitcast {WORDS} {value} to {kind}") for value in (weight, x))
        call = f"call {FLOATS} @llvm.x86.avx512bf16.dpbf16ps.512"
        return self(f"{call}({FLOATS} {total}, {kind} {weight}, {kind} {x})")

    def thread(self) -> tuple[str, str]:
        """The number of this thread, and how many there are: OpenMP may give fewer than it was asked for."""
        slots = [self.slot("i64", "0"), self.slot("i64", "1")]
        with self.when(self(f"icmp sgt i64 {self.argument('num_threads')}, 1")):
            for slot, name in zip(slots, ("thread_num", "num_threads"), strict=True):
                self.set(slot, "i64", self(f"sext i32 {self(f'call i32 @omp_get_{name}()')} to i64"))
        return self.get(slots[0], "i64"), self.get(slots[1], "i64")

    def share(self, tasks: str) -> tuple[str, str]:
        """The first task of this thread, and the first of the next."""
        thread, threads = self.thread()
        first = self(f"sdiv i64 {self.mul(thread, tasks)}, {threads}")
        return first, self(f"sdiv i64 {self.mul(self.add(thread, 1), tasks)}, {threads}")

    def call_for(self, rows: str, function: str, most: int, arguments: str) -> None:
        """Call the one of `function1` … `function<most>` that is for so many rows."""
        for count in range(1, most + 1):
            with self.when(self(f"icmp eq i64 {rows}, {count}")):
                self.do(f"call void @{function}{count}({arguments})")


def ints(value: int) -> str:
    """A constant vector."""
    return "<" + ", ".join([f"i32 {value}"] * LANES) + ">"


def floats(value: float) -> str:
    """A constant vector, rounded to float32."""
    bits = struct.pack(">d", struct.unpack("f", struct.pack("f", value))[0]).hex()
    return "<" + ", ".join([f"float 0x{bits.upper()}"] * LANES) + ">"
