"""Bad options are ValueErrors that name the value, what is allowed and the closest match, however they arrive."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from river_compile import RiverConfig
from river_compile.api.accelerate import accelerate
from river_compile.backend import river
from river_compile.config import check_mode
from river_compile.decoding.mode import exact
from river_compile.errors import OptionError
from river_compile.exits import threshold_after
from tests.support.families import make, prompt
from tools import options

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"treshold": 0.5}, ["'treshold'", "did you mean 'threshold'?", "first_exit"]),
        ({"threshold": "high"}, ["threshold='high'", "a number"]),
        ({"threshold": float("nan")}, ["threshold=nan"]),
        ({"threshold": True}, ["threshold=True"]),
        ({"first_exit": 0}, ["first_exit=0", "1 or more"]),
        ({"exit_every": 1.5}, ["exit_every=1.5", "integer"]),
        ({"exit_depth": -1}, ["exit_depth=-1", "None or an integer"]),
        ({"group_size": 48}, ["group_size=48", "32, 64, 128"]),
        ({"quantizer": "hqqq"}, ["quantizer='hqqq'", "did you mean 'hqq'?"]),
        ({"prefill": "Exit"}, ["prefill='Exit'", "'backbone', 'exit'"]),
        ({"lm_head": "w3"}, ["lm_head='w3'", "'keep', 'w4'"]),
        ({"kernels": "nativ"}, ["choose one of 'auto', 'triton', 'native' (did you mean 'native'?)"]),
        ({"on_unsupported": "ignore"}, ["on_unsupported='ignore'", "'inductor', 'raise'"]),
        ({"twins": 3}, ["twins=3", "path"]),
        ({"criterion": "confident"}, ["criterion='confident'", "did you mean 'confidence'?"]),
        ({"criterion": "confidence", "threshold": -0.1}, ["threshold=-0.1", "nats of 0 or more", "'confidence'"]),
        ({"criterion": "confidence", "threshold": float("nan")}, ["threshold=nan", "nats"]),
        ({"criterion": "similarity", "first_exit": 0}, ["first_exit=0", "1 or more"]),
        ({"criterion": "confidence", "first_exit": -1}, ["first_exit=-1", "0 or more"]),
        ({"criterion": "confidence", "prefill": "exit"}, ["prefill='exit'", "'confidence'"]),
        ({"offload": -1}, ["offload=-1", "from 0 to"]),
        ({"offload": True}, ["offload=True"]),
        ({"offload": 2, "offload_policy": "drop"}, ["offload_policy='drop'", "'exit', 'fetch'"]),
        ({"offload_policy": "fetch"}, ["offload_policy='fetch' requires offload="]),
        ({"offload": 2, "offload_dir": 3}, ["offload_dir=3", "a path"]),
        ({"offload": 2, "exit_depth": 3}, ["exit_depth=3", "offload=2", "offload=3 or offload_policy='fetch'"]),
        ({"offload": 2, "first_exit": 3}, ["first_exit=3", "offload=2", "offload=3 or more, exit_depth=2"]),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(OptionError) as error:
        RiverConfig.from_options(options)
    for word in words:
        assert word in str(error.value)


def test_config_is_frozen_and_its_defaults_are_the_documented_ones():
    config = RiverConfig.from_options(None)
    assert (config.threshold, config.first_exit, config.exit_every, config.exit_depth) == (0.7, 2, 1, None)
    assert (config.group_size, config.quantizer, config.prefill, config.lm_head) == (64, "gptq", "backbone", None)
    with pytest.raises(AttributeError):
        config.threshold = 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_depth": 3}, "exit_depth=3 lies beyond the last of 2 layers. Use 0 to 2"),
        ({"first_exit": 5}, "first_exit=5 lies beyond the last of 2 layers. Use 1 to 2"),
    ],
)
def test_depths_are_checked_against_the_model(options, message):
    model = make("llama", layers=2)
    model.compile(backend=river, options=options)
    with pytest.raises(OptionError, match=message), torch.no_grad():
        model(prompt())


def test_modes_of_torch_compile_are_checked():
    assert check_mode("default") is None
    assert check_mode("max-autotune") == "max-autotune"
    with pytest.raises(OptionError, match="did you mean 'max-autotune'"):
        check_mode("max-autotun")


def test_a_threshold_for_each_depth():
    """A list becomes a tuple; its last entry holds for all greater depths; entropy criteria have one depth."""
    config = RiverConfig(threshold=[0.9, 0.8])
    assert [threshold_after(config.threshold, depth) for depth in (1, 2, 3, 30)] == [0.9, 0.8, 0.8, 0.8]
    assert threshold_after(0.5, 7) == 0.5
    for bad in ([], [0.5, "high"], [float("nan")]):
        with pytest.raises(OptionError, match="a list with one for each depth"):
            RiverConfig(threshold=bad)
    with pytest.raises(OptionError, match="an entropy in nats"):
        RiverConfig(criterion="confidence", threshold=[0.5])


class TestNumbersOfOtherLibraries:
    """Scalars and arrays of numpy and torch are taken as the Python numbers that they are."""

    @pytest.mark.parametrize(
        ("name", "value", "kept"),
        [
            ("threshold", np.float32(0.5), 0.5),
            ("threshold", torch.tensor(0.25), 0.25),
            ("threshold", np.array([0.5, 0.25]), (0.5, 0.25)),
            ("threshold", [np.float64(0.5), torch.tensor(0.25)], (0.5, 0.25)),
            ("first_exit", np.int64(3), 3),
            ("exit_depth", torch.tensor(1), 1),
            ("group_size", np.int32(32), 32),
        ],
    )
    def test_numbers_are_kept_as_pythons(self, name, value, kept):
        got = getattr(RiverConfig(**{name: value}), name)
        assert got == kept
        assert type(got) is type(kept)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("group_size", 64.0),
            ("group_size", "64"),
            ("first_exit", np.float32(2)),
            ("exit_every", np.True_),
            ("threshold", np.array([])),
            ("threshold", np.float32("nan")),
            ("graphs", 0),
            ("twins", b"folder"),
            ("twins", ""),
            ("twins", "a\0b"),
            ("quantizer", ["hqq"]),
        ],
    )
    def test_what_is_none_is_named(self, name, value):
        with pytest.raises(OptionError, match=f"^RC002: {name}=.* is not allowed; (it must be|choose one of)"):
            RiverConfig(**{name: value})


class TestTable:
    @pytest.mark.core
    def test_the_page_has_the_options_of_the_code(self):
        """``python -m tools.options`` changes nothing."""
        assert options.replaced() == options.PAGE.read_text(encoding="utf-8")

    def test_the_page_has_every_argument_of_accelerate_and_every_environment_variable(self):
        text = options.PAGE.read_text(encoding="utf-8")
        of_accelerate, of_backend = text.split("## Of the backend")
        named = {*inspect.signature(accelerate).parameters, *vars(exact)} - {"model", "options"}
        assert all(f"| `{name}` |" in of_accelerate for name in named)
        assert all(f"| `{name}` |" in of_backend for name in RiverConfig.options())
        sources = [path for folder in ("river_compile", "passes", "kernels") for path in ROOT.glob(f"{folder}/**/*.py")]
        read = {name for path in sources for name in re.findall(r"RIVER_COMPILE_[A-Z_]+", path.read_text())}
        assert len(read) >= 5
        assert all(f"| `{name}` |" in of_backend for name in read)

    def test_every_option_names_its_audience(self):
        user, expert = options.tables().split("\nFor experts:")
        named = {name: (f"| `{name}` |" in user, f"| `{name}` |" in expert) for name in RiverConfig.options()}
        assert all(in_user != in_expert for in_user, in_expert in named.values())
