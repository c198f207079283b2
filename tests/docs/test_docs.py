"""The documentation is true where a machine can tell: links resolve, commands parse, recipes load, code runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from dougong.cli.main import app
from dougong.core.errors import ConfigError
from dougong.recipes import RECIPES
from dougong.recipes.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")])
SHELLS = ("", "sh", "bash", "shell", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block: the page it stands on, its language, the words behind that, and its text."""

    page: Path
    language: str
    words: tuple[str, ...]
    text: str


def blocks_of(page: Path) -> list[Block]:
    found, fence, lines = [], None, []
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```") and fence is None:
            fence, lines = line[3:].split() or [""], []
        elif line.startswith("```"):
            found.append(Block(page, fence[0], tuple(fence[1:]), "\n".join(lines)))
            fence = None
        elif fence is not None:
            lines.append(line)
    assert fence is None, f"{page}: a fenced block is not closed"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def named(values, key=lambda value: value):
    """pytest parameters that say where they stand; equal ones of several pages are tried once."""
    unique = {key(value): value for value in reversed(list(values))}
    return [pytest.param(value, id=re.sub(r"\s+", " ", str(k))[:90]) for k, value in reversed(unique.items())]


# ---- twins and links

def test_every_page_has_its_twin():
    english, chinese = ({page.name for page in (ROOT / "docs" / language).glob("*.md")} for language in ("en", "zh"))
    assert english == chinese
    assert "index.md" in english


@pytest.mark.parametrize("name", sorted(page.name for page in (ROOT / "docs/en").glob("*.md")))
def test_twins_show_the_same_commands_and_code(name):
    """Prose differs between the languages; what a reader copies does not."""
    def copied(language):
        return [(block.language, block.text) for block in blocks_of(ROOT / "docs" / language / name)
                if block.language in ("sh", "python", "yaml")]

    assert copied("en") == copied("zh")


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    for target in [a or b for a, b in targets]:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{page.name} links to {target}, which is not there"
        assert ROOT in goal.parents, f"{page.name} links out of the repository: {target}"
        if anchor and goal.suffix == ".md":
            assert anchor in slugs(goal), f"{page.name} links to {target}; its headings are {sorted(slugs(goal))}"


def test_every_page_is_reached_from_the_index():
    for language in ("en", "zh"):
        folder = ROOT / "docs" / language
        linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (folder / "index.md").read_text(encoding="utf-8")))
        assert linked == {page.name for page in folder.glob("*.md")} - {"index.md"}


# ---- commands

def commands() -> list[str]:
    """Every `dougong …` line of the shell blocks, joined over `\\`, without prompts and comments."""
    found = []
    for block in BLOCKS:
        if block.language in SHELLS:
            for line in block.text.replace("\\\n", " ").splitlines():
                if match := re.match(r"\s*(?:\$ )?(?:\.venv/bin/)?(dougong(?: .*)?)$", line):
                    found.append(match[1])
    return found


def yaml_blocks() -> list[Block]:
    """Whole recipes; but for that of the page whose test adds the family it names."""
    return [block for block in BLOCKS if block.language == "yaml" and "base:" in block.text
            and block.page.name != "add-an-architecture.md"]


def parse(line: str):
    """The parameters that a command line gives its command. Raises typer's usage errors."""
    command, words = typer.main.get_command(app), shlex.split(line, comments=True)[1:]
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {words[0]!r} in {line!r}"
        command, words = command.commands[words[0]], words[1:]
    return command.make_context("dougong", words).params


@pytest.fixture
def recipes_of_the_docs(tmp_path, monkeypatch):
    """The YAML recipes that the pages show, as files of their names, in the folder in which commands run."""
    monkeypatch.chdir(tmp_path)
    for block in yaml_blocks():
        if match := re.search(r"^name: (\S+)$", block.text, flags=re.M):
            Path(f"{match[1]}.yaml").write_text(block.text, encoding="utf-8")


def test_there_are_commands():
    assert len(set(commands())) > 20
    assert {line.split()[1] for line in commands()} >= {"demo", "show", "train", "data", "eval", "generate", "report"}


@pytest.mark.parametrize("line", named(commands()))
def test_commands_parse_and_their_keys_exist(line, recipes_of_the_docs):
    params = parse(line)
    if "overrides" in params:
        recipe, overrides = params.get("recipe", "first"), params["overrides"]
        if recipe is not None and not params.get("resume") and not recipe.isupper():
            load_recipe(recipe, overrides)


@pytest.mark.parametrize("line", ["dougong trian first", "dougong train first --steps 3", "dougong data peek"])
def test_wrong_commands_are_caught(line):
    with pytest.raises(Exception, match=r"trian|steps|peek"):
        parse(line)


def test_wrong_keys_are_caught():
    with pytest.raises(ConfigError, match="stepps"):
        load_recipe("first", parse("dougong train first train.stepps=3")["overrides"])


@pytest.mark.parametrize("block", named(yaml_blocks(), key=lambda block: block.text))
def test_yaml_recipes_load(block, tmp_path):
    path = tmp_path / "from-the-docs.yaml"
    path.write_text(block.text, encoding="utf-8")
    recipe, base = load_recipe(str(path))
    assert recipe != base


def test_shipped_recipes_are_listed_in_both_languages():
    for language in ("en", "zh"):
        text = (ROOT / "docs" / language / "recipes.md").read_text(encoding="utf-8")
        assert [name for name in RECIPES if f"| `{name}` |" not in text] == []


# ---- Python

_ONE_CORE = "import os\nif hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
PYTHON = [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize("block", named(PYTHON, key=lambda block: block.text))
def test_python_compiles(block):
    compile(block.text, str(block.page.relative_to(ROOT)), "exec")


@pytest.mark.parametrize("block", named([b for b in PYTHON if "run" in b.words], key=lambda block: block.text))
def test_python_runs(block, tmp_path):
    """Blocks marked `python run` run as they are, beside a folder `texts`; `exact` ones print what the page says.

    In a process of their own on one core, as two threads on a busy machine mostly wait for each other.
    """
    library = Path(sysconfig.get_path("stdlib"))
    for package in ("asyncio", "email", "json"):
        shutil.copytree(library / package, tmp_path / "texts" / package, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", _ONE_CORE + block.text], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "DOUGONG_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    if "exact" in block.words:
        following = blocks_of(block.page)
        shown = following[following.index(block) + 1]
        assert done.stdout.strip() == shown.text.strip()
