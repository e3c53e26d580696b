"""The mutations: where the product is broken, and which tests are likely to notice.

Each changes what a user gets (a text, an entry, a number in a report, a refusal), in a line that is likely to stay.
After a change of that line, `tests/tools/test_mutations.py` asks for the entry to follow. Not handled: changes of speed
alone, and those of lines that only a GPU runs.
"""

from __future__ import annotations

from .trial import Mutation

SOURCES = "kernels/native/sources"
TEMPLATES = "kernels/triton/templates"

_PASSES = (
    Mutation(
        "decoder-order",
        "passes/decoder.py",
        "elif before == 0 and written.isdisjoint(map(memory_of, read)):",
        "elif before == 0:",
        "a read of the cache runs before the blocks that write it",
        ("tests/passes/test_decoder.py",),
    ),
    Mutation(
        "decoder-capacity",
        "passes/decoder.py",
        "value_of(n.args[0]).shape[n.args[1]] for n in in_place",
        "value_of(n.args[0]).shape[n.args[1] - 1] for n in in_place",
        "a static cache has as many slots as heads",
        ("tests/passes/test_decoder.py",),
    ),
    Mutation(
        "twins-parts",
        "passes/linears.py",
        "(parts, i), value, first) for i, value in enumerate(values)",
        "(parts, len(values) - 1 - i), value, first) for i, value in enumerate(values)",
        "q, k and v are handed out of their product in the wrong order",
        ("tests/passes/fusion/test_rules.py", "tests/twins/test_twins.py"),
    ),
    Mutation(
        "twins-narrow",
        "passes/twins.py",
        "if linear.group_size >= MIN_GROUP_SIZE:",
        "if linear.group_size > MIN_GROUP_SIZE:",
        "matrices with groups of 32 stay in 16 bits",
        ("tests/twins/test_quantizers.py", "tests/twins/test_twins.py"),
    ),
    Mutation(
        "check-inputs",
        "passes/exit_checks.py",
        "_with_score(segment, exit_score, block.hidden_out, block.hidden_in)",
        "_with_score(segment, exit_score, block.hidden_out, block.hidden_out)",
        "a block is compared with itself, and every token leaves",
        ("tests/test_exits.py", "tests/lowering/test_triton.py"),
    ),
    Mutation(
        "fusion-residual",
        "passes/fusion/rules.py",
        "residual = found[1] if found[0] is last else found[0]",
        "residual = found[0] if found[0] is last else found[1]",
        "a fused product adds itself instead of the residual",
        ("tests/passes/fusion/test_rules.py",),
    ),
    Mutation(
        "fusion-mask",
        "passes/fusion/cache_rules.py",
        "arguments = (query, found.k, found.v, mask, found.scale, found.softcap)",
        "arguments = (query, found.k, found.v, None, found.scale, found.softcap)",
        "fused attention ignores its mask",
        ("tests/passes/fusion/test_rules.py",),
    ),
    Mutation(
        "capture-reads",
        "passes/capture_safety.py",
        "if nodes.get(user, place) < place), None)",
        "if nodes.get(user, place) > place), None)",
        "a block that reads the cache before it writes may be launched ahead",
        ("tests/passes/test_capture_safety.py",),
    ),
)

_QUANT = (
    Mutation(
        "grid-zero",
        "kernels/quant/grid.py",
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
        ".addmm_(factor[block, start + _BLOCK :].T, errors_KN, alpha=-1)",
        ".addmm_(factor[block, start + _BLOCK :].T, errors_KN, alpha=1)",
        "GPTQ doubles the errors of earlier blocks instead of making up for them",
        ("tests/kernels/quant/test_calibrated.py",),
    ),
)

_NATIVE = (
    Mutation(
        "kv-bound",
        f"{SOURCES}/kv_fill.h",
        "(slot < 0 || slot >= a.slots)",
        "(slot < 0 || slot > a.slots)",
        "the slot after the last one is written",
        ("tests/kernels/native/test_cache.py::test_a_slot_outside_of_the_cache_writes_nothing",),
    ),
    Mutation(
        "kv-rotation",
        f"{SOURCES}/kv_fill.h",
        "x[first] * cos[first] - x[second] * sin[first];",
        "x[first] * cos[first] + x[second] * sin[first];",
        "half of a head is rotated the other way",
        ("tests/kernels/native/test_cache.py",),
    ),
    Mutation(
        "attention-causal",
        f"{SOURCES}/attention_mask.h",
        "int(std::min<int64_t>(a.slots, row % a.positions + 1))",
        "int(std::min<int64_t>(a.slots, row % a.positions))",
        "a position does not attend to itself",
        ("tests/kernels/native/test_positions.py",),
    ),
    Mutation(
        "attention-chunks",
        f"{SOURCES}/attention.h",
        "total += of[a.head_dim + 1] * factor;",
        "total += of[a.head_dim + 1];",
        "chunks of a long cache are weighted as if all had the same maximum",
        ("tests/kernels/native/test_cache.py",),
    ),
    Mutation(
        "linear-zero",
        f"{SOURCES}/gemv_int4.h",
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
        f"{SOURCES}/activations.h",
        "*scale = largest / 127.0f;",
        "*scale = largest / 128.0f;",
        "activations in 8 bits come out 0.8 % too small",
        ("tests/kernels/native/test_linear.py",),
    ),
    Mutation(
        "rescore-bound",
        f"{SOURCES}/rescore.h",
        "if (largest_[block] < least_) continue;",
        "if (largest_[block] <= least_) continue;",
        "one block of logits fewer than promised is computed again in 16 bits",
        ("tests/kernels/native/test_rescore.py",),
    ),
    Mutation(
        "packing-errors",
        f"{SOURCES}/packing.cpp",
        "store(other, load(other) - error * factors[j]);",
        "store(other, load(other) + error * factors[j]);",
        "GPTQ in C++ doubles errors within a block",
        ("tests/kernels/native/test_packing.py",),
    ),
)

_TRITON = (
    Mutation(
        "triton-midpoint",
        f"{TEMPLATES}/linear.py.jinja",
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
        "triton-score",
        f"{TEMPLATES}/exit_score.py.jinja",
        "lowest = tl.minimum(lowest, similarity)",
        "lowest = tl.where(lowest == 2.0, similarity, lowest)",
        "the first row of a batch decides for all",
        ("tests/kernels/triton/test_exit_score.py",),
    ),
)

_EXITS = (
    Mutation(
        "exit-at-bar",
        "river_compile/exits.py",
        "return score > self.bars[depth] if",
        "return score >= self.bars[depth] if",
        "a token leaves at the threshold, though only those above it may",
        ("tests/test_exits.py", "tests/capture/test_device_exits.py"),
    ),
    Mutation(
        "exit-by-depth",
        "river_compile/exits.py",
        "threshold[min(depth, len(threshold)) - 1]",
        "threshold[min(depth, len(threshold) - 1)]",
        "each depth has the threshold of the next one",
        ("tests/test_config.py",),
    ),
    Mutation(
        "exit-doubt",
        "river_compile/runtime/walk.py",
        "self._doubted = not self._bars.leaves(self.num_blocks, -self._entropy)",
        "self._doubted = self._entropy >= -self._bars.bars[-1]",
        "logits that are not numbers are believed",
        ("tests/test_exits.py",),
    ),
    Mutation(
        "walk-rewind",
        "river_compile/runtime/walk.py",
        "runner.rewind(own, last, self.num_blocks, saved)",
        "runner.rewind(own, last + 1, self.num_blocks, saved)",
        "a doubted token counts twice in one block's cache",
        ("tests/test_exits.py",),
    ),
    Mutation(
        "room-last-slot",
        "river_compile/runtime/capacity.py",
        "if filled + new > self._capacity:",
        "if filled + new >= self._capacity:",
        "the last slot of a static cache cannot be used",
        ("tests/test_backend.py",),
    ),
    Mutation(
        "capture-results",
        "river_compile/capture/capture_cache.py",
        "return tuple(fresh)",
        "return tuple(values)",
        "the next step overwrites what a captured one returned",
        ("tests/capture/test_capture.py",),
    ),
)

_EXACT = (
    Mutation(
        "accept-rule",
        "river_compile/decoding/loop.py",
        "going = [row for row in going if row in agreed and self.texts.active[row]]",
        "going = [row for row in going if self.texts.active[row]]",
        "what was verified after a rejected draft is kept",
        ("tests/decoding/test_exact_loop.py",),
    ),
    Mutation(
        "sampling-noise",
        "river_compile/decoding/sampling.py",
        "scores_NV.softmax(-1) / noise_NV",
        "scores_NV.softmax(-1) * noise_NV",
        "sampled tokens are not multinomial's",
        ("tests/decoding/test_exact_loop.py",),
    ),
    Mutation(
        "stop-length",
        "river_compile/decoding/loop.py",
        "return length >= self.max_length or",
        "return length > self.max_length or",
        "a text has one token more than was asked for",
        ("tests/decoding/test_exact_loop.py",),
    ),
    Mutation(
        "rewind-window",
        "river_compile/decoding/rewind.py",
        "before[:, :, added - tokens : added]",
        "before[:, :, :tokens]",
        "a full sliding window gets older entries back than it lost",
        ("tests/decoding/test_rewind.py",),
    ),
    Mutation(
        "rewind-padding",
        "river_compile/decoding/rewind.py",
        'new.masked_fill(index < 0, 0) if name == "attention_mask" else new',
        "new",
        "rows that fell behind attend to filler before their text",
        ("tests/decoding/test_exact.py",),
    ),
    Mutation(
        "draft-reach",
        "river_compile/decoding/draft_policy.py",
        "self.reach *= proposed.chance",
        "self.reach = proposed.chance",
        "a long draft counts as likely to hold as its last token",
        ("tests/decoding/test_draft_policy.py",),
    ),
    Mutation(
        "vocabulary-reset",
        "river_compile/runtime/draft_vocab.py",
        "            self._list = None\n",
        "",
        "tokens that the text brought are never drafted",
        ("tests/decoding/test_draft_vocab.py",),
    ),
    Mutation(
        "cache-reset",
        "river_compile/runtime/cache_pool.py",
        "        kept[1].reset()\n",
        "",
        "a call begins with the last one's cache filled",
        ("tests/api/test_cache_pool.py", "tests/api/test_accelerate.py"),
    ),
)

_PROMISES = (
    Mutation(
        "risk-bets",
        "river_compile/calibration/risk.py",
        "math.fsum(math.exp(w - most) for w in wealths) / len(_BETS))",
        "math.fsum(math.exp(w - most) for w in wealths))",
        "the evidence for a rule is five times too strong",
        ("tests/calibration/test_risk.py",),
    ),
    Mutation(
        "calibrate-chosen",
        "river_compile/calibration/calibrate.py",
        "chosen=min(results[:passed], key=lambda c: c.cost)",
        "chosen=min(results, key=lambda c: c.cost)",
        "a rule that failed its test is chosen",
        ("tests/calibration/test_calibrate.py",),
    ),
    Mutation(
        "artifact-weights",
        "river_compile/twins/artifact.py",
        "if matrix.weights_hash != digest or matrix.shape",
        "if matrix.shape",
        "twins of other weights are used",
        ("tests/twins/test_artifact.py",),
    ),
    Mutation(
        "store-identity",
        "river_compile/store/identity.py",
        "parts += (name, type(module).__qualname__, _plain(held))",
        "parts += (name, type(module).__qualname__)",
        "a stored program runs for a model whose modules have other attributes",
        ("tests/store/test_store.py::TestAnotherModel",),
    ),
    Mutation(
        "store-unallocated",
        "river_compile/upstream/transformers.py",
        'all(getattr(layer, "keys", None) is not None for layer in cache.layers)',
        "True",
        "a prompt that allocates its cache is stored without that",
        ("tests/store/test_store.py::TestASecondStart",),
    ),
    Mutation(
        "weights-count",
        "river_compile/twins/parameter_stamp.py",
        "(self._ids, self._stamps) != (other._ids, other._stamps)",
        "self._ids != other._ids",
        "a change of weights that PyTorch counts is not noticed if no sampled element changed",
        ("tests/twins/test_changed_weights.py",),
    ),
    Mutation(
        "offload-stale",
        "river_compile/offload/streaming.py",
        "return same and self.versions == tuple(map(version_of, weights))",
        "return same",
        "a copy of weights that changed since is used",
        ("tests/offload/test_offloading.py",),
    ),
    Mutation(
        "report-rows",
        "river_compile/runtime/stats.py",
        "self.row_cycles + len(cycle.rows),",
        "self.row_cycles + 1,",
        "the report counts a pass of a batch as one row's",
        ("tests/decoding/test_exact.py::test_traces_draw_cycles_and_the_report_tells_what_a_batch_cost",),
    ),
    Mutation(
        "config-beyond",
        "river_compile/config.py",
        "if getattr(self, name) > num_blocks:",
        "if getattr(self, name) > num_blocks + 1:",
        "an exit depth beyond the last block is taken",
        ("tests/test_config.py",),
    ),
    Mutation(
        "cli-failed",
        "river_compile/cli/app.py",
        'print(f"error: {error_line(error)}", file=sys.stderr)\n        return FAILED',
        'print(f"error: {error_line(error)}", file=sys.stderr)\n        return 0',
        "a command that failed ends with 0",
        ("tests/cli/test_cli.py",),
    ),
)

MUTATIONS: tuple[Mutation, ...] = (*_PASSES, *_QUANT, *_NATIVE, *_TRITON, *_EXITS, *_EXACT, *_PROMISES)
