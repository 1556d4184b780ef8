"""What the kernels are compiled to for GPUs that are not here, and what that lets one expect.

A kernel that moves numbers can be as fast as the memory, if its instructions take less time than
its bytes. Both are counted: the bytes from what a step must read and write, the instructions in
the machine code. Latency, caches and waits are not: on a GPU, measure (`python -m lab.bench step`).
"""

import math
import re
import subprocess
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

import sphere_step

# Data sheets; CUDA programming guide, "Throughput of native arithmetic instructions"; AMD, CDNA 3
# white paper. Per SM and cycle: instructions of one lane, of those in FP32 and in FP64, conversions
# from and to FP64.
#            architecture TB/s  SMs  GHz  all FP32 FP64 conversions, threads of an SM
CARDS = {
    "A100": (80, 2.04, 108, 1.41, 128, 64, 32, 16, 2048),
    "RTX 3090": (86, 0.936, 82, 1.70, 128, 128, 2, 2, 1536),
    "RTX 4090": (89, 1.01, 128, 2.52, 128, 128, 2, 2, 1536),
    "H100": (90, 3.35, 132, 1.98, 128, 128, 64, 16, 2048),
    "H200": (90, 4.8, 132, 1.98, 128, 128, 64, 16, 2048),
    "B200": (100, 7.7, 148, 1.97, 128, 128, 64, 16, 2048),
    "B300": (100, 7.7, 148, 1.97, 128, 128, 2, 2, 2048),  # with the code for sm_100
    "RTX 5090": (120, 1.79, 170, 2.41, 128, 128, 2, 2, 1536),
    "MI300X": ("gfx942", 5.3, 304, 2.1, 64, 64, 64, 16, 2048),
}
ONE_TILE = 4096  # elements of a sphere that is read once
# In the assembly of NVIDIA and AMD
LABEL = re.compile(r"(\.L\w+):")
INSTRUCTION = re.compile(r"\s+(?:/\*\w{4,}\*/\s+)?(@!?\w+\s+)?([A-Za-z]\w*(?:\.\w+)*)(.*)")
JUMP = re.compile(r"BRA|s_c?branch")
END = re.compile(r"EXIT|s_endpgm")
WIDE = re.compile(r"(LDG|STG)\S*\.128|(global|buffer)_(load|store)_dwordx4")
LOCAL = re.compile(r"LDL|STL|scratch_")
KINDS = {
    "all": re.compile(r"[A-Z]|[a-rt-z]"),  # AMD issues scalar instructions beside these
    "FP32": re.compile(r"F(ADD|MUL|FMA|SETP|MNMX|SEL)|v_(pk_)?(add|sub|mul|fma|fmac)_f32"),
    "FP64": re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)|v_(?!cvt|rcp|rsq)\w+_f64"),
    "conversions": re.compile(r"(F2F|F2I|I2F)\S*F64|MUFU\S*64H|v_(cvt|rcp|rsq)_\w*f64"),
}


class Variant(NamedTuple):
    """A kernel as a step launches it."""

    name: str
    part: str  # sums, rule, move, or whole: all in one
    kernel: object
    signature: dict
    constants: dict
    options: dict  # num_warps and the like
    elements: int  # of θ in a program; 0: it reads none
    reads: int  # vectors: of θ, g, m
    writes: int
    size: int  # bytes of an element

    @property
    def bytes(self):
        return (self.reads + self.writes) * self.size


class Count(NamedTuple):
    """What a variant is compiled to."""

    registers: int  # per thread
    blocks: int  # that live on an SM
    local: int  # instructions that use local memory: spills, and arrays on the stack
    wide: int  # 128-bit accesses, per thread
    wanted: float  # if all were
    instructions: dict  # per element, of each of KINDS; nan: the way through it was not found


def variants():
    """What SphereSGD launches for each kind of sphere, taken down in place of being launched."""
    from triton.runtime.jit import JITFunction, mangle_type

    found = {}
    kinds = {"joint": ("group", [(1 << 22,)]), "one tile": ("tensor", 64 * [(ONE_TILE,)])}
    kinds |= {"rows of 64": ("row", [(4096, 64)]), "no sphere": (None, [(1 << 22,)])}
    for kind, dtype, beta in product(kinds, ("float32", "bfloat16"), (0.0, 0.9)):
        sphere, shapes = kinds[kind]
        params = [torch.ones(shape, dtype=getattr(torch, dtype)) for shape in shapes]
        for p in params:
            p.grad = torch.ones_like(p)
        launched = []

        def take_down(kernel, *args, grid, warmup, launched=launched, **more):
            values = dict(zip(kernel.arg_names, args, strict=False)) | more
            launched.append((kernel, grid[0], values))

        how = dict(lr=1e-3, sphere=sphere, momentum=beta, backend="triton")
        here = patch.object(sphere_step, "INTERPRET", True)  # on the CPU
        with here, patch.object(JITFunction, "run", take_down):
            sphere_step.SphereSGD(params, **how).step()
        moved = 2 if beta else 1  # θ, m
        for i, (kernel, programs, values) in enumerate(launched):
            part = "move" if i else "sums"
            if "rule" in kernel.__name__:
                part = "rule"
            elif len(launched) == 1:
                part = "whole"
            signature, constants = {}, {}
            for argument in kernel.params:
                value = values.pop(argument.name)
                signature[argument.name] = "constexpr"
                if argument.is_constexpr:
                    constants[argument.name] = value
                else:
                    signature[argument.name] = mangle_type(value)
            name = f"{kind}, {dtype}, momentum {beta}: {part}"
            reads, writes, elements = 1 + moved, moved, sum(p.numel() for p in params) // programs
            if part == "sums":
                writes = 0
            if part == "rule":
                reads = writes = elements = 0
            made = part, kernel, signature, constants, values, elements, reads, writes
            key = kernel.__name__, str((signature, constants, made[-3:]))
            found.setdefault(key, Variant(name, *made, p.element_size()))
    return list(found.values())


def count(variant, architecture, threads_of_sm=2048):
    """The `Count` of a variant on 80, 90, … or "gfx942", without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cuda = isinstance(architecture, int)
    target = GPUTarget("cuda" if cuda else "hip", architecture, 32 if cuda else 64)
    pointers = [(i,) for i, kind in enumerate(variant.signature.values()) if kind[0] == "*"]
    aligned = dict.fromkeys(pointers, [["tt.divisibility", 16]])  # as torch allocates them
    source = ASTSource(variant.kernel, variant.signature, variant.constants, aligned)
    asm = triton.compile(source, target=target, options=variant.options).asm
    if cuda:
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            usage = run([tools / "cuobjdump", "-res-usage", file.name]).stdout
            text = run([tools / "nvdisasm", "-c", file.name]).stdout
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        _, text = text.split(f".text.{variant.kernel.__name__}:")
        text = re.split(r"\n\s*\$", text)[0]  # the entry, without its helpers
    else:
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", asm["amdgcn"])[1])
        text, _ = asm["amdgcn"].split(".rodata", 1)
        if "buffer_" in text:
            text = text.replace("global_", "of_tables_")
    code, places = [], {}
    for line in text.splitlines():
        if LABEL.match(line):
            places[LABEL.match(line)[1]] = len(code)
        elif INSTRUCTION.match(line):
            code.append(INSTRUCTION.match(line).groups())
    threads = variant.options["num_warps"] * target.warp_size
    each = variant.elements / threads  # elements of a thread
    ways = paths(code, places, max if variant.part == "whole" else min)
    wanted = each * variant.bytes / 16
    wide = min((n for n in ways if n >= wanted), default=max(ways))
    costs = [n / (each or 1) for n in ways[wide]]
    inside = [x for x in loops(code, places) if x[0]]
    if inside and each:
        # The longest of several loops, for tiles of several kinds; what is around them, once
        costs = [n / each for n in min(ways.values())]
        wide = wanted = 0
        for stores in {"sums": [False], "move": [True], "whole": [False, True]}[variant.part]:
            bits = 8 * variant.size * (variant.reads + (variant.writes if stores else 0))
            own = [
                (accesses, [n * bits / 128 / accesses for n in cost])
                for accesses, cost, has_stores in inside
                if has_stores == stores
            ]
            accesses, cost = max(own, key=lambda x: x[1])
            costs = [a + b for a, b in zip(costs, cost, strict=True)]
            wide += accesses
            wanted += accesses
    if variant.elements and not wide:  # loops that are laid out otherwise, as of gfx942
        costs = [math.nan] * len(KINDS)
    return Count(
        registers=registers,
        blocks=blocks_of(registers, threads, threads_of_sm, 65536 if cuda else 131072),
        local=sum(bool(LOCAL.match(name)) for _, name, _ in code),
        wide=wide,
        wanted=wanted,
        instructions=dict(zip(KINDS, costs, strict=True)),
    )


def loops(code, places):
    """(128-bit accesses, instructions of KINDS, whether it stores) of each innermost loop."""
    edges = []
    for j, (_, name, rest) in enumerate(code):
        label = re.search(r"\.L\w+", rest)
        if JUMP.match(name) and label and places[label[0]] < j:
            edges.append((places[label[0]], j))
    found = []
    for i, j in edges:
        if not any(i <= a and b <= j for a, b in edges if (a, b) != (i, j)):
            inside = {label: place - i for label, place in places.items() if i <= place <= j}
            ways = paths([*code[i:j], ("", "EXIT", "")], inside, min)
            stores = any(re.match("STG|buffer_store|global_store", x[1]) for x in code[i:j])
            if ways:  # else the jump goes back, but not around
                found.append((max(ways), ways[max(ways)], stores))
    return found


def blocks_of(registers, threads, threads_of_sm, registers_of_sm):
    """How many blocks of so many threads live on an SM."""
    granted = math.ceil(registers / 8) * 8
    return min(registers_of_sm // granted, threads_of_sm) // threads


def paths(code, places, pick):
    """Instructions of each of KINDS on the way from entry to exit that has the fewest of them (pick
    = min) or the most (max, as the sums of a tile alone are followed by the rule), by the number of
    128-bit accesses on it. A loop is gone through once.

    code: (guard, name, rest) of each instruction; places: of the labels in it.
    """
    ways, ends = [{0: (0,) * len(KINDS)}, *({} for _ in code)], {}
    for i, (guard, name, rest) in enumerate(code):
        next_ones = []
        conditional = guard or "," in rest or name.startswith("s_cbranch")
        if conditional or not (JUMP.match(name) or END.match(name)):
            next_ones.append(ways[i + 1])
        if END.match(name):
            next_ones.append(ends)
        if JUMP.match(name):
            place = places.get(re.search(r"\.L\w+", rest)[0], 0)
            if place > i:
                next_ones.append(ways[place])
        own = [bool(kind.match(name)) for kind in KINDS.values()]
        for wide, costs in ways[i].items():
            wide += bool(WIDE.match(name))
            costs = tuple(a + b for a, b in zip(costs, own, strict=True))
            for way in next_ones:
                way[wide] = pick(costs, way.get(wide, costs))
    return ends


def times(variant, counted, card):
    """Seconds per element at the rates of the data sheet: for the memory, for all instructions, for
    FP32, for FP64."""
    _, bandwidth, sms, clock, *rates, _ = CARDS[card]
    found = [
        n / (rate * sms * clock * 1e9)
        for n, rate in zip(counted.instructions.values(), rates, strict=True)
    ]
    memory = variant.bytes / (bandwidth * 1e12)
    return memory, found[0], found[1], found[2] + found[3]


def show():
    """A line per variant and architecture; the memory's time as a share of the longest one."""
    for architecture in dict.fromkeys(card[0] for card in CARDS.values()):
        cards = [name for name, card in CARDS.items() if card[0] == architecture]
        head = " regs blocks spills    128-bit    all   FP32   FP64   conv  bytes"
        print(f"\n{architecture:<42}{head}" + "".join(f"{name:>9}" for name in cards))
        for variant in variants():
            found = count(variant, architecture, CARDS[cards[0]][-1])
            line = f"{variant.name:42}{found.registers:5}{found.blocks:7}{found.local:7}"
            wide = f"{found.wide} of {found.wanted:.2g}"
            counts = "".join(f"{n:7.4g}" for n in found.instructions.values())
            line += f"{wide:>11}{counts}{variant.bytes:7}"
            for card in cards if variant.elements else ():
                seconds = times(variant, found, card)
                line += f"{seconds[0] / max(seconds):9.0%}"
            print(line, flush=True)
