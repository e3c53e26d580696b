"""The mutations: where kernels are broken, and which tests are likely to notice.

Each changes what a user gets (a text, an entry), in a line that is likely to stay.
After a change of that line, `tests/tools/test_mutations.py` asks for the entry to follow. Not handled: changes of speed
alone, and those of lines that only a GPU runs.
"""

from __future__ import annotations

from .trial import Mutation

SOURCES = "kernels/native/sources"
TEMPLATES = "kernels/triton/templates"

_QUANT = (
    Mutation(
        "grid-zero",
        "kernels/quant/fit.py",
        "storable_grid(scale, low + MID_POINT * scale, low, dtype)",
        "storable_grid(scale, low + (MID_POINT - 1) * scale, low, dtype)",
        "the zero of a grid is one step off",
        ("tests/kernels/quant/test_grid.py",),
    ),
    Mutation(
        "layout-nibbles",
        "kernels/quant/layouts.py",
        "(low | high << 4).flatten(-2)",
        "(high | low << 4).flatten(-2)",
        "the nibbles of the C++ kernels' layout are swapped",
        ("tests/kernels/quant/test_layouts.py",),
    ),
    Mutation(
        "layout-float16",
        "kernels/quant/layouts.py",
        "if largest <= limits.max and smallest >= limits.tiny else",
        "if largest <= limits.max or smallest >= limits.tiny else",
        "scales that float16 has no room for are stored in it",
        ("tests/kernels/quant/test_layouts.py",),
    ),
    Mutation(
        "gptq-blocks",
        "kernels/quant/calibrated.py",
        ".addmm_(self._factor[block, block.stop :].T, errors_KN, alpha=-1)",
        ".addmm_(self._factor[block, block.stop :].T, errors_KN, alpha=1)",
        "GPTQ doubles the errors of earlier blocks instead of making up for them",
        ("tests/kernels/quant/test_calibrated.py",),
    ),
    Mutation(
        "gptq-inputs",
        "kernels/quant/calibrated.py",
        "inverse_TT.addmm_(through.T, through, alpha=-added)",
        "inverse_TT.addmm_(through.T, through, alpha=added)",
        "GPTQ by few inputs takes what a block of columns has in common with others for the opposite",
        ("tests/kernels/quant/test_calibrated.py",),
    ),
)

_NATIVE = (
    Mutation(
        "kv-bound",
        f"{SOURCES}/kernels/kv_fill.h",
        "(slot < 0 || slot >= a.slots)",
        "(slot < 0 || slot > a.slots)",
        "the slot after the last one is written",
        ("tests/kernels/native/test_cache.py::test_a_slot_outside_of_the_cache_writes_nothing",),
    ),
    Mutation(
        "kv-rotation",
        f"{SOURCES}/kernels/kv_fill.h",
        "x[first] * cos[of_first] - x[second] * sin[of_first];",
        "x[first] * cos[of_first] + x[second] * sin[of_first];",
        "half of a head is rotated the other way",
        ("tests/kernels/native/test_cache.py",),
    ),
    Mutation(
        "attention-causal",
        f"{SOURCES}/kernels/attention_mask.h",
        "int(std::min<int64_t>(a.slots, row % a.positions + 1))",
        "int(std::min<int64_t>(a.slots, row % a.positions))",
        "a position does not attend to itself",
        ("tests/kernels/native/test_positions.py",),
    ),
    Mutation(
        "attention-chunks",
        f"{SOURCES}/kernels/attention.h",
        "total += of[a.head_dim + 1] * factor;",
        "total += of[a.head_dim + 1];",
        "chunks of a long cache are weighted as if all had the same maximum",
        ("tests/kernels/native/test_cache.py",),
    ),
    Mutation(
        "attention-sinks",
        f"{SOURCES}/kernels/attention.h",
        "return shrunk / (total * shrunk + exp_of(sink - most));",
        "return shrunk / (total + exp_of(sink - most));",
        "a sink above all scores leaves the sum of the weights as it was",
        ("tests/kernels/native/test_cache.py",),
    ),
    Mutation(
        "linear-zero",
        f"{SOURCES}/kernels/gemv_int4.h",
        "fma(zero, every(x[r].sum[g]), fma(products[r], scale, sums[h][r]))",
        "fma(zero, every(x[r].sum[0]), fma(products[r], scale, sums[h][r]))",
        "every group's zero meets the first group's activations",
        ("tests/kernels/native/test_linear.py",),
    ),
    Mutation(
        "linear-tail",
        f"{SOURCES}/phases.h",
        "blocks() const { return ceil_div(width(), kBlock); }",
        "blocks() const { return ceil_div(width() - kBlock + 1, kBlock); }",
        "output features after the last whole block are not computed",
        ("tests/kernels/native/test_linear.py",),
    ),
    Mutation(
        "prepare-scale",
        f"{SOURCES}/kernels/activations.h",
        "*scale = largest / 127.0f;",
        "*scale = largest / 128.0f;",
        "activations in 8 bits come out 0.8 % too small",
        ("tests/kernels/native/test_linear.py",),
    ),
    Mutation(
        "rescore-bound",
        f"{SOURCES}/kernels/rescore.h",
        "return !(largest_[block] < least_);",
        "return !(largest_[block] <= least_);",
        "one block of logits fewer than promised is computed again in 16 bits",
        ("tests/kernels/native/test_rescore.py",),
    ),
    Mutation(
        "choices-first",
        f"{SOURCES}/kernels/choices.h",
        "return a > b || (a != a && b == b);",
        "return a >= b || (a != a && b == b);",
        "the last of several best tokens is chosen, which transformers does not",
        ("tests/kernels/native/test_entropy.py",),
    ),
    Mutation(
        "packing-errors",
        f"{SOURCES}/packing/packing.cpp",
        "store(other, load(other) - error * factors[j]);",
        "store(other, load(other) + error * factors[j]);",
        "GPTQ in C++ doubles errors within a block",
        ("tests/kernels/native/test_packing.py",),
    ),
)

_TWELVE_BITS = (
    Mutation(
        "bf12-patches",
        f"{SOURCES}/kernels/bf12.h",
        "out[next[0] % kFour * stride + next[0] / kFour - i] = uint16_t(next[1]);",
        "out[(next[0] + 1) % kFour * stride + next[0] / kFour - i] = uint16_t(next[1]);",
        "patches of weights in 12 bits belong to the next output feature",
        ("tests/kernels/native/test_bf12.py",),
    ),
    Mutation(
        "bf12-nibbles",
        f"{SOURCES}/kernels/bf12.h",
        "upper_[0][h] = look_up(palette, low_nibbles(codes));",
        "upper_[0][h] = look_up(palette, high_nibbles(codes));",
        "an output feature in 12 bits has its neighbor's exponents",
        ("tests/kernels/native/test_bf12.py",),
    ),
    Mutation(
        "bits8-scales",
        f"{SOURCES}/kernels/gemm_f32.h",
        "every(scale[of * groups + i / kPiece])",
        "every(scale[of * groups])",
        "every group of integers of 8 bits has its row's first scale",
        ("tests/kernels/native/test_bits8.py",),
    ),
    Mutation(
        "bits8-zero-points",
        "kernels/quant/lossless.py",
        "if parts is None or (isinstance(zero, Tensor) and bool(zero.any())):",
        "if parts is None:",
        "zero points of torchao's tensors are forgotten",
        ("tests/kernels/quant/test_bits8.py",),
    ),
    Mutation(
        "bf12-generated",
        f"{TEMPLATES}/linear/bf12.jinja",
        "(patch[None, :] >= ends[:, None])",
        "(patch[None, :] > ends[:, None])",
        "the generated kernel gives patches to the four before theirs",
        ("tests/kernels/triton/test_linear.py",),
    ),
)
_TRITON = (
    Mutation(
        "triton-midpoint",
        f"{TEMPLATES}/linear/words.jinja",
        "BITS_{{ p }}) - {{ 2 ** 23 + 8 * 16 ** p }}.0)",
        "BITS_{{ p }}) - {{ 2 ** 23 + 7 * 16 ** p }}.0)",
        "generated products take q - 7 for q - 8",
        ("tests/kernels/triton/test_linear.py",),
    ),
    Mutation(
        "triton-slot",
        f"{TEMPLATES}/decode_attention.py.jinja",
        "skipped = tl.where(inside, new, -1).to(tl.int32)",
        "skipped = tl.where(inside, new + 1, -1).to(tl.int32)",
        "the new slot counts twice, and the one after it not at all",
        ("tests/kernels/triton/test_decode_attention.py",),
    ),
    Mutation(
        "triton-sinks",
        f"{TEMPLATES}/decode_attention.py.jinja",
        "tl.exp2((sink - {{ base }}) * {{ LOG2E }})",
        "tl.exp2(sink * {{ LOG2E }})",
        "a sink is weighted as if the largest score were 0",
        ("tests/kernels/triton/test_decode_attention.py",),
    ),
    Mutation(
        "triton-score",
        f"{TEMPLATES}/exit_score.py.jinja",
        "lowest = tl.minimum(lowest, similarity)",
        "lowest = tl.where(lowest == 2.0, similarity, lowest)",
        "the first row of a batch decides for all",
        ("tests/kernels/triton/test_exit_score.py",),
    ),
)

_TILES = (
    Mutation(
        "tiles-again",
        f"{SOURCES}/kernels/bf12.h",
        "memory_ + (stride_ == padded_ ? unit : 0)",
        "memory_",
        "AMX: more than 32 rows read the last unit in place of all others",
        ("tests/kernels/native/test_phases.py::test_each_phase_with_emulated_tiles",),
    ),
)

_ARM_TESTS = ("tests/kernels/native/test_phases.py::test_each_phase_on_an_emulated_arm_core",)
_ARM_NEEDS = ("aarch64-linux-gnu-g++", "qemu-aarch64")
_ARM = tuple(
    Mutation(name, f"{SOURCES}/kernels/gemv_int4_neon.h", old, new, breaks, _ARM_TESTS, needs=_ARM_NEEDS)
    for name, old, new, breaks in (
        (
            "arm-nibble",
            "second = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));",
            "second = first;",
            "ARM: the upper nibbles are taken for the lower ones",
        ),
        (
            "arm-lane",
            "of.second, values[r], 2 * j + 1);",
            "of.second, values[r], 2 * j);",
            "ARM: upper nibbles meet the activations of lower ones",
        ),
        (
            "arm-tiles",
            "vtrn2q_s64(low, high)",
            "vtrn1q_s64(low, high)",
            "ARM: the second row of a tile has the sums of the first",
        ),
    )
)

MUTATIONS: tuple[Mutation, ...] = (*_QUANT, *_NATIVE, *_TILES, *_ARM, *_TWELVE_BITS, *_TRITON)
