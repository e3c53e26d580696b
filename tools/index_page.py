"""What a package index shows: README.md with links that lead to the repository, and the project's addresses.

Addresses come from RIVER_REPOSITORY_URL and RIVER_SITE_URL, as in mkdocs.yml. Without them a link keeps its text, and a
picture goes. Read by setup.py in a build, so it imports the standard library alone. Not handled: reference links.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

PAPER = "https://arxiv.org/abs/2604.18396"
_LINK = re.compile(r"(!?)\[([^][]*)\]\(([^()\s]+)\)")
_CODE = re.compile(r"^```.*?^```$|<!--.*?-->|`[^`\n]+`(?!\])", flags=re.MULTILINE | re.DOTALL)
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#")


def description(readme: str, version: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return README.md with absolute links.

    Args:
        readme: its text.
        version: of the release, whose tag is ``vVERSION``.
        environment: has the address of the repository, or not.
    """
    repository = environment.get("RIVER_REPOSITORY_URL", "").rstrip("/")

    def link(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        if _ELSEWHERE.match(target):
            return found[0]
        if not repository:
            return "" if image else text
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/v{version}/{target})"

    parts, end = [], 0
    for code in _CODE.finditer(readme):
        parts += [_LINK.sub(link, readme[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, _LINK.sub(link, readme[end:])])


def addresses(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the project's addresses by name: those that are known."""
    repository, site = (environment.get(name, "").rstrip("/") for name in ("RIVER_REPOSITORY_URL", "RIVER_SITE_URL"))
    found = {"Documentation": site or (repository and f"{repository}/tree/main/docs"), "Repository": repository}
    if repository:
        found |= {"Issues": f"{repository}/issues", "Changelog": f"{repository}/blob/main/CHANGELOG.md"}
    return {name: address for name, address in {**found, "Paper": PAPER}.items() if address}
