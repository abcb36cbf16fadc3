"""The written documentation agrees with the code that it describes."""

import re
from pathlib import Path

from lib_hires.cli import methods_as_markdown
from lib_hires.methods import methods

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_settings_tables_are_those_of_the_schema():
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    written = page.partition("<!-- settings -->\n")[2].partition("\n<!-- /settings -->")[0]
    assert written == methods_as_markdown()


def test_every_method_has_a_section_that_says_where_it_comes_from():
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8").partition("<!-- settings -->")[0]
    sections = {part.partition("\n")[0]: part for part in page.split("\n## ")[1:]}
    for cls in methods().values():
        assert "Source: " in sections[cls.title], cls.title


def test_every_method_stands_in_the_readme():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for cls in methods().values():
        assert f"**{cls.title}**" in page


def test_every_link_and_picture_leads_to_a_file():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} points to {target}"
