"""llama.cpp's own server for `benchmarks.serving`: slots that generate side by side, from the package xllamacpp.

python -m benchmarks.llama_cpp_server GGUF PORT SLOTS THREADS
"""

from __future__ import annotations

import sys
import threading

CONTEXT = 2048  # of each slot


def main() -> None:
    """Serve until the process ends."""
    import xllamacpp

    file, port, slots, threads = sys.argv[1], *map(int, sys.argv[2:])
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.hostnames, params.port = ["127.0.0.1"], port
    params.n_parallel, params.n_ctx = slots, CONTEXT * slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
