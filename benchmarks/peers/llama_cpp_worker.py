"""llama.cpp by llama-cpp-python, which compiles it for the machine's processor: one text at a time."""

from __future__ import annotations

import ctypes

import llama_cpp
import protocol


class LlamaCpp(protocol.Peer):
    """llama.cpp on a GGUF file."""

    def __init__(self, job):
        super().__init__(job)
        threads = {"n_threads": job["threads"], "n_threads_batch": job["threads"]}
        self._llama = llama_cpp.Llama(job["file"], n_ctx=job["context"], verbose=False, **threads)

    def generate(self, ids, clock, new_tokens):
        stream = self._llama.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0, reset=True)
        for _, token in zip(range(new_tokens), stream, strict=False):
            clock.note(int(token))

    def forget(self):
        self._llama.reset()

    def build(self):
        return llama_cpp.llama_print_system_info().decode()


def convert(source: str, target: str, kind: str) -> None:
    """Write a GGUF file's weights as another kind ("BF16", "Q4_0", ...).

    Raises:
        ValueError: llama.cpp cannot.
    """
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(how)):
        raise ValueError(f"llama.cpp cannot write {source} as {kind}")


if __name__ == "__main__":
    protocol.run(LlamaCpp, convert)
