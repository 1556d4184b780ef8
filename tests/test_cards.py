"""The table of cards, against what their makers print."""

import pytest

from lab.kernels import CARDS, blocks_of

# NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 and B200; its white papers on GA102, Ada and
# RTX Blackwell; AMD's data sheet of MI300X (vector FP64; it can pair FP32, the kernels do not)
DATA_SHEETS = """card, TFLOP/s in FP32 and FP64, TB/s
A100      19.5  9.7   2.039
RTX 3090  35.6  0.556 0.936
RTX 4090  82.6  1.29  1.008
H100      67    34    3.35
H200      67    34    4.8
RTX 5090  104.8 1.64  1.792
MI300X    81.7  81.7  5.3"""


@pytest.mark.parametrize("line", DATA_SHEETS.splitlines()[1:])
def test_a_card_has_the_rates_of_its_data_sheet(line):
    *name, fp32, fp64, bandwidth = line.split()
    _, memory, sms, clock, _, of_fp32, of_fp64, *_ = CARDS[" ".join(name)]
    for rate, expected in ((of_fp32, fp32), (of_fp64, fp64)):
        assert 2e-3 * rate * sms * clock == pytest.approx(float(expected), rel=0.02)  # FMA is two
    assert memory == pytest.approx(float(bandwidth), rel=0.005)


@pytest.mark.parametrize(
    ("registers", "threads", "threads_of_sm", "expected"),
    [(32, 256, 2048, 8), (33, 256, 2048, 6), (126, 256, 2048, 2), (168, 256, 2048, 1)]
    + [(16, 256, 1536, 6), (40, 1024, 1536, 1), (255, 128, 1536, 2)],
)
def test_blocks_of_an_sm_share_its_registers_and_threads(
    registers, threads, threads_of_sm, expected
):
    assert blocks_of(registers, threads, threads_of_sm, 65536) == expected
