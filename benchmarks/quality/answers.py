"""Answers of a model to problems: asked one by one, judged as they come, and kept in a file.

A run that was stopped continues where its file ends. Not handled: sampled answers, several problems at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from benchmarks.quality import humaneval, reasoning
from river_compile.cli.shared import encode, error_line
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.record import find_record
from river_compile.reporting.timing import Clock, StopAfter
from river_compile.reporting.trace import trace

_SURE = 1.96  # standard errors on each side of a 95 % interval
_WARM_UP = 16  # tokens of an answer that are not timed


@dataclass(frozen=True)
class Problems:
    """What a model is asked.

    Attributes:
        tokenizer: the model's.
        prompts: ids ``[1, S]`` each.
        solves: whether a text answers the problem of this number.
        new_tokens: of an answer, at most.
        options: of generate.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Tensor]
    solves: Callable[[int, str], bool]
    new_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, task: str, tokenizer: PreTrainedTokenizerBase, limit: int, new_tokens: int) -> Problems:
        """Return the first problems of a task, all (or 40) for a limit of 0."""
        if task in ("humaneval", "humaneval-chat"):
            asked = humaneval.problems()[: limit or None]
            if task == "humaneval":  # a completion of the problem's own text
                prompts = [tokenizer(p["prompt"].rstrip("\n"), return_tensors="pt")["input_ids"] for p in asked]
            else:  # an answer whose beginning is given
                prompts = [_begun(tokenizer, humaneval.question(p), humaneval.beginning(p)) for p in asked]
            stops = {"stop_strings": list(humaneval.STOPS), "tokenizer": tokenizer}
            return cls(tokenizer, prompts, lambda i, text: humaneval.passes(asked[i], text), new_tokens, stops)
        made = reasoning.problems(limit or 40, generators=reasoning.TASKS[task])
        prompts = [encode(tokenizer, problem.question) for problem in made]
        return cls(tokenizer, prompts, lambda i, text: reasoning.solved(made[i], text), new_tokens)


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: of it.
        solved: whether it is right.
        tokens: new ones, without the first.
        seconds: that these took.
        steps: of decoding meanwhile.
        depth: in which tokens left, in the mean of these steps; 0 where there are none.
    """

    text: str
    solved: bool
    tokens: int
    seconds: float
    steps: int
    depth: float


class AnswerFile:
    """Answers by what was asked of whom, a line of JSON for each, written as it comes.

    Args:
        path: of the file, which need not exist; None keeps nothing.

    Raises:
        ValueError: the file holds something else. (A last line that a killed run left half written is dropped.)
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, dict[str, Answer]] = {}
        if path is None or not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            path.write_text("".join(lines[:-1]), encoding="utf-8")
            lines.pop()
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line)
                self._known.setdefault(found["run"], {})[found["problem"]] = Answer(**found["answer"])
            except (ValueError, TypeError, KeyError) as error:
                what = f"{path}, line {number}, is no answer of `benchmarks.tasks`; name another file"
                raise ValueError(f"{what} ({error_line(error)})") from None

    def of(self, run: str) -> Mapping[str, Answer]:
        """Return the answers of a run, by problem."""
        return self._known.get(run, {})

    def add(self, run: str, problem: str, answer: Answer) -> None:
        """Keep an answer."""
        self._known.setdefault(run, {})[problem] = answer
        if self._path is not None:
            line = json.dumps({"run": run, "problem": problem, "answer": asdict(answer)})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def run_of(model: str, dtype: str, way: str, options: Mapping[str, Any], calibration: Path | None) -> str:
    """Return what answers depend on besides the problems: a model's name, and how it runs, as `running` has it."""
    return repr([way, dict(options), model, dtype, calibration and calibration.read_text(encoding="utf-8")])


def ask(model: PreTrainedModel, problems: Problems, file: AnswerFile, run: str, said: str = "") -> list[Answer]:
    """Return a model's answers to all problems, with progress on standard error.

    Args:
        model: as it is to run.
        problems: to solve.
        file: has answers of earlier runs, and gets the new ones.
        run: as :func:`run_of`.
        said: what the progress is called.
    """
    run = f"{run} {problems.new_tokens}"
    names = [_name(ids) for ids in problems.prompts]
    left = [number for number, name in enumerate(names) if name not in file.of(run)]
    if left:
        _generate(model, problems, left[0], Clock(), _WARM_UP)
    with tqdm(total=len(names), initial=len(names) - len(left), desc=said, unit="problem", leave=False) as progress:
        for number in left:
            file.add(run, names[number], _answer(model, problems, number))
            progress.update()
            known = file.of(run)
            progress.set_postfix_str(f"{sum(answer.solved for answer in known.values())} of {len(known)} solved")
    return [file.of(run)[name] for name in names]


def _answer(model: PreTrainedModel, problems: Problems, number: int) -> Answer:
    record, clock = find_record(model), Clock()
    if record is not None:
        record.of(PrefixPool).forget_texts()
    with trace() as steps:
        _generate(model, problems, number, clock, problems.new_tokens)
    decoded = steps.tokens
    text = problems.tokenizer.decode(clock.ids, skip_special_tokens=True)
    depth = sum(step.depth for step in decoded) / max(len(decoded), 1)
    seconds = clock.times[-1] - clock.times[0]
    return Answer(text, problems.solves(number, text), len(clock.ids) - 1, seconds, len(decoded), depth)


def _generate(model: PreTrainedModel, problems: Problems, number: int, clock: Clock, new_tokens: int) -> Any:
    ids = problems.prompts[number]
    length = max(ids.shape[1] for ids in problems.prompts) + problems.new_tokens  # (all caches have one size)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length - ids.shape[1],
        stopping_criteria=StoppingCriteriaList([StopAfter(ids.shape[1] + new_tokens)]),
        cache_implementation="static",
        do_sample=False,
        streamer=clock,
        disable_compile=True,  # transformers must not compile on its own what is timed as plain
        **problems.options,
    )


def _begun(tokenizer: PreTrainedTokenizerBase, question: str, beginning: str) -> Tensor:
    """Return the ids of a question and of the beginning of its answer."""
    begun = tokenizer(beginning, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return torch.cat([encode(tokenizer, question), begun], dim=-1)


def _name(ids_1S: Tensor) -> str:
    """Return what a problem is called in a file."""
    return hashlib.sha256(repr(ids_1S.tolist()).encode()).hexdigest()[:16]


def wilson(right: int, asked: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, which holds for few problems and for shares near 0 and 1."""
    share, spread = right / asked, _SURE**2 / asked
    middle = (share + spread / 2) / (1 + spread)
    half = _SURE * math.sqrt(share * (1 - share) / asked + spread / asked / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def summary(answers: Sequence[Answer], plain: Sequence[Answer] | None) -> dict[str, Any]:
    """Return what a table says of a run's answers.

    Args:
        answers: to all problems.
        plain: those whose texts are plain, None where they are not known.
    """
    right, asked = sum(answer.solved for answer in answers), len(answers)
    steps = sum(answer.steps for answer in answers)
    seconds, tokens = sum(answer.seconds for answer in answers), sum(answer.tokens for answer in answers)
    return {
        "score": right / asked,
        "interval": wilson(right, asked),
        "solved": right,
        "problems": asked,
        "same_texts": None if plain is None else sum(a.text == b.text for a, b in zip(answers, plain, strict=True)),
        "mean_depth": sum(answer.steps * answer.depth for answer in answers) / steps if steps else None,
        "tokens_per_s": tokens / seconds if seconds else None,
    }
