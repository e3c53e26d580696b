"""Generates with one model spread over several processes, without and with River.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --model FOLDER --prompt "Write a haiku about rivers."

transformers spreads the model: on a machine with GPUs each process takes one (nccl), otherwise all compute on the CPU
(gloo). The first process prints each way's text and tokens a second, and a report of all.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))  # (torchrun starts the file, not the module)

from river_compile.cli import shared
from tools import demo_models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT = "Explain in a few sentences why the sky is blue."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Generates with a model that several processes share.")
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(demo_models.MODELS)} or a model folder")
    parser.add_argument("--prompt", default=PROMPT, help="the question (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--kernels", default="auto", help="of the backend (default: %(default)s)")
    options = parser.parse_args(arguments)
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it as: torchrun --nproc-per-node 2 examples/tensor_parallel.py")
    shared.quiet()
    import torch
    import torch.distributed as dist
    from transformers import AutoTokenizer

    import river_compile
    from river_compile.decoding.mode import exact

    cards = torch.cuda.is_available()
    if cards:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cards else "gloo", timeout=timedelta(minutes=10))
    first = dist.get_rank() == 0
    if first:
        demo_models.resolve(options.model)  # (a demo model is made once)
    dist.barrier()
    model = load(demo_models.resolve(options.model), options.dtype)
    tokenizer = AutoTokenizer.from_pretrained(demo_models.resolve(options.model))
    ids = shared.encode(tokenizer, options.prompt).to(model.device)
    how = {"max_new_tokens": options.new_tokens, "do_sample": False, "cache_implementation": "static"}
    how |= {"attention_mask": torch.ones_like(ids), "disable_compile": True}
    for way in ("plain", "exact", "fast"):
        if way == "exact":
            model.compile(backend="river", options={"kernels": options.kernels})
        extra = {"custom_generate": exact} if way == "exact" else {}
        model.generate(ids, **how, **extra)  # quantizes and compiles, so that the timed call does not
        start = time.perf_counter()
        text = model.generate(ids, **how, **extra)
        rate = (text.shape[1] - ids.shape[1]) / (time.perf_counter() - start)
        if first:
            print(f"{way}: {rate:.1f} tokens/s, prompt included")
            print(f"{tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)}\n")
    if first:
        print(river_compile.report(model))
    dist.destroy_process_group()
    return 0


def load(folder: Path, dtype: str) -> PreTrainedModel:
    """Return this process's part of a model: transformers' own plan, changed where River's compilation needs it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import river_compile

    ranks = int(os.environ["WORLD_SIZE"])
    plan = river_compile.tensor_parallel_plan(AutoConfig.from_pretrained(folder), ranks)
    spread = DistributedConfig(tp_size=ranks, tp_plan=plan)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=spread)
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
