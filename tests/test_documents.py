"""What pages, docstrings and comments name exists: modules, files, links with anchors, commands and their options.

The citation file and the page of the method name one paper.

Not handled: names in docs/notes and generated pages, and that an option of `python -m` belongs to the very command it
stands with.
"""

import ast
import functools
import itertools
import re

import pytest
import typer
import yaml
from markdown_it import MarkdownIt

import river_compile
from river_compile.cli import app
from tests.support.layout import OURS, ROOT, names_in
from tools.prose import GENERATED, PAGES

MANUAL = [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]
LINKED = [*MANUAL, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/notes/*.md"))]
SOURCES = [file for folder in (*OURS, "passes", "kernels") for file in sorted((ROOT / folder).rglob("*.py"))]
NATIVE = sorted(ROOT.glob("kernels/native/sources/**/*.*"))

MODULE = re.compile(rf"(?<![\w./-])((?:{'|'.join(OURS)})(?:\.\w+)+)(?![\w/(]*[/\"'])")
FILE = re.compile(r"(?<![\w./<{*-])((?:[\w-]+/)*[\w-]+\.(?:py|h|cpp|md|jinja|jsonl))\b(?![\w.]*[(*])")
COMMAND = re.compile(r"python -m ((?:benchmarks|examples|tools)(?:\.\w+)+)([^`\n|]*)")
OPTION = re.compile(r"(?<!\w)--[a-z][\w-]+")
# Files of other packages, of users, and those that a command writes.
OTHERS = re.compile(
    r"(?:benchmarks/results/)?(?:NAME|decode)\.jsonl|llama\.cpp|modeling_\w+\.py|cache_utils\.py|Python\.h|torch/library\.h|script\.py|answers?\.\w+"
)


@functools.cache
def paths() -> str:
    """Returns the paths of all files, each after a slash and before a line's end."""
    folders = (*OURS, "passes", "kernels", "docs", ".github")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return "".join(f"/{path.relative_to(ROOT).as_posix()}\n" for path in [*found, *ROOT.glob("*")])


def prose(file):
    """Returns a page, the docstrings and comments of a Python file, or the comments of a C++ file."""
    source = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return "" if file.relative_to(ROOT).as_posix() in GENERATED else source
    if file.suffix != ".py":
        return "\n".join(re.findall(r"//.*", source))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return "\n".join([*(ast.get_docstring(node) or "" for node in nodes), *re.findall(r"# .*", source)])


def is_module_or_name_in_one(name):
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = "/".join(parts[1:count] if parts[1:2] in (["passes"], ["kernels"]) else parts[:count])
        if f"/{path}.py\n" in paths() or (ROOT / path).is_dir():
            return count == len(parts) or parts[count] in names_in(".".join(parts[:count]))
    return False


def absent_modules(text):
    return [name for name in MODULE.findall(text) if not is_module_or_name_in_one(name)]


def absent_files(text):
    return [name for name in FILE.findall(text) if f"/{name}\n" not in paths() and not OTHERS.fullmatch(name)]


@functools.cache
def options_of(folder: str) -> str:
    return "".join(file.read_text(encoding="utf-8") for file in SOURCES if file.relative_to(ROOT).parts[0] == folder)


def absent_commands(text):
    for module, arguments in COMMAND.findall(text):
        path, folder = module.replace(".", "/"), module.split(".")[0]
        if not any(f"/{path}{end}\n" in paths() for end in (".py", "/__main__.py")):
            yield f"python -m {module}"
        else:
            found = OPTION.findall(arguments)
            known = options_of(folder)  # (`benchmarks.common.command_line` takes names without their dashes)
            yield from (f"python -m {module} {o}" for o in found if f'"{o}"' not in known and f'"{o[2:]}"' not in known)


@pytest.mark.parametrize("absent", [absent_modules, absent_files, absent_commands])
def test_what_is_named_exists(absent):
    files = [*MANUAL, *NATIVE, *(file for file in SOURCES if "tests/tools" not in file.as_posix())]  # (samples there)
    missing = [f"{file.relative_to(ROOT)}: {name}" for file in files for name in absent(prose(file))]
    assert not missing, "\n".join(missing)


def anchors(page):
    """Returns a page's own anchors, and those that GitHub and the site give its headings."""
    text = page.read_text(encoding="utf-8")
    tokens, found = MarkdownIt("commonmark").parse(text), re.findall(r'<a id="([\w-]+)">', text)
    for before, heading in itertools.pairwise(tokens):
        if before.type == "heading_open":
            text = "".join(child.content for child in heading.children if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


def targets(page):
    """Yields the targets of a page's links and images."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or ():
            yield from (str(child.attrs[name]) for name in ("href", "src") if name in child.attrs)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page):
    dead = []
    for target in targets(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if re.match(r"[a-z]+:", target) or anchor.startswith("river_compile."):  # (docs/api.md's are generated)
            continue
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    assert not dead, "\n".join(dead)


def test_no_message_names_a_page_that_an_installed_package_lacks():
    """Only docstrings and comments, whose readers have the sources, name files of docs/."""
    packaged = {"river_compile/docs/river.schema.json"}  # package data in pyproject.toml
    found = []
    for file in (file for folder in ("river_compile", "passes", "kernels") for file in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                names = re.findall(r"[\w./-]*docs/[\w./-]+\w", node.value)
                found += [f"{file.relative_to(ROOT)}: {name}" for name in names if name not in packaged]
    assert not found, "\n".join(found)


def test_the_page_of_the_api_has_every_public_name():
    """In its table for readers without a site, and as a section."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    sections = re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)
    documented = {section.rsplit(".", 1)[-1] for section in sections if section.rsplit(".", 1)[0] != "river_compile"}
    documented |= names_in("river_compile.errors") if "river_compile.errors" in sections else set()
    assert {*river_compile.__all__} <= documented
    table = re.findall(r"\[`(\w+)`\]\(#([\w.]+)\)", page)
    assert {name for name, _ in table} == {*river_compile.__all__}
    assert all(anchor.endswith(f".{name}") and is_module_or_name_in_one(anchor) for name, anchor in table)


def test_the_citation_file_and_the_bibtex_name_the_same_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (paper,) = citation["references"]
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    bibtex = dict(re.findall(r"^  (\w+) += \{(.*)\},$", page, re.MULTILINE))
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    expected = (paper["title"], authors, paper["conference"]["name"], str(paper["year"]), paper["url"])
    assert tuple(bibtex[name] for name in ("title", "author", "booktitle", "year", "url")) == expected
    assert f'license = "{citation["license"]}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


RIVER = re.compile(r"(?<![\w./-])river (explain-error|[a-z]+)((?: +(?:[^\s`|#\\]|\\\n)+)*)")


def river_commands(text):
    """Yields each command of `river` in a page's code, with the options that follow it."""
    code = [*re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL), *re.findall(r"`[^`\n]+`", text)]
    for name, rest in RIVER.findall("\n".join(code)):
        yield name, re.findall(r"(?<= )--?[a-zA-Z][\w-]*", rest)


def test_commands_of_river_take_the_options_that_pages_give_them():
    commands = typer.main.get_command(app.app).commands
    known = {
        name: {text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts)}
        | {"--help"}
        for name, command in commands.items()
    }
    pages = [(page.name, *found) for page in MANUAL for found in river_commands(page.read_text(encoding="utf-8"))]
    assert len(pages) > 80
    wrong = [
        f"{page}: river {name} {o}" for page, name, options in pages for o in options if o not in known.get(name, ())
    ]
    wrong += [f"{page}: river {name}" for page, name, _ in pages if name not in known]
    assert not wrong, "\n".join(wrong)
