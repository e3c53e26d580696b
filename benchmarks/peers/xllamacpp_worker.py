"""llama.cpp's own server by xllamacpp, with drafts of another file ("drafts", "draft_tokens" of a job) or without."""

from __future__ import annotations

import http.client
import json
import sys
import threading

import protocol
import xllamacpp

CONTEXT = 2048  # of each slot of a server


class Server(protocol.Peer):
    """A server in this process, which is asked over HTTP: its Python calls return no token ids."""

    def __init__(self, job):
        super().__init__(job)
        params = parameters(job["file"], job["threads"], 0)
        params.n_parallel, params.n_ctx, params.cache_ram_mib = 1, job["context"], 0
        if job.get("drafts"):
            kinds, draft = xllamacpp.common_speculative_type, params.speculative.draft
            params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
            draft.mparams.path, draft.n_max = job["drafts"], job["draft_tokens"]
            draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = job["threads"]
        self._server = xllamacpp.Server(params)
        self._address = self._server.listening_address.removeprefix("http://")
        self._drafted: dict[str, int] = {"draft_n": 0, "draft_n_accepted": 0}

    def generate(self, ids, clock, new_tokens):
        greedy = {"temperature": 0.0, "top_k": 1, "ignore_eos": True, "n_predict": new_tokens}
        asked = {"prompt": ids, "cache_prompt": False, "stream": True, "return_tokens": True, **greedy}
        connection = http.client.HTTPConnection(self._address, timeout=600)
        connection.request("POST", "/completion", json.dumps(asked), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        while line := answer.readline():
            if line.startswith(b"data: {"):
                said = json.loads(line[6:])
                if "error" in said:
                    raise RuntimeError(said["error"])
                if said.get("stop"):
                    self._drafted = {key: n + said["timings"].get(key, 0) for key, n in self._drafted.items()}
                else:
                    clock.note(*said["tokens"])
        connection.close()
        if len(clock.tokens) < new_tokens:
            raise RuntimeError(f"llama.cpp's server gave {len(clock.tokens)} of {new_tokens} tokens: {answer.status}")

    def build(self):
        drafted = "{draft_n_accepted} of {draft_n} drafted tokens accepted; ".format(**self._drafted)
        return (drafted if self.job.get("drafts") else "") + xllamacpp.get_system_info()


def parameters(file: str, threads: int, port: int):
    """Return the parameters of a server of a file on this machine alone."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.hostnames, params.port = ["127.0.0.1"], port
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return params


def serve(file: str, port: int, slots: int, threads: int) -> None:
    """Serve a file for `benchmarks.serving`, in slots that generate side by side, until the process ends."""
    params = parameters(file, threads, port)
    params.n_parallel, params.n_ctx = slots, CONTEXT * slots
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    if sys.argv[1:]:  # GGUF PORT SLOTS THREADS
        serve(sys.argv[1], *map(int, sys.argv[2:]))
    protocol.run(Server)
