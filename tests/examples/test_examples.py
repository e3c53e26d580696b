"""The examples: what they show, and a run of each way to compare."""

import re

import pytest
import torch
import transformers

from examples import compare_thresholds, exact
from river_compile.runtime.stats import CycleRecord


def test_cycles_are_shown_with_the_source_of_every_token():
    def cycle(drafted, kept, width):
        return CycleRecord(drafted, kept, width, seconds=(0.002, 0.01, 0.0), thread=0, model=0)

    cycles = [cycle(("river",) * 3, ("river", "backbone"), 4), cycle(("lookup",), ("lookup", "backbone"), 2)]
    lines = exact.cycle_lines(cycles, [" a", "\n", " b", "."])
    assert lines[1].split() == ["1", "3", "1", "4", "2.0", "10.0", "a[⏎]"]
    assert lines[2].endswith("  ( b)[.]")


@pytest.fixture(scope="module")
def little_model(smollm2_tokenizer, tmp_path_factory):
    """A folder with four blocks of random weights and a real tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=len(smollm2_tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("little")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_thresholds_are_compared_on_one_prompt(little_model, capsys):
    """The first line is full depth, threshold 1 too, and with -1 every token exits after two blocks."""
    assert compare_thresholds.main(["--model", little_model, "--new-tokens", "8", "--thresholds", "1", "-1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" *(full depth|-?1 )", line)]
    assert lines[0][4] == "4.0"
    assert [line[3] for line in lines[1:]] == ["4.0", "2.0"]
    assert lines[1][-2:] == ["the", "end"]
