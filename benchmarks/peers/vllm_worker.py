"""vLLM's CPU wheel on a model folder, in its dtype: one request at a time."""

from __future__ import annotations

import os

import protocol


class Vllm(protocol.Peer):
    """An engine in this process, whose steps are taken one by one."""

    def __init__(self, job):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        from vllm import EngineArgs, LLMEngine

        super().__init__(job)
        args = {"model": job["file"], "dtype": job["dtype"], "max_model_len": job["context"], "max_num_seqs": 1}
        self._engine = LLMEngine.from_engine_args(EngineArgs(**args, enable_prefix_caching=False))
        self._asked = 0

    def generate(self, ids, clock, new_tokens):
        from vllm import SamplingParams

        self._asked += 1
        greedy = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(self._asked), {"prompt_token_ids": ids}, greedy)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                clock.note(*output.outputs[0].token_ids[len(clock.tokens) :])


if __name__ == "__main__":
    protocol.run(Vllm)
