"""`python -m tools.house` counts a made-up product rightly, and its walk sees the files and types on the way."""

import json
import sys
from importlib import util

import pytest
import torch

from tools.house import __main__ as house
from tools.house import walk
from tools.house.walk import FOLLOWED, OTHERS, Follow, walking

PACKED = """
from dataclasses import dataclass

@dataclass
class Packed:
    weight: object

@dataclass
class All:
    packed: list

def pack(weight):
    return Packed(weight.to(weight.dtype).clone())

def build(weights):
    return All(list(map(pack, weights)))
"""

TREE = {
    "river_compile/__init__.py": "",
    "river_compile/backend.py": "from river_compile import state\nfrom river_compile.passes.long import f\n",
    "river_compile/state.py": "import threading\n_here = threading.local()\n_kept = {}\nNAMES = {'a': 1}\nx = 1\n"
    "class Seen:\n    def note(self):\n        self.last = 1\nseen = Seen()\n"
    "def f(state):\n    _kept['a'] = state.of(Seen)\n    return NAMES\n",
    "river_compile/twins/packed.py": PACKED,
    "passes/__init__.py": "",
    "passes/long.py": "def f():\n" + "    pass\n" * 70 + "def g():\n" + "    pass\n" * 69,
    "passes/round.py": "def f():\n    from river_compile.passes.about import g\n",
    "passes/about.py": "from . import round\n",
    "kernels/__init__.py": "\n" * 421,
    "kernels/native/sources/a.cpp": "int a;\nint b;\n",
}


@pytest.fixture
def tree(tmp_path):
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_made_up_product_is_counted(tree, capsys):
    assert house.main(["--sources", "--json"], tree) == 0
    counts = {count["name"]: count for count in json.loads(capsys.readouterr().out)["counts"]}
    assert counts["product lines of Python"]["value"] == sum(
        text.count("\n") for name, text in TREE.items() if name.endswith(".py")
    )
    assert f"{PACKED.count(chr(10))} river_compile/twins" in counts["product lines of Python"]["counted"]
    assert counts["product lines of C++"]["value"] == 2
    assert counts["files over 420 lines"]["counted"] == ["421 kernels/__init__.py"]
    assert counts["functions over 70 lines"]["counted"] == ["71 passes/long.py:f"]
    (circle,) = counts["circles of imports (files, folders)"]["counted"][:1]
    assert {"river_compile.passes.round", "river_compile.passes.about"} == set(circle.split(" -> "))
    imported = counts["modules that river_compile/backend.py imports"]
    assert imported["counted"] == ["river_compile.passes.long", "river_compile.state"]
    assert imported["met"]
    hidden = [text.partition(" ")[2] for text in counts["hidden singletons"]["counted"]]
    assert hidden == ["_here", "_kept", "seen", ".of(Seen)"]
    assert not counts["hidden singletons"]["met"]


def test_the_page_names_the_target_beside_each_number(tree, capsys):
    house.main(["--sources"], tree)
    lines = capsys.readouterr().out.splitlines()
    (hidden,) = (line for line in lines if line.startswith("hidden singletons "))
    assert hidden.endswith("4  (target 0)  over")


@pytest.fixture
def packing(tree):
    """The made-up module that packs weights, under the name that it would be installed with."""
    name = "river_compile.made_up"
    spec = util.spec_from_file_location(name, tree / "river_compile/twins/packed.py")
    sys.modules[name] = module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def test_a_walk_sees_the_files_calls_and_frames_of_the_product_alone(tree, packing):
    weights = [torch.zeros(8, 8), torch.ones(8, 8)]
    with walking(tree) as seen:
        packing.build(weights)
        json.dumps([])
    assert list(seen.files) == ["river_compile/twins/packed.py"]
    assert seen.functions["river_compile/twins/packed.py:pack"] == 2
    assert seen.calls == 1 + 2
    assert seen.frames == 2


def test_the_way_of_a_weight_is_that_of_one_weight_alone(tree, packing):
    weights = {name: torch.zeros(8, 8) for name in (FOLLOWED, *OTHERS)}
    follow = Follow(weights)
    with walking(tree, follow):
        packing.build([*weights.values()])
    assert list(follow.files) == ["river_compile/twins/packed.py"]
    assert list(follow.types) == ["river_compile.made_up.Packed"]


@pytest.mark.slow
def test_the_walk_of_a_tiny_model_passes_the_backend_and_the_packed_weights():
    found = walk.walk()
    assert "river_compile/backend.py" in found.build.files
    assert "river_compile/backend.py" not in found.warm.files
    assert len(found.warm.files) < len(found.build.files)
    assert any(name.startswith("kernels/quant/") for name in found.weight_files)
    assert any("Packed" in name for name in found.weight_types)
    assert found.warm.calls > found.tokens == walk.TOKENS
