"""The documentation is true where a machine can tell: links resolve, commands parse, recipes load, code runs."""

import dataclasses
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
import torch
import typer

from dougong.cli.main import app
from dougong.cli.plan import _machine, _refuse_beside_budget
from dougong.cli.train import _run_to_resume
from dougong.core.errors import ConfigError
from dougong.data import TOKENIZERS
from dougong.data.arrays import RegressionData
from dougong.generate import SamplingConfig
from dougong.optim import OPTIMIZERS, SCHEDULES
from dougong.plan import estimate
from dougong.plan.budget import parse_budget, parse_serving, parse_text
from dougong.plan.machine import KINDS, load_machine
from dougong.recipes import RECIPES
from dougong.recipes.journey import is_journey, load_journey
from dougong.recipes.recipe import EvaluateConfig, SampleConfig, StartConfig, load_recipe
from dougong.runtime.device import RuntimeConfig, check_device
from dougong.runtime.layout import LayoutConfig
from dougong.train.config import EMAConfig, SpikeConfig, TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("*.md")])
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
    """Every `dougong …` and `torchrun … dougong …` line of the shell blocks, joined over `\\`, without prompts and
    comments."""
    found = []
    for block in BLOCKS:
        if block.language in SHELLS:
            for line in block.text.replace("\\\n", " ").splitlines():
                if match := re.match(r"\s*(?:\$ )?(?:\.venv/bin/)?((?:dougong|torchrun)(?: .*)?)$", line):
                    found.append(match[1])
    return found


def yaml_blocks() -> list[Block]:
    """Whole recipes; but for that of the page whose test adds the family it names."""
    return [block for block in BLOCKS if block.language == "yaml" and "base:" in block.text
            and block.page.name != "add-an-architecture.md"]


def journey_blocks() -> list[Block]:
    """Journeys through several recipes."""
    return [block for block in BLOCKS if block.language == "yaml" and re.search(r"^stages:", block.text, flags=re.M)]


def machine_blocks() -> list[Block]:
    """Descriptions of machines."""
    return [block for block in BLOCKS if block.language == "yaml" and re.search(r"^like:", block.text, flags=re.M)]


def launched_by(line: str) -> tuple[str, int]:
    """The command that a line runs, and in how many processes. torchrun's own parser reads what is torchrun's."""
    words = shlex.split(line, comments=True)
    if words[0] == "dougong":
        return line, 1
    from torch.distributed.run import get_args_parser

    try:
        launch = get_args_parser().parse_args(words[1:])
    except SystemExit:
        raise AssertionError(f"torchrun does not understand {line!r}; options of dougong go behind `-m --`") from None
    assert launch.module and launch.training_script == "dougong", f"{line!r} does not start `-m dougong`"
    return shlex.join(["dougong", *launch.training_script_args]), \
        int(launch.nnodes.split(":")[-1]) * int(launch.nproc_per_node)


def parse(line: str):
    """The parameters that a command line gives its command. Raises typer's usage errors."""
    command, words = typer.main.get_command(app), shlex.split(line, comments=True)[1:]
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {words[0]!r} in {line!r}"
        command, words = command.commands[words[0]], words[1:]
    return command.make_context("dougong", words).params


_NOT_BESIDE_BUDGET = ("gpus", "gpu", "hosts", "machine", "price", "simulate")


def check(line: str) -> None:
    """What a command line says is understood: its options, the recipe and its keys, layout, machine and budget."""
    line, processes = launched_by(line)
    params = parse(line)
    recipe, overrides = params.get("recipe", "first"), params.get("overrides")
    if params.get("resume"):
        _run_to_resume(recipe, overrides, params["run"], other="")
    elif "overrides" in params and recipe is not None and is_journey(recipe):
        journey = load_journey(recipe, overrides)
        for stage in journey.stages.values():
            if stage.kind == "train":
                load_recipe(stage.recipe, changes=stage.changes)
    elif "overrides" in params and recipe is not None and not recipe.isupper():
        layout = load_recipe(recipe, overrides)[0].layout
        if isinstance(layout, LayoutConfig) and "train" in line:
            layout.on(processes)
    if params.get("budget") is not None:
        _refuse_beside_budget(**{name: params[name] for name in ("budget", *_NOT_BESIDE_BUDGET)})
        parse_budget(params["budget"]), parse_text(params["data"]), parse_serving(params["memory_for_serving"])
    elif any(params.get(name) for name in ("gpus", "gpu", "machine")):
        _machine(params["gpus"], params["gpu"], params["hosts"], params["machine"], params["price"])


@pytest.fixture
def beside_the_docs(tmp_path, monkeypatch):
    """A folder in which commands run: the YAML recipes and machines that the pages show, as files of their names, the
    examples, and some texts."""
    monkeypatch.chdir(tmp_path)
    for block in [*yaml_blocks(), *journey_blocks(), *machine_blocks()]:
        if match := re.search(r"^name: (\S+)$", block.text, flags=re.M):
            Path(f"{match[1]}.yaml").write_text(block.text, encoding="utf-8")
    Path("examples").symlink_to(ROOT / "examples")
    Path("texts").mkdir()
    Path("texts/one.txt").write_text("some text", encoding="utf-8")


def test_there_are_commands():
    assert len(set(commands())) > 20
    assert {launched_by(line)[0].split()[1] for line in commands()} >= {
        "demo", "show", "plan", "train", "data", "eval", "generate", "report"}
    assert sum(line.startswith("torchrun") for line in set(commands())) >= 4
    assert machine_blocks()


@pytest.mark.parametrize("line", named(commands()))
def test_commands_parse_and_their_keys_exist(line, beside_the_docs):
    check(line)


_OPEN = re.compile(r"(?<![\w.'\"])\w+(?:\.\w+)+=[\[{]")


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_a_shell_leaves_what_is_to_be_typed_whole(page):
    """A shell splits `key=[a, b]` at its spaces, and zsh takes brackets for patterns: such changes stand in quotes."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    typed = [block.text for block in blocks_of(page) if block.language in SHELLS]
    assert [text for text in [*typed, *re.findall(r"`([^`\n]+)`", prose)] if _OPEN.search(text)] == []


@pytest.mark.parametrize(("text", "is_open"), [
    ("train.trackers=[tensorboard, wandb]", True), ("dougong train first train.spikes={}", True),
    ("'train.trackers=[tensorboard, wandb]'", False), ("pip install 'dougong[data]'", False),
    ("dougong train first \"adapt.targets=['*.attention.*']\"", False)])
def test_open_brackets_are_found(text, is_open):
    assert bool(_OPEN.search(text)) == is_open


@pytest.mark.parametrize(("line", "says"), [
    ("dougong trian first", "trian"),
    ("dougong train first --steps 3", "steps"),
    ("dougong data peek", "peek"),
    ("dougong train first train.stepps=3", "stepps"),
    ("dougong train --resume --run runs/first optim.lr=3e-4", "optim.lr"),
    ("dougong train --resume --run runs/first layout.shrad=2", "shrad"),
    ("dougong train first layout.shard=2", "needs 2 processes"),
    ("torchrun --standalone --nproc-per-node 4 -m dougong train first layout.shard=3", "there are 4"),
    ("torchrun --standalone --nproc-per-node 2 -m dougong train first --run runs/two", "torchrun does not understand"),
    ("torchrun --standalone --nproc-per-node 2 -m dougnog train first", "dougnog"),
    ("torchrun --nnodes 1:2 --nproc-per-node 2 -m -- dougong train first --runn runs/two", "runn"),
    ("dougong plan first --gpus 8 --gpu h2000", "h2000"),
    ("dougong plan first --gpus 8", "which kind"),
    ("dougong plan first --gpuss 8", "gpuss"),
    ("dougong plan --budget '8 h200'", "is no budget"),
    ("dougong plan --budget '8 h200 x 3 days' --price 3", "--price has no effect"),
    ("dougong plan --budget '8 h200 x 3 days' --data nowhere", "nowhere"),
    ("dougong report runs/first --whi", "whi")])
def test_wrong_commands_are_caught(line, says, beside_the_docs):
    with pytest.raises(Exception, match=says):
        check(line)


@pytest.mark.parametrize("block", named(machine_blocks(), key=lambda block: block.text))
def test_machines_load(block, tmp_path):
    path = tmp_path / "from-the-docs.yaml"
    path.write_text(block.text, encoding="utf-8")
    like = KINDS[re.search(r"^like: (\S+)$", block.text, flags=re.M)[1]]
    assert load_machine(path) != like


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


# ---- keys, options and messages

_DESCRIBED = (TrainConfig, EMAConfig, SpikeConfig, EvaluateConfig, SampleConfig, StartConfig, RuntimeConfig,
              LayoutConfig, RegressionData, *OPTIMIZERS.values(), *SCHEDULES.values(), *TOKENIZERS.values())


def spelled(language: str, pages: str = "*.md") -> set[str]:
    """Words that pages of one language spell as code."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / language).glob(pages)))
    return set(re.findall(r"\w+", " ".join(re.findall(r"^```.*?^```|`[^`\n]+`", text, flags=re.S | re.M))))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_key_of_these_sections_is_described(language):
    known = spelled(language)
    assert [f"{section.__name__}.{key.name}" for section in _DESCRIBED for key in dataclasses.fields(section)
            if key.name not in known] == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_chats_options_and_the_settings_of_sampling_are_described(language):
    assert set(parse("dougong chat runs/first")) - {"run"} <= spelled(language, "serving.md")
    fields = {field.name for field in dataclasses.fields(SamplingConfig)}
    options = {word for name in spelled(language, "generation.md") for word in (name, name.replace("-", "_"))}
    assert fields - {"top_k", "min_p", "repetition_penalty"} <= options       # those are named as their options


@pytest.mark.parametrize(("cuda", "says"), [(None, "built without CUDA"), ("12.8", "built for CUDA 12.8")])
def test_an_absent_gpu_says_how_to_see_why_and_so_does_the_page(cuda, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"runtime\.device=cuda is not available here") as refused:
        check_device("cuda")
    assert says in str(refused.value) and "nvidia-smi" in str(refused.value)
    assert ("CUDA_VISIBLE_DEVICES=''" in str(refused.value)) == (cuda is not None)
    for language in ("en", "zh"):
        page = (ROOT / "docs" / language / "troubleshooting.md").read_text(encoding="utf-8")
        assert "`runtime.device=cuda is not available here`" in page
        assert "torch.version.cuda" in page and "nvidia-smi" in page and "CUDA_VISIBLE_DEVICES" in page


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_dry_runs_table_has_the_rows_that_are_printed(language):
    page = ROOT / "docs" / language / "recipes.md"
    block = next(block.text for block in blocks_of(page) if block.text.startswith("parameters "))
    planned = estimate(parameters=1, flops_per_token=1.0, tokens_per_step=1, steps=1, ema=False, counted={},
                       checkpoints_kept=1).to_dict()
    shown = [re.split(r"\s{2,}", line)[0] for line in block.split("\n\n")[0].splitlines()]
    assert shown == [*(key.replace("_", " ") for key in planned), "steps", "seconds per step", "training seconds"]


# ---- Python

_ONE_CORE = "import os\nif hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
PYTHON = [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize("block", named(PYTHON, key=lambda block: block.text))
def test_python_compiles(block):
    compile(block.text, str(block.page.relative_to(ROOT)), "exec")


@pytest.mark.parametrize("block", named([b for b in PYTHON if "run" in b.words], key=lambda block: block.text))
def test_python_runs(block, tmp_path):
    """Blocks marked `python run` run as they are, beside a folder `texts`; `exact` ones print what the page says, `two`
    ones the same in two processes.

    In a process of their own on one core, as two threads on a busy machine mostly wait for each other.
    """
    library = Path(sysconfig.get_path("stdlib"))
    for package in ("asyncio", "email", "json"):
        shutil.copytree(library / package, tmp_path / "texts" / package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "DOUGONG_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _ONE_CORE + block.text], cwd=tmp_path, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    if "exact" in block.words:
        following = blocks_of(block.page)
        shown = following[following.index(block) + 1]
        assert done.stdout.strip() == shown.text.strip()
    if "two" in block.words:
        (tmp_path / "many.py").write_text(block.text, encoding="utf-8")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "many.py"]
        both = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert both.returncode == 0, both.stderr[-3000:]
        assert both.stdout == done.stdout != ""
