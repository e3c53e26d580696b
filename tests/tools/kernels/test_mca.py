"""Which loops of a listing `tools.kernels.mca` counts."""

from tools.kernels import mca

LISTING = """
0000000000000000 <_Zother>:
   0:\tsdot\tv0.4s, v1.16b, v2.4b[0]
   4:\tb.gt\t0 <_Zother>

0000000000000010 <_Zproduct>:
  10:\tmov\tx0, #0
  14:\tldr\tq1, [x1], #16
  18:\tsdot\tv0.4s, v1.16b, v2.4b[0]
  1c:\tsubs\tx2, x2, #1
  20:\tb.gt\t14 <_Zproduct+0x4>
  24:\tscvtf\tv0.4s, v0.4s
  28:\tcbnz\tx3, 10 <_Zproduct>
  2c:\tldr\tq3, [x4]
  30:\tcbnz\tx4, 2c <_Zproduct+0x1c>
"""


def test_the_innermost_loops_of_a_function_with_an_instruction_are_found():
    """Not those around them, of other functions, or without the instruction."""
    loops = mca.innermost_loops(LISTING, "product", "sdot")
    assert [[code.split()[0] for code in loop] for loop in loops] == [["ldr", "sdot", "subs"]]
    assert mca.innermost_loops(LISTING, "product", "smmla") == []


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr(mca.shutil, "which", lambda program: None)
    assert mca.main(["--mca", "no-such-mca"]) == 1
    assert f"{mca.COMPILER} is not installed; apt-get install" in capsys.readouterr().err
