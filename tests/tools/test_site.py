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


def test_a_range_stays_on_one_line():
    found = site.on_page_content("<td>251 (194–621)</td>", None, None, None)
    assert found == '<td>251 <span class="river-range">(194–621)</span></td>'
