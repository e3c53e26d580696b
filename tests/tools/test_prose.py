"""The checker of prose: it finds a word in each kind of text, and leaves code alone."""

import pytest

from tools import prose


def found(read, source):
    return list(prose.findings("file", read(source)))


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("Text.\n\nIt is packed\nanew.", 'file:4: "anew": say "again"'),
        ("# At once\n", 'file:1: "At once": say "immediately, at the same time"'),
        ("[see whoever](modes.md)", 'file:1: "whoever": say "the caller, the user"'),
        ("All but\ntie.", 'file:1: "All but tie": say "nearly tie"'),
        ("<!-- options: a -->\n\nanew\n\n<!-- end of options -->\n\nanew\n", 'file:7: "anew": say "again"'),
    ],
)
def test_pages(source, line):
    assert found(prose.markdown, source) == [line]


@pytest.mark.parametrize(
    "source",
    [
        "`anew` and ``the river``",
        "```\nanew, at once\n```",
        "The river command, the river backend and `river` are names.",
        "| a |\n|---|\n| weights in 4 bits |\n",
        "Phases are told apart. A renewed canoe. The plan gave 4-bit weights.",
    ],
)
def test_code_and_names_are_left_alone(source):
    assert found(prose.markdown, source) == []


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('"""Does it.\n\nAnew.\n"""', 3),
        ('class C:\n    """Do it.\n\n    Args:\n        a: as it was.\n        b: made\n            anew.\n    """', 7),
        ("x = 1  # anew", 1),
        ("# One line,\n# and anew.\nx = 1", 2),
        ('raise ValueError(f"{x} is made anew")', 1),
        ('warnings.warn("anew", RiverWarning)', 1),
        ('parser.add_argument("--x", help="made anew")', 1),
    ],
)
def test_python(source, line):
    assert [text.lower() for text in found(prose.python, source)] == [f'file:{line}: "anew": say "again"']


@pytest.mark.parametrize(
    "source",
    [
        'anew = "anew"',
        'print("anew")',
        '"""Run it:\n\n    python -m anew\n    anew\n"""',
        '# `anew` and the value "anew"',
    ],
)
def test_python_code_is_left_alone(source):
    assert found(prose.python, source) == []


def test_comments_of_cpp():
    source = '#include "anew.h"\n// one\n// anew\nint anew;  /* at once */\nauto s = "// anew";\n'
    assert [line.partition(": ")[0] for line in found(prose.native, source)] == ["file:3", "file:4"]


def test_a_message_is_checked_before_its_commit(tmp_path, capsys):
    """As the hook of .pre-commit-config.yaml does, whatever the pages say."""
    (tmp_path / "README.md").write_text("anew")
    message = tmp_path / "COMMIT_EDITMSG"
    for subject, status in (("Kernels say why", 0), ("Kernels say why, " * 5, 1)):
        message.write_text(f"{subject}\n\n{'a long line' * 9}")
        assert prose.main(["--root", str(tmp_path), "--commit", str(message)]) == status
    assert capsys.readouterr().out.splitlines() == ["no findings", "the commit's subject has 85 characters, 72 at most"]
    assert prose.main(["--root", str(tmp_path)]) == 1
