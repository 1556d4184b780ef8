"""The machine code of the kernels, compiled without a GPU: how it is counted, what it must be."""

import os
from functools import cache

import pytest

import sphere_step
from lab import kernels

if sphere_step.INTERPRET or sphere_step.triton is None:
    pytest.skip("compiles: neither in the interpreter nor without Triton", allow_module_level=True)

import triton
import triton.language as tl

SLOW = "SLOW" in os.environ  # a kernel takes some seconds to compile, for each card anew
ARCHITECTURES = [80, 86, 89, 90, 100, 120, "gfx942"] if SLOW else [89]
DEFAULT = ["joint fp32 momentum sums", "joint fp32 momentum move", "one tile fp32 momentum whole"]


@cache
def variants():
    return {variant.name: variant for variant in kernels.variants()}


CHOSEN = [name for name in variants() if SLOW or name in DEFAULT]


def count(variant, architecture):
    try:
        return kernels.count(variant, architecture)
    except Exception as error:
        if architecture == "gfx942" and "linker" in str(error):
            pytest.skip("this Triton brings no linker for AMD")
        raise


@cache
def counted(name, architecture):
    variant = variants()[name]
    return variant, count(variant, architecture)


@triton.jit
def scaled(x, y, N: tl.constexpr, WIDE: tl.constexpr, SUM: tl.constexpr):
    """A kernel of which one knows what it takes: loads, a product, a store; and perhaps a sum."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    a = tl.load(x + i)
    b = (a.to(tl.float64) * 3.7).to(tl.float32) if WIDE else a * 3.7
    tl.store(y + i, b)
    if SUM:
        if tl.program_id(0) == 0:
            tl.store(y, tl.sum(b))


def known(wide=False, add=False):
    constants = {"N": 2048, "WIDE": wide, "SUM": add}
    signature = {"x": "*fp32", "y": "*fp32"} | dict.fromkeys(constants, "constexpr")
    made = scaled, signature, constants, {"num_warps": 4}, 2048, 1, 1, 4
    return kernels.Variant("known", "sums", *made)


@pytest.mark.parametrize("architecture", dict.fromkeys([*ARCHITECTURES, "gfx942"]))
@pytest.mark.parametrize("wide", [False, True])
def test_a_kernel_of_known_instructions_is_counted_right(architecture, wide):
    """16 elements per thread, of which four are one access."""
    found = count(known(wide), architecture)
    fp64, conversions = (1, 2) if wide else (0, 0)
    assert found.wide == found.wanted == 2 * 16 / 4 and found.local == 0
    instructions = found.instructions
    assert instructions["FP64"] == fp64 and instructions["conv"] == conversions
    assert instructions["FP32"] in (1 - fp64, (1 - fp64) / 2)  # packed: two at once
    assert instructions["all"] < (20 if wide else 3)


@triton.jit
def added(x, y, N: tl.constexpr):
    """A product that is added: what may be contracted."""
    a = tl.load(x + tl.arange(0, N))
    tl.store(y + tl.arange(0, N), a * a + tl.load(y + tl.arange(0, N)))


@pytest.mark.parametrize("architecture", dict.fromkeys([*ARCHITECTURES, 90, "gfx942"]))
def test_the_options_of_the_kernels_keep_products_and_sums_apart(architecture):
    """A product that is contracted with a sum is not rounded, and the pairs of a sum are wrong."""
    signature, fused = {"x": "*fp32", "y": "*fp32", "N": "constexpr"}, []
    options = variants()[DEFAULT[0]].options
    for chosen in (options, options | {"enable_fp_fusion": True}):
        made = added, signature, {"N": 1024}, chosen, 1024, 1, 1, 4
        variant = kernels.Variant("added", "sums", *made)
        count(variant, architecture)
        code, *_ = kernels.compiled(variant, architecture)
        fused.append(sum("FFMA" in name or "fma" in name for _, name, _ in code))
    assert fused[0] == 0 < fused[1]


def test_what_is_behind_a_branch_counts_only_in_the_longest_way():
    short = kernels.count(known(add=True), 90).instructions["FP32"]
    whole = kernels.count(known(add=True)._replace(part="whole"), 90).instructions["FP32"]
    assert short == 1 and 2 < whole < 3  # 16 additions, and those between threads


@triton.jit
def looped(x, y, n, N: tl.constexpr):
    squares = tl.zeros([N], tl.float32)
    for start in range(0, n, N):
        a = tl.load(x + start + tl.arange(0, N))
        squares += a * a
    tl.store(y, tl.sum(squares))


@pytest.mark.parametrize("architecture", [90, "gfx942"])
def test_a_loop_counts_as_often_as_it_runs(architecture):
    signature = {"x": "*fp32", "y": "*fp32", "n": "i32", "N": "constexpr"}
    made = looped, signature, {"N": 1024}, {"num_warps": 4}, 1 << 16, 1, 0, 4
    found = count(kernels.Variant("looped", "sums", *made), architecture)
    assert 0.5 <= found.instructions["FP32"] < 1.1 and found.instructions["FP64"] == 0
    assert found.wide > 0 and 0.5 < found.instructions["all"] < 5


def test_a_loop_is_found_wherever_its_parts_lie():
    """One that is entered at its end, and whose middle lies behind the exit."""
    code = [(None, name, rest) for name, rest in (
        ("s_branch", " .L_test"), ("LDG.E.128", ""), ("s_branch", " .L_middle"), ("s_cbranch", " .L_top"),
        ("s_endpgm", ""), ("FADD", ""), ("s_branch", " .L_test"))]  # fmt: skip
    places = {".L_top": 1, ".L_test": 3, ".L_middle": 5}
    graph = kernels.flow(code, places)
    ((head, body),) = kernels.innermost_loops(graph)
    names = [name for _, name, _ in code]
    around = kernels.paths(body, head, names, 16, min)
    assert head == 3 and set(body) == {1, 2, 3, 5, 6, -1} and list(around) == [1]
    assert dict(zip(kernels.COUNTED, around[1], strict=True))["FP32"] == 1
    assert list(kernels.paths(graph, 0, names, 16, min)) == [0]


def test_spills_are_seen():
    variant, loose = counted("joint fp32 momentum move", 89)
    tight = variant._replace(options=variant.options | {"maxnreg": 40})
    spilled = kernels.count(tight, 89)
    assert spilled.registers <= 40 < loose.registers and spilled.local > loose.local + 20
    assert spilled.blocks > loose.blocks


def test_the_table_has_a_line_for_each_variant_in_100_columns(capsys, monkeypatch):
    assert max(map(len, variants())) <= 28
    monkeypatch.setattr(kernels, "variants", lambda: [known(), known(wide=True)])
    cards = {name: kernels.CARDS[name] for name in ("B200", "B300")}
    cards["newer"] = "gfx000", *kernels.CARDS["MI300X"][1:]
    monkeypatch.setattr(kernels, "CARDS", cards)
    kernels.show()
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 6 and max(map(len, lines[:3])) <= 100
    assert lines[0].startswith("100 ") and lines[0].split()[-2:] == ["B200", "B300"]
    assert "8 of 8" in lines[1] and lines[1].split()[-3:] == ["8", "100%", "100%"]
    assert lines[4].startswith("gfx000") and "this Triton cannot compile for it" in lines[5]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CHOSEN)
def test_all_is_moved_128_bits_at_a_time_nothing_spills_and_fp64_takes_no_time(name, architecture):
    """FP64 of a joint sphere takes at most half of the time of the memory. Spheres of one tile are
    allowed all of it, but on B300; of the short ones, on the cards with 16 FP64 units and more."""
    variant, found = counted(name, architecture)
    assert found.wide == found.wanted and found.blocks >= 2
    assert found.local == 0
    for card, (of_card, *_, units, _, _) in kernels.CARDS.items():
        if of_card == architecture and variant.elements:
            memory, _, _, fp64 = kernels.times(variant, found, card)
            if name.startswith("joint"):
                assert fp64 <= memory / 2, card
            elif units >= 16 or (name.startswith("one tile") and card != "B300"):
                assert fp64 <= memory, card
