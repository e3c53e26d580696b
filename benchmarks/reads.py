"""The bytes of weights that a token reads of known decoders, as `river check` counts them; no weight is loaded.

    python -m benchmarks.reads --record reads

River's predictions are made from the record (`python -m tools.figures`).
"""

from __future__ import annotations

import sys

import torch

from benchmarks import common
from benchmarks.random_llama import llama_config
from river_compile.reporting.dry_run import dry_run, empty_model
from tools.kernels.shapes import MODELS, ModelShape

# No tiles are kept for it, so it is not among the shapes of kernels.
_OTHERS = {"qwen2.5-0.5b": ModelShape("qwen2.5-0.5b", 24, 896, 14, 2, 64, 4864, 151936, qkv_bias=True)}
SHAPES = ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "qwen2.5-1.5b", "llama-3.2-3b", "llama-3.1-8b")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__, "dtype", "threads", "json", "record", model="shapes")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES, help="which (all)")
    options = parser.parse_args(arguments)
    rows = {name: reads(name, options.dtype) for name in options.shapes}
    outcome = {**common.setting("reads", options), "rows": rows}
    common.print_setting(outcome)
    heads = ["", "parameters", "blocks", "MB of blocks", "of twins", "of the head"]
    megabytes = ("blocks_bytes", "twins_bytes", "head_bytes")
    common.print_table(
        heads,
        [
            [name, row["parameters"], row["blocks"], *(round(row[key] / 1e6) for key in megabytes)]
            for name, row in rows.items()
        ],
    )
    common.write_outcome(outcome, options.json)
    common.record(outcome, options)
    return 0


def reads(name: str, dtype: str) -> dict[str, int]:
    """Return the parameters and blocks of a shape, and the bytes of all blocks, of all twins and of the head."""
    torch._dynamo.reset()  # (or it would take the next shape for one more recompilation, of which it permits few)
    found = dry_run(empty_model(llama_config((MODELS | _OTHERS)[name]), dtype))
    sizes = {f"{part}_bytes": size for part, size in found["bytes"].items()}
    return {"parameters": found["parameters"], "blocks": found["blocks"], **sizes}


if __name__ == "__main__":
    sys.exit(main())
