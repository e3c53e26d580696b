"""llama.cpp's own server for `benchmarks.serving`: slots that generate side by side, until the process ends.

python benchmarks/peers/xllamacpp_server.py GGUF PORT SLOTS THREADS
"""

from __future__ import annotations

import sys
import threading

import xllamacpp
from xllamacpp_worker import parameters

CONTEXT = 2048  # of each slot

if __name__ == "__main__":
    file, port, slots, threads = sys.argv[1], *map(int, sys.argv[2:])
    params = parameters(file, threads, port)
    params.n_parallel, params.n_ctx = slots, CONTEXT * slots
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()
