"""The hooks of the site: links that work both on GitHub and on the site, and lists as GitHub reads them."""

import pytest

from tools import site

PAGES = {"index.md", "modes.md", "guides/ipex.md", "images/one.png", "river.schema.json"}


@pytest.mark.parametrize(
    ("folder", "before", "after"),
    [
        ("", "[modes](docs/modes.md#exact)", "[modes](modes.md#exact)"),
        ("", "![a picture](docs/images/one.png)", "![a picture](images/one.png)"),
        ("", "[Contributing](CONTRIBUTING.md)", "`Contributing`"),
        ("docs", "[IPEX](guides/ipex.md)", "[IPEX](guides/ipex.md)"),
        ("docs", "[README](../README.md#speed)", "[README](index.md#speed)"),
        ("docs", "[the errors](../river_compile/errors.py)", "the errors"),
        ("docs", "[`errors.py`](../river_compile/errors.py)", "`errors.py`"),
        ("docs/guides", "[modes](../modes.md)", "[modes](../modes.md)"),
        ("docs/guides", "[rules](../../CONTRIBUTING.md#rules)", "`rules`"),
        ("docs", "[a dead link](absent.md)", "[a dead link](absent.md)"),
        ("docs", "[out](https://example.org) and [below](#here)", "[out](https://example.org) and [below](#here)"),
        ("", "`[code](docs/modes.md)`", "`[code](docs/modes.md)`"),
        ("", "```\n[code](docs/modes.md)\n```", "```\n[code](docs/modes.md)\n```"),
        ("", "[`exact`](docs/modes.md)", "[`exact`](modes.md)"),
    ],
)
def test_links_are_relative_to_the_pages_of_the_site(folder, before, after):
    assert site.rewritten(before, folder, PAGES) == after


def test_with_the_repositorys_address_links_out_of_the_pages_lead_there():
    found = site.rewritten("[rules](../CONTRIBUTING.md#rules)", "docs", PAGES, "https://example.org/river/")
    assert found == "[rules](https://example.org/river/blob/main/CONTRIBUTING.md#rules)"


def test_a_list_may_follow_a_paragraph():
    text = "Two:\n- one\n- two\n\n```\ncode:\n- none\n```\n\nMore:\n1. first\n   - inner\n"
    assert site.spaced(text) == text.replace("Two:\n", "Two:\n\n").replace("More:\n", "More:\n\n")


@pytest.mark.parametrize("interval", ["(194–621)", "(2.1 to 8.5 %)"])
def test_a_range_stays_on_one_line(interval):
    found = site.on_page_content(f"<td>251 {interval}</td>", None, None, None)
    assert found == f'<td>251 <span class="river-range">{interval}</span></td>'


def _table(*rows, right=False):
    """Returns a table as Python-Markdown writes it, its first row the header."""
    style = ' style="text-align: right;"' if right else ""
    lines = ["<tr>" + "".join(f"<{tag}{style}>{cell}</{tag}>" for cell in row) + "</tr>" for tag, row in rows]
    return f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"


def test_cells_of_a_table_of_words_carry_their_columns_names():
    rows = (("th", ["a", '<code>"b"</code>', "c"]), ("td", ["1", "2", "3"]), ("td", ["4", "5", ""]))
    found = site.on_page_content(_table(*rows), None, None, None)
    assert found.startswith("<table data-rows><thead><tr><th>a</th>")
    row = '<tr><td data-label="a">{}</td><td data-label="&quot;b&quot;">{}</td><td data-label="c">{}</td></tr>'
    assert found.endswith(f"{row.format(1, 2, 3)}{row.format(4, 5, '')}</tbody></table>")


@pytest.mark.parametrize(("columns", "right"), [(2, False), (3, True)])
def test_other_tables_stay_tables(columns, right):
    table = _table(("th", ["a"] * columns), ("td", ["1"] * columns), right=right)
    assert site.on_page_content(table, None, None, None) == table


def test_code_in_tables_may_break_after_its_marks():
    code = f"tests/a.py::test_{'x' * 40}"
    cells = "<code>a.b</code><table><td><code>{}</code><code{}>{}</code></td></table>"
    found = site.on_page_content(cells.format("a.b_c", "", code), None, None, None)
    broken = code.replace("/", "/<wbr>").replace(".py::test_", ".<wbr>py::<wbr>test_<wbr>")
    assert found == cells.format("a.<wbr>b_<wbr>c", ' class="river-long"', broken)
