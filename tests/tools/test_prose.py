"""The checker of prose: it finds each kind of fault in each kind of text, and leaves code alone."""

import pytest

from tools import prose

LONG = " ".join(["word"] * 40)


def found(read, source):
    return [line for text in read("file", source) for line in prose.findings(text)]


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("Text.\n\nIt is packed\nanew.", 'file:4: "anew": say "again"'),
        ("# At once\n", 'file:1: "At once": say "immediately, at the same time"'),
        ("- first\n- in vain\n", 'file:2: "in vain": say "wasted"'),
        ("[see whoever](modes.md)", 'file:1: "whoever": say "the caller, the user"'),
        ("All but\ntie.", 'file:1: "All but tie": say "nearly tie"'),
        (f"Short. {LONG}.", "file:1: a sentence of 40 words, 25 at most: word word word word word word ..."),
        (f"| a |\n|---|\n| {LONG} |\n", "file:3: a table cell of 199 characters, 120 at most"),
    ],
)
def test_pages(source, line):
    assert found(prose.markdown, source) == [line]


@pytest.mark.parametrize(
    "source",
    [
        "`anew` and ``the river``",
        "```\nanew, at once\n```",
        "    anew\n",
        "The river command, the river backend and `river` are names.",
        f"{'`word` ' * 24}[{LONG}](modes.md).",
        "<!-- options: python -m tools.options -->\n\n| a |\n|---|\n| anew |\n\n<!-- end of options -->\n",
        "| a |\n|---|\n| weights in 4 bits |\n",
        "Phases are told apart. A renewed canoe. The plan gave 4-bit weights.",
    ],
)
def test_code_names_and_generated_tables_are_left_alone(source):
    assert found(prose.markdown, source) == []


def test_text_after_a_generated_table_is_read():
    source = "<!-- options: python -m tools.options -->\n\nanew\n\n<!-- end of options -->\n\nanew\n"
    assert found(prose.markdown, source) == ['file:7: "anew": say "again"']


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('"""Does it.\n\nAnew.\n"""', 3),
        ('def f():\n    """Begin anew."""', 2),
        ('class C:\n    """Do it.\n\n    Args:\n        a: as it was.\n        b: made\n            anew.\n    """', 7),
        ("x = 1  # anew", 1),
        ("# One line,\n# and anew.\nx = 1", 2),
        ('raise ValueError(f"{x} is made anew")', 1),
        ('warnings.warn("anew", RiverWarning)', 1),
        ('parser.add_argument("--x", help="made anew")', 1),
        ("# - anew\n# - again", 1),
    ],
)
def test_python(source, line):
    assert [text.lower() for text in found(prose.python, source)] == [f'file:{line}: "anew": say "again"']


@pytest.mark.parametrize(
    "source",
    [
        'anew = "anew"',
        'print("anew")',
        '"""Run it:\n\n    python -m anew\n    anew --at once\n"""',
        '# `anew` and the value "anew"',
        f"# {LONG[:99]}\nx = 1\n# {LONG[:99]}",
        f'"""Rows:\n\n- {LONG[:99]}\n- {LONG[:99]}\n"""',
    ],
)
def test_python_code_is_left_alone(source):
    assert found(prose.python, source) == []


def test_sentences_of_docstrings_and_comments_may_have_35_words():
    words = " ".join(["word"] * 35)
    assert found(prose.python, f'"""{words}."""') == []
    (line,) = found(prose.python, f"# First. {words} more.")
    assert line.startswith("file:1: a sentence of 36 words, 35 at most")


def test_comments_of_cpp():
    source = '#include "anew.h"\n// one\n// anew\nint anew;  /* at once */\nauto s = "// anew";\n'
    assert found(prose.native, source) == [
        'file:3: "anew": say "again"',
        'file:4: "at once": say "immediately, at the same time"',
    ]


def test_subjects_of_commits():
    assert list(prose.subject("A short one")) == []
    assert list(prose.subject("x" * 72 + "\n\nAnd " + "a long line " * 9)) == []
    assert list(prose.subject("x" * 73)) == ["the commit's subject has 73 characters, 72 at most"]
    (line,) = prose.subject("Kernels are built anew")
    assert '"anew"' in line


def test_a_message_is_checked_before_its_commit(tmp_path, capsys):
    """As the hook of .pre-commit-config.yaml does, whatever the pages say."""
    (tmp_path / "README.md").write_text("anew")
    message = tmp_path / "COMMIT_EDITMSG"
    for subject, status in (("Kernels say why", 0), ("Kernels say why, " * 5, 1)):
        message.write_text(f"{subject}\n")
        assert prose.main(["--root", str(tmp_path), "--commit", str(message)]) == status
    assert capsys.readouterr().out.splitlines() == ["no findings", "the commit's subject has 85 characters, 72 at most"]


def test_a_folder_without_git_is_read_and_gives_the_exit_status(tmp_path, capsys):
    (tmp_path / "docs" / "notes").mkdir(parents=True)
    (tmp_path / "docs" / "notes" / "dated.md").write_text("anew")
    (tmp_path / "README.md").write_text("A page.")
    assert prose.main(["--root", str(tmp_path)]) == 0
    (tmp_path / "docs" / "modes.md").write_text("anew")
    assert prose.main(["--root", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == ["no findings", 'docs/modes.md:1: "anew": say "again"']
