"""The demo: its columns at any time, its picture, and what it says of the texts."""

import io
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from examples import demo
from examples.columns import END, Answer, Columns, compared, play
from examples.parting import Parting, parting, parts_at
from river_compile.reporting.timing import Generation, generate
from tests.support.families import make, prompt

WORDS = ["def", "f(n):\n", "", "", "", "return", "n", "", "#", "the", "number"]


def answer(title, words, every):
    """Returns an answer with a word for each token, one after the other."""
    lengths = tuple(len(" ".join(words[:count])) for count in range(1, len(words) + 1))
    return Answer(title, " ".join(words), tuple(every * count for count in range(1, len(words) + 1)), lengths)


@pytest.fixture
def answers():
    """The plain one at 1 token/s; the same at 10 tokens/s; one with another word at 20 tokens/s."""
    other = [word.replace("number", "count") for word in WORDS]
    return [answer("transformers", WORDS, 1.0), answer("exact", WORDS, 0.1), answer("fast", other, 0.05)]


def printed(content, width=demo.WIDTH, terminal=False):
    file = io.StringIO()
    Console(width=width, height=24, file=file, force_terminal=terminal, color_system=None).print(content)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_changed_words_are_marked_side_by_side(answers):
    """In 80 columns; the texts themselves are whole, whatever spaces they have."""
    plain, fast = answers[0].text, answers[2].text.replace("count", "count of steps")
    assert "".join(piece for piece, _ in compared(plain, fast)) == fast
    assert [piece for piece, differs in compared(plain, fast) if differs] == ["count", "of", "steps"]
    lines = printed(Columns(answers, demo.WIDTH, stars=True).at(END))
    assert lines[0].split() == ["transformers", "exact", "fast"]
    assert "*count*" in "".join(lines)
    assert "".join(lines).count("number") == 2
    assert max(map(len, lines)) <= demo.WIDTH


def test_the_end_has_speeds_ratios_and_verdicts(answers):
    *_, speeds, ratios, verdicts = printed(Columns(answers, demo.WIDTH).at(END))
    assert speeds.split() == ["1.0", "tokens/s", "10.0", "tokens/s", "20.0", "tokens/s"]
    assert ratios.split() == ["10.0", "times", "transformers", "20.0", "times", "transformers"]
    assert verdicts.split() == ["the", "same", "text", "1", "word", "differs"]


def test_a_moment_has_what_was_written_until_then(answers):
    """Of the first answer one word, of the second all but one, of the third all; no ratio before the last token."""
    columns = Columns(answers, demo.WIDTH)
    lines = printed(columns.at(1.05))
    first, second, third = ("\n".join(line[start : start + 26].strip() for line in lines) for start in (0, 27, 54))
    assert "def" in first
    assert "f(n)" not in first
    assert "return n" in second
    assert "number" not in second
    assert third.count("count") == 1
    assert "tokens/s" not in first
    assert "10.0 tokens/s" in second
    assert "times" not in "".join(lines)
    assert len(lines) == len(printed(columns.at(END))) == len(printed(columns.at(0.0)))


def test_a_low_terminal_shows_the_last_lines(answers):
    lines = printed(Columns(answers, 30).at(END, height=2))
    assert "def f(n):" not in "".join(lines)
    assert "number" in "".join(lines)


def test_a_terminal_sees_the_answers_written(answers):
    """The frames come one over the other; the last one is removed."""
    quick = [answer(each.title, each.text.split(" "), 0.02) for each in answers]
    file = io.StringIO()
    play(Columns(quick, 80), Console(file=file, width=80, height=24, force_terminal=True), "in real time")
    shown = file.getvalue()
    assert "transformers" in shown
    assert shown.count("in real time") > 2
    assert "return" in shown
    assert "times transformers" not in shown


def test_half_a_character_is_not_written_before_it_is_whole():
    texts = {(1,): "a", (1, 2): "a\ufffd", (1, 2, 3): "aé"}
    made = Answer.of("", Generation((1, 2, 3), (0.1, 0.2, 0.3)), lambda ids: texts[tuple(ids)])
    assert (made.text, made.lengths) == ("aé", (1, 1, 2))


def test_the_picture_has_the_texts_and_their_speeds(answers, tmp_path):
    demo._record(tmp_path / "new" / "demo.svg", answers, ["the line"])
    root = ElementTree.parse(tmp_path / "new" / "demo.svg").getroot()
    texts = "".join(part.text or "" for part in root.iter("{http://www.w3.org/2000/svg}text"))
    texts = texts.replace("\N{NO-BREAK SPACE}", " ")
    assert all(word in texts for word in ("the line", "10.0 times transformers", "20.0 times", "the same text"))


def test_too_few_tokens_are_refused(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--new-tokens", "1"])
    assert "1 is too few; give 2 or more" in capsys.readouterr().err


def decode(ids):
    return " ".join(f"w{token}" for token in ids)


def tie(first, second):
    return Parting(30, 5, 7, (first, second), torch.bfloat16, 7, torch.float32)


def test_the_line_names_a_near_tie():
    assert demo.plain_line(tie(21.375, 21.25), decode) == (
        "exact parts from transformers: at token 31 two tokens nearly tied: 'w5' (logit 21.38) and 'w7' (21.25) in "
        "eager bfloat16; float32 takes 'w7'."
    )
    assert "two tokens did not nearly tie: 'w5' (logit 21.38) and 'w7' (19.25)" in demo.plain_line(
        tie(21.375, 19.25), decode
    )


def test_the_line_says_whether_drafts_changed_the_text():
    assert demo.undrafted_line([1, 2, 3], [1, 2, 3]) == ("exact equals River without drafts token for token, 3 of 3.")
    assert demo.undrafted_line([1, 2, 3], [1, 4, 3]) == "exact is NOT River without drafts: they part at token 2."
    assert demo.plain_line(None, decode) == "exact equals transformers token for token."


def test_texts_part_at_their_first_other_token_or_end():
    assert parts_at([1, 2], [1, 2]) is None
    assert parts_at([1, 2], [1, 3]) == 1
    assert parts_at([1, 2], [1, 2, 3]) == 2


def test_logits_of_a_parting_are_the_eager_models():
    """The same weights in float32 are asked too, and a text that the model does not write is refused."""
    model, ids = make("llama", torch.bfloat16, layers=2), prompt(8)
    eager = generate(model, ids, 6, end_early=True).tokens
    other = [*eager[:3], (eager[3] + 1) % model.config.vocab_size, *eager[4:]]
    with pytest.raises(ValueError, match="does not repeat"):
        parting(model, ids, 6, other, eager)
    found = parting(model, ids, 6, eager, other)
    assert (found.index, found.eager, found.other) == (3, eager[3], other[3])
    assert found.logits[0] >= found.logits[1]
    assert found.dtype == torch.bfloat16
    assert model.dtype == found.wider_dtype == torch.float32
    with torch.inference_mode():
        wider = model(torch.cat([ids, torch.tensor([eager[:3]])], dim=1)).logits[0, -1]
    assert found.wider == wider.argmax()
    with pytest.raises(ValueError, match="no token that differs"):
        parting(model, ids, 6, eager, eager)


def test_the_line_says_how_deep_tokens_ran_and_what_the_rule_loses():
    rule = {"budget": 0.05, "kl": 0.049, "refusal": None}
    assert demo.depth_line(6.2, 30, rule) == (
        "fast runs 6.2 of 30 layers in 16 bits on average; its rule loses a KL of 0.049 nats per token, by an estimate."
    )
    refused = {"budget": 0.05, "refusal": "no text"}
    assert demo.depth_line(30, 30, refused) == "fast runs 30.0 of 30 layers in 16 bits on average."
