"""The libraries of C++ kernels without torch: every phase against double, on this machine and on emulated ARM cores.

The program in `phases/` draws the cases. The emulated core has the instruction set of the library and no later one.
An older core stops with SIGILL, which proves that the library uses its instruction set.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from river_compile.kernels.native import build, machine
from tests.kernels.native import program
from tests.kernels.native.running import EACH_ISA
from tests.support.examples import slow_but

# By instruction set, a core of ARM that has it and no later one.
CORES = {"portable": "cortex-a57", "neon": "cortex-a57", "neon_dotprod": "neoverse-n1", "neon_i8mm": "neoverse-n2"}
# A core that lacks some of an instruction set.
OLDER = {"neon_dotprod": "cortex-a57", "neon_i8mm": "neoverse-n1"}
BEST = ("neon_i8mm",)

supported = build.supported_isas()
# Those of this architecture that this machine lacks.
LACKED = {isa.name: isa for isa in build.isas_of(machine.architecture()) if isa not in supported}
TILES = Path(__file__).parent / "tiles.h"
# The instruction set with tiles, and that which it is without them.
WITH_TILES, WITHOUT = ("amx", "avx512_bf16")
EMULATES_TILES = WITH_TILES in LACKED and WITHOUT not in LACKED


def arm_isa(name: str) -> build.Isa:
    """Returns an instruction set of ARM, or skips where nothing can compile or run it."""
    program.require_arm_tools()
    return next(isa for isa in build.isas_of(machine.ARM) if isa.name == name)


@pytest.mark.parametrize("isa", EACH_ISA)
def test_each_phase_on_this_machine(isa):
    program.run(build.kernels_library(isa)).check()


@pytest.mark.parametrize("name", slow_but(() if EMULATES_TILES else (WITH_TILES,), LACKED))
def test_what_this_machine_lacks_compiles(name):
    """And has every function that it calls: loading resolves them all."""
    ctypes.CDLL(str(build.kernels_library(LACKED[name])))


@pytest.mark.skipif(not EMULATES_TILES, reason=f"the processor has tiles, or lacks {WITHOUT}")
def test_each_phase_with_emulated_tiles():
    """Most machines have no tiles, so that nothing else runs these kernels there."""
    isa = LACKED[WITH_TILES]
    version = hashlib.sha256(TILES.read_bytes()).hexdigest()  # so that a change compiles the library again
    emulated = replace(isa, flags=(*isa.flags, f"-DRIVER_TILES={version}", "-include", str(TILES)))
    program.run(build.kernels_library(emulated)).check()


@pytest.mark.parametrize("name", slow_but(BEST, CORES))
def test_each_phase_on_an_emulated_arm_core(name):
    """Takes more than ten seconds, most of them the compiler's: nothing else runs these kernels on other machines."""
    library = program.arm_library(arm_isa(name))
    program.run_arm(library, CORES[name]).check()


@pytest.mark.parametrize("name", slow_but(BEST, OLDER))
def test_an_older_arm_core_stops_at_an_instruction_that_it_lacks(name):
    done = program.run_arm(program.arm_library(arm_isa(name)), OLDER[name])
    assert done.met_unknown_instruction, done
