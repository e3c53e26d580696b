"""Generates one answer without River and in exact mode, and shows the cycles that made it.

    python -m examples.exact
    python -m examples.exact --prompt "Write a haiku about rivers." --plot cycles.png

Prints each cycle: its tokens, how many were drafted and held (accepted), and its milliseconds. Tokens that the twins
drafted stand as they are, tokens copied from the context in (round) and the backbone's own in [square] brackets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from river_compile.cli import shared
from tools import demo_models

if TYPE_CHECKING:
    import torch

    from river_compile.runtime.stats import CycleRecord

PROMPT = "Explain in a few sentences why the sky is blue."
BRACKETS = {"river": "{}", "lookup": "({})", "backbone": "[{}]"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Shows exact mode's cycles beside plain generation.")
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(demo_models.MODELS)} or a model folder")
    parser.add_argument("--prompt", default=PROMPT, help="the question (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the cycles as a PNG")
    options = parser.parse_args(arguments)
    shared.quiet()
    import river_compile
    from river_compile.decoding.mode import exact
    from river_compile.exits import forced_depth

    model, tokenizer = demo_models.load_or_exit(options.model, dtype=options.dtype)
    ids = shared.encode(tokenizer, options.prompt)
    model.compile(backend="river")
    drafted = {"custom_generate": exact}
    _generate(model, ids, options.new_tokens, **drafted)  # quantizes and compiles, so that the cycles below do not
    with river_compile.trace() as trace:
        ours = _generate(model, ids, options.new_tokens, **drafted)
    with forced_depth(model.config.num_hidden_layers):
        plain = _generate(model, ids, options.new_tokens)

    print(f"{tokenizer.decode(ours[0, ids.shape[1] :], skip_special_tokens=True)}\n")
    texts = [tokenizer.decode([token]) for token in ours[0, ids.shape[1] + 1 :].tolist()]
    print("\n".join(cycle_lines(trace.cycles, texts)))
    print(f"\nThe text is plain generation's: {'yes' if ours.equal(plain) else 'no, rounding tipped a near-tie'}")
    if options.plot:
        from examples.plots import plot_trace

        print(f"drawn to {plot_trace(trace, options.plot, texts)}")
    return 0


def cycle_lines(cycles: Sequence[CycleRecord], texts: Sequence[str]) -> list[str]:
    """Return a table of cycles.

    Args:
        cycles: of one text of batch 1.
        texts: the kept tokens' texts; the first new token is the prompt's and belongs to no cycle.
    """
    lines = [f"{'cycle':>5} {'drafted':>8} {'held':>5} {'width':>6} {'draft ms':>9} {'verify ms':>10}  kept"]
    rest = iter(texts)
    for number, cycle in enumerate(cycles, start=1):
        kept = "".join(BRACKETS[source].format(next(rest).replace("\n", "⏎")) for source in cycle.emitted)
        draft, verify = (1e3 * s for s in cycle.seconds[:2])
        counts = f"{number:5} {len(cycle.drafted):8} {cycle.accepted:5} {cycle.width:6}"
        lines.append(f"{counts} {draft:9.1f} {verify:10.1f}  {kept}")
    return lines


def _generate(model, ids: torch.Tensor, new_tokens: int, **options: object) -> torch.Tensor:
    import torch

    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
        **options,
    )


if __name__ == "__main__":
    sys.exit(main())
