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

import networkx
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
# In the assembly of NVIDIA and AMD
LABEL = re.compile(r"(\.L\w+):")
INSTRUCTION = re.compile(r"\s+(?:/\*\w{4,}\*/\s+)?(@!?\w+\s+)?([A-Za-z]\w*(?:\.\w+)*)(.*)")
JUMP = re.compile(r"BRA|s_c?branch")
END = re.compile(r"EXIT|s_endpgm")
ACCESS = re.compile(r"(?:LDG|STG)|(?:global|buffer)_(?:load|store)_dword")
ACCESSES = {".64": 8, ".128": 16, "x2": 8, "x4": 16}  # bytes of an access; else 4
STORE = re.compile(r"STG|(global|buffer)_store")
LOCAL = re.compile(r"LDL|STL|scratch_")
COUNTED = {
    "all": re.compile(r"[A-Z]|[a-rt-z]"),  # AMD issues scalar instructions beside these
    "FP32": re.compile(r"F(ADD|MUL|FMA|SETP|MNMX|SEL)|v_(pk_)?(add|sub|mul|fma|fmac)_f32"),
    "FP64": re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)|v_(?!cvt|rcp|rsq)\w+_f64"),
    "conv": re.compile(r"(F2F|F2I|I2F)\S*F64|MUFU\S*64H|v_(cvt|rcp|rsq)_\w*f64"),
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
    instructions: dict  # per element, of each of COUNTED


def variants():
    """What SphereSGD launches for each kind of sphere, taken down in place of being launched. This
    function alone knows the kernels: by their names and arguments, from the launches themselves."""
    from triton.runtime.jit import JITFunction, mangle_type

    found = {}
    kinds = {
        "joint": ("group", [(1 << 22,)]),
        "one tile": ("tensor", 64 * [(sphere_step.SMALLEST,)]),
    }
    kinds |= {"rows": ("row", [(4096, 64)]), "no sphere": (None, [(1 << 22,)])}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for kind, dtype, beta in product(kinds, dtypes, (0.0, 0.9)):
        sphere, shapes = kinds[kind]
        params = [torch.ones(shape, dtype=dtypes[dtype]) for shape in shapes]
        for p in params:
            p.grad = torch.ones_like(p)
        launched = []

        def take_down(kernel, *args, grid, warmup, launched=launched, **options):
            values = dict(zip(kernel.arg_names, args, strict=False)) | options
            launched.append((kernel, grid[0], values))

        options = dict(lr=1e-3, sphere=sphere, momentum=beta, backend="triton")
        here = patch.object(sphere_step, "INTERPRET", True)  # on the CPU
        long = patch.object(sphere_step, "SMALLEST", sphere_step.LARGEST)  # tiles, as of many bytes
        with here, long, patch.object(JITFunction, "run", take_down):
            sphere_step.SphereSGD(params, **options).step()
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
            reads, writes, elements = 1 + moved, moved, sum(p.numel() for p in params) // programs
            if part == "sums":
                writes = 0
            if part == "rule":
                reads = writes = elements = 0
            name = f"{kind} {dtype}{' momentum' if beta else ''} {part}"
            made = part, kernel, signature, constants, values, elements, reads, writes
            key = kernel.__name__, str((signature, constants, made[-3:]))
            found.setdefault(key, Variant(name, *made, p.element_size()))
    return list(found.values())


def count(variant, architecture, threads_of_sm=2048):
    """The `Count` of a variant on 80, 90, … or "gfx942", without a GPU."""
    code, places, registers, lanes = compiled(variant, architecture)
    threads = variant.options["num_warps"] * 32
    each = variant.elements / threads or 1  # elements of a thread
    graph = flow(code, places)
    loops, names = innermost_loops(graph), [name for _, name, _ in code]
    longest = max(map(width, names))
    ways = paths(graph, 0, names, longest, max if variant.part == "whole" else min)
    n, costs = max(ways.items()) if variant.elements else (0, min(ways.values()))
    accesses, bodies = [(n, longest)], []
    for head, body in loops if variant.elements else ():
        inside = [names[i] for i in body if i in range(len(names))]
        longest, stores = max(map(width, inside)), any(map(STORE.match, inside))
        vectors = variant.reads + (variant.writes if stores else 0)
        n, cost = max(paths(body, head, names, longest, min).items())
        if longest and n and n % vectors == 0:  # else it reads tables alone
            turns = each * variant.size * vectors / (n * longest)
            bodies.append((stores, [turns * x for x in cost], (n, longest)))
    if bodies:
        # The longest of several loops, for tiles of several kinds; what is around them, once
        costs, accesses = min(ways.values()), []
        for stores in {"sums": [False], "move": [True], "whole": [False, True]}[variant.part]:
            _, cost, access = max(body for body in bodies if body[0] == stores)
            costs = [a + b for a, b in zip(costs, cost, strict=True)]
            accesses.append(access)
    return Count(
        registers=registers,
        blocks=blocks_of(registers, threads, threads_of_sm, 65536 if lanes == 32 else 131072),
        local=sum(bool(LOCAL.match(name)) for name in names),
        wide=sum(n for n, longest in accesses if longest == 16),
        wanted=sum(n * longest for n, longest in accesses) / 16,
        instructions={name: x / each for name, x in zip(COUNTED, costs, strict=True)},
    )


def compiled(variant, architecture):
    """The (guard, name, rest) of each instruction, the places of labels in them, the registers of a
    thread, the lanes of a warp."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cuda = isinstance(architecture, int)
    options = dict(variant.options)
    if not cuda:
        options["num_warps"] //= 2  # of 64 threads, as sphere_step has it there
    target = GPUTarget("cuda" if cuda else "hip", architecture, 32 if cuda else 64)
    pointers = [(i,) for i, kind in enumerate(variant.signature.values()) if kind[0] == "*"]
    aligned = dict.fromkeys(pointers, [["tt.divisibility", 16]])  # as torch allocates them
    source = ASTSource(variant.kernel, variant.signature, variant.constants, aligned)
    asm = triton.compile(source, target=target, options=options).asm
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
    code, places = [], {}
    for line in text.splitlines():
        if LABEL.match(line):
            places[LABEL.match(line)[1]] = len(code)
        elif INSTRUCTION.match(line):
            code.append(INSTRUCTION.match(line).groups())
    return code, places, registers, target.warp_size


def width(name):
    """The bytes that an instruction moves from or to global memory, of each lane."""
    if not ACCESS.match(name):
        return 0
    return max((n for mark, n in ACCESSES.items() if mark in name), default=4)


def flow(code, places):
    """Which instruction may follow which; len(code) is the end."""
    graph = networkx.DiGraph()
    for i, (guard, name, rest) in enumerate(code):
        jumps, ends = JUMP.match(name), END.match(name)
        if jumps:
            graph.add_edge(i, places.get(re.search(r"\.L\w+", rest)[0], i))
        if ends:
            graph.add_edge(i, len(code))
        if guard or "," in rest or name.startswith("s_cbranch") or not (jumps or ends):
            graph.add_edge(i, i + 1)
    graph.remove_edges_from(list(networkx.selfloop_edges(graph)))
    return graph


def innermost_loops(graph):
    """(first instruction, graph) of each; the way back leads to the end, -1. Takes the ways back
    out of the graph, so that it is gone through once."""
    found, parts = [], True
    while parts:
        parts = [x for x in networkx.strongly_connected_components(graph) if len(x) > 1]
        for part in parts:
            entries = [i for i in part if not part.issuperset(graph.predecessors(i))]
            head = min(entries or part)
            body = networkx.DiGraph(graph.subgraph(part))
            back = list(body.in_edges(head))
            body.remove_edges_from(back)
            graph.remove_edges_from(back)
            body.add_edges_from((i, -1) for i, _ in back)
            if networkx.is_directed_acyclic_graph(body):
                found.append((head, body))
    return found


def blocks_of(registers, threads, threads_of_sm, registers_of_sm):
    """How many blocks of so many threads live on an SM."""
    granted = math.ceil(registers / 8) * 8
    return min(registers_of_sm // granted, threads_of_sm) // threads


def paths(graph, start, names, longest, pick):
    """Instructions of each of COUNTED on the way from `start` to the end that has the fewest of
    them (pick = min) or the most (max, as the sums of a tile alone are followed by the rule), by
    the number of accesses of the longest kind on it."""
    ways = {start: {0: (0,) * len(COUNTED)}}
    for i in networkx.topological_sort(graph):
        if i in (-1, len(names)):
            end = i
        elif i in ways:
            own = [bool(kind.match(names[i])) for kind in COUNTED.values()]
            for n, costs in ways.pop(i).items():
                n += width(names[i]) == longest
                costs = tuple(a + b for a, b in zip(costs, own, strict=True))
                for after in graph.successors(i):
                    way = ways.setdefault(after, {})
                    way[n] = pick(costs, way.get(n, costs))
    return ways[end]


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
        head = f"\n{architecture:<28} regs blocks spills  128-bit"
        head += "".join(f"{name:>6}" for name in COUNTED) + " bytes"
        print(head + "".join(f"  {card}" for card in cards))
        for variant in variants():
            try:
                found = count(variant, architecture, CARDS[cards[0]][-1])
            except Exception as error:  # of an old Triton anything
                print(f"this Triton cannot compile for it ({str(error).splitlines()[0]})")
                break
            line = f"{variant.name:28}{found.registers:5}{found.blocks:7}{found.local:7}"
            line += f"{f'{found.wide} of {found.wanted:.2g}':>9}"
            line += "".join(f"{round(n, 2):6.3g}" for n in found.instructions.values())
            line += f"{variant.bytes:6}"
            for card in cards if variant.elements else ():
                seconds = times(variant, found, card)
                line += f"{seconds[0] / max(seconds):{len(card) + 2}.0%}"
            print(line, flush=True)
