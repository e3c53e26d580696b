"""Counting machine code: straight code, loops, what cannot be counted, and loads that wait behind uses."""

import pytest

from river_compile.kernels.triton.linear import LinearSpec, LinearTile
from tools.kernels.machine_code import counted, thread_weights

MAKES, LOAD = "LOP3.LUT R1, R2, 0xf, R3, 0xea, !PT", "LDG.E.EF.128.CONSTANT R4, desc[UR4][R2.64]"
#: One warp with 64 weights: two of a thread.
SPEC = LinearSpec(1, 64, 1, LinearTile(1, 64, num_warps=1), dtype="float32")


def code(*instructions: str) -> str:
    """A disassembly: an instruction every 16 bytes, each with its encoding behind it, then the end's padding."""
    padded = (*instructions, "EXIT", "BRA 0xffff", "NOP")
    return "\n".join(
        f"        /*{16 * i:04x}*/                   {text} ;    /* 0x0000000000007918 */\n"
        f"                                             /* 0x000fc00000000000 */"
        for i, text in enumerate(padded)
    )


def test_straight_code_counts_once_and_its_padding_does_not():
    found = counted(code(LOAD, MAKES, MAKES), SPEC)
    assert (found.per_weight, found.loads_first) == (4 / 2, True)


def test_a_loop_counts_as_often_as_its_weights_need_it():
    """Eight weights of a thread: two before the loop, two in each of its three turns."""
    spec = LinearSpec(1, 256, 1, LinearTile(1, 256, num_warps=1), dtype="float32")
    assert thread_weights(spec) == 8
    found = counted(code(LOAD, MAKES, MAKES, MAKES, MAKES, "FFMA R1, R2, R3, R4", "@P0 BRA 0x30"), spec)
    assert found.per_weight == (3 + 3 * 4 + 1) / 8


def test_loads_behind_a_use_are_seen():
    assert not counted(code(LOAD, MAKES, LOAD, MAKES), SPEC).loads_first


def test_a_loop_without_weights_is_not_counted():
    assert counted(code("FADD R1, R1, R2", "@P0 BRA 0x0", MAKES, MAKES), SPEC) is None


@pytest.mark.parametrize("instructions", [(MAKES,), (MAKES, MAKES, MAKES), (MAKES, MAKES, MAKES, "@P0 BRA 0x10")])
def test_code_that_cannot_make_the_weights_is_refused(instructions):
    with pytest.raises(ValueError, match="do not make 2 weights"):
        counted(code(*instructions), SPEC)
