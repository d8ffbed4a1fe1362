"""The checks of machine code find planted faults, and accept correct code."""

import pytest

from tests.support.cuda.sass import faults

# A loop over two products: of rows in R8 to R11, and of weights in R12 to R15 that add to R56 to R59.
CORRECT = """
    /*0000*/ LDSM.16.M88.4 R8, [R2+0x4000] ;
    /*0010*/ WARPGROUP.ARRIVE ;
    /*0020*/ HGMMA.64x8x16.F32.BF16 R24, R8, gdesc[UR8], RZ, !UPT, gsb0 ;
    /*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*0040*/ LDS.128 R12, [R24] ;
    /*0050*/ HGMMA.64x8x16.F32.BF16 R56, R12, gdesc[UR8].tnspB, R56, gsb0 ;
    /*0060*/ IADD3 R4, R4, 0x1, RZ ;
    /*0070*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*0080*/ @!P1 BRA 0x10 ;
    /*0090*/ EXIT ;
"""


def test_correct_code():
    assert faults(CORRECT) == []


def test_factors_of_a_wide_product_are_not_wide():
    beside = CORRECT.replace("IADD3 R4, R4, 0x1, RZ", "IMAD.WIDE R4, R55, 0x4, R2")
    assert faults(beside) == []
    touching = CORRECT.replace("IADD3 R4, R4, 0x1, RZ", "IMAD.WIDE R4, R2, 0x4, R55")
    assert "touches R56" in faults(touching)[0]


def test_right_operand_of_a_warp_s_product_is_half_as_wide():
    line = "IADD3 R4, R4, 0x1, RZ"
    assert faults(CORRECT.replace(line, "HMMA.16816.F32 R16, R20, R54, R16")) == []
    touching = faults(CORRECT.replace(line, "HMMA.16816.F32 R16, R20, R55, R16"))
    assert "touches R56" in touching[0]


@pytest.mark.parametrize(
    ("line", "planted", "expected"),
    [
        ("LDS.128 R12, [R24]", "LDS.128 R8, [R24]", "R8 of /*0020*/ HGMMA"),
        ("LDS.128 R12, [R24]", "LDS.64 R10, [R24]", "R11 of /*0020*/ HGMMA"),
        ("WARPGROUP.ARRIVE", "@P0 MOV R9, R4", "R9 of /*0020*/ HGMMA"),
        ("IADD3 R4, R4, 0x1, RZ", "FADD R57, R57, R4", "touches R57 while /*0050*/"),
        ("IADD3 R4, R4, 0x1, RZ", "FADD R4, R59, R4", "touches R59 while /*0050*/"),
        ("IADD3 R4, R4, 0x1, RZ", "MOV R15, R4", "touches R15 while /*0050*/"),
        ("IADD3 R4, R4, 0x1, RZ", "STS.64 [R4], R58", "touches R58, R59 while /*0050*/"),
        ("/*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x0", "/*0030*/ NOP", "touches R24 while /*0020*/"),
        ("/*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x0", "/*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x1", "R24"),
    ],
)
def test_planted_fault(line, planted, expected):
    assert CORRECT.count(line) == 1
    found = faults(CORRECT.replace(line, planted))
    assert any(expected in fault for fault in found), found
