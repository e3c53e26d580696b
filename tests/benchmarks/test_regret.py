"""Regret of the rule for a draft's length: its time over the best length's of each prompt."""

import pytest

from benchmarks import exact, regret


def times(rule, **fixed):
    """Returns times of a prompt, of two repeats: of the rule, and of lengths such as `l3=1.0`; 9 of all others."""
    others = {row: [fixed.get(f"l{row.split()[-1]}", 9.0)] * 2 for row in regret.ROWS[1:]}
    return {regret.RULE: [rule] * 2, **others}


def test_each_prompt_is_judged_by_its_own_best_length():
    found = regret.summarize(
        {"chat": [times(1.1, l3=1.0, l5=2.0), times(2.0, l3=3.0, l5=2.0)], "code": [times(4.0, l8=2.0)]}
    )
    assert found["kinds"]["chat"]["best"] == [3, 5]
    assert found["kinds"]["chat"]["rule"] == pytest.approx(0.05)
    assert found["kinds"]["code"]["rule"] == pytest.approx(1.0)
    assert found["regret"] == pytest.approx((0.1 + 0.0 + 1.0) / 3)


def test_one_length_is_the_best_of_all_prompts_together():
    found = regret.summarize({"chat": [times(1.0, l3=1.0, l5=2.0), times(2.0, l3=3.0, l5=2.5)]})
    assert found["one_length"] == 3
    assert found["regret_one_length"] == pytest.approx((0.0 + 0.2) / 2)


def test_a_length_that_was_fast_once_is_judged_by_the_other_repeats():
    """Chosen by the first, it takes 2 in the second: the rule's 1 is half; and 1 of the other length in the first."""
    prompt = times(1.0, l3=1.0)
    prompt["fixed 5"] = [0.5, 2.0]
    found = regret.summarize({"chat": [prompt]})
    assert found["regret"] == pytest.approx((-0.5 + 0.0) / 2)


def test_one_repeat_judges_nothing(capsys):
    with pytest.raises(SystemExit):
        exact.main(["--regret", "--repeats", "1"])
    assert "give --repeats 2 or more" in capsys.readouterr().err
