"""The benchmark of prompts on disk: which process is asked what, and that other answers are a failure."""

from __future__ import annotations

import json

import pytest

from benchmarks import common, prefix


@pytest.mark.parametrize("same", [True, False])
def test_rows_are_of_three_processes_that_share_a_cache(same, monkeypatch, tmp_path, capsys):
    asked, caches = [], set()

    class Worker:
        def __init__(self, module, name, threads, given):
            self.name = name
            caches.add(given["RIVER_COMPILE_CACHE_DIR"])

        def ask(self, command, ids=(), cached=True, **more):
            if command == "load":
                return {"load_s": 1.0}
            asked.append((self.name, len(ids), cached))
            text = [1, 2] if cached or same else [1, 3]
            return {"first_token_s": 0.25 if cached else 2.0, "ids": text, "reused": 300, "from_disk": 300}

        def close(self):
            pass

    monkeypatch.setattr(common, "Worker", Worker)
    monkeypatch.setattr(prefix, "_prompts", lambda folder, tokens, question: [[0] * (tokens + question)] * 4)
    (tmp_path / "config.json").write_text("{}")
    out = tmp_path / "out.json"
    arguments = ["--model", str(tmp_path), "--tokens", "300", "--question", "10", "--json", str(out)]
    assert prefix.main(arguments) == (0 if same else 1)
    assert f"The answers of fresh and disk are {'the same' if same else 'DIFFERENT'}" in capsys.readouterr().out
    second = [
        ("the second process", size, cached) for size, cached in ((8, True), (310, True), (310, True), (310, False))
    ]
    assert asked == [("the first process", 310, True), *second, ("the third process", 310, True)]
    assert len(caches) == 1
    rows = json.loads(out.read_text())["rows"]
    assert rows["fresh"]["first_token_s"] == 2.0
    assert rows["disk"]["from_disk"] == 300
