"""What all tests share: marks of devices and slow tests, one set of random examples, a clean Dynamo, a real model."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch
import torch._dynamo.guards
from hypothesis import settings

from tests.support.examples import register_profiles
from tools import demo_models

# No test uses another test's builds; tests of the compile cache set their own folder. With a folder in
# RIVER_TEST_CACHE_DIR all tests share one: those that count graphs may fail then, and no text may differ.
os.environ["RIVER_COMPILE_CACHE_DIR"] = os.environ.get("RIVER_TEST_CACHE_DIR", "0")

# torch writes every graph on its way through Dynamo into its own log if any handler listens, which is a sixth
# of a compilation. pytest (from 9.1 on) listens to each logger that it finds and that does not propagate.
logging.root.manager.loggerDict.pop("torch.__trace", None)

# Dynamo times each graph's guards for its log, and empties the processor's caches before: 30 ms a graph.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0

# Processes that test side by side share the cores: threads of two that wait for each other cost more than they bring.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


# Folders of tests of what is no part of the installed package; CONTRIBUTING.md says what each layer promises.
TOOLS = [Path(__file__).parent / name for name in ("benchmarks", "examples", "tools")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too, as -m and the name of a test do")
    parser.addoption("--shrink", action="store_true", help="look for the smallest example that a property fails for")
    parser.addoption("--tools", action="store_true", help="collect benchmarks, examples and tools, as their names do")


def pytest_configure(config: pytest.Config) -> None:
    if not os.access(Path.home(), os.W_OK):  # what is built and compiled lies where the next run finds it, all the same
        caches = Path(tempfile.gettempdir()) / f"river_compile_tests_{os.getuid()}"
        for name in ("RIVER_COMPILE_HOME", "TRITON_CACHE_DIR", "MPLCONFIGDIR"):
            os.environ.setdefault(name, str(caches / name.lower()))
    register_profiles(config.option.shrink)
    if config.option.slow:  # (an option of Hypothesis, which is read after this, goes before)
        settings.load_profile("slow")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves the tests of tools out; pytest does not call this for paths on the command line."""
    return True if collection_path in TOOLS and not config.option.tools else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.option.slow or config.option.markexpr or any("::" in argument for argument in config.args)
    if not asked:
        config.hook.pytest_deselected(items=[item for item in items if "slow" in item.keywords])
        items[:] = [item for item in items if "slow" not in item.keywords]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU (CUDA or ROCm)")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Has garbage collected less often, and never looks at what the tests import: a sixth of Dynamo's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leaves nothing for the collection that pytest makes after this.

    It takes seconds, and xdist interrupts a worker that takes more than five to end after its last report.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # (libraries look for what they leaked)


@pytest.fixture(autouse=True, scope="module")
def _dynamo_of_the_module():
    """No file of tests sees another one's compiled graphs. Its own tests may share them: most of the time is tracing.

    A model's graphs count for that model alone, so models may share their class. Tests that count graphs, or that set
    Dynamo's limit of them, take `fresh_dynamo`.
    """
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _dynamo_of_a_slow_test(request):
    """A slow test finds Dynamo as a process begins with it: too many different tests may run before it."""
    if "slow" in request.node.keywords:
        torch._dynamo.reset()


@pytest.fixture
def fresh_dynamo():
    """Dynamo as a process begins with it: no graph, and no size that was seen to differ between calls."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also if the parent of the tests (a shell's background job, say) ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def smollm2_folder():
    """The folder of SmolLM2-135M-Instruct, converted on first use."""
    return demo_models.fetch("smollm2")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder)
