"""The documents can't lie: every `console` block is run and compared, every command line in them works, the Python
example runs, and docs/commands.md is what `--help` prints.

    python tests/test_docs.py        # write the outputs and the command reference anew

Numbers are masked in the comparison: they are a small random model's, and their last digits the processor's.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import skimage
import tiny
from conftest import Run

Here = Callable[[str], tuple[int, str]]  # a line of bash -> exit code, what it said

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "prompts" / "README.md"]
REFERENCE = ROOT / "docs" / "commands.md"
TRAINING = ROOT / "docs" / "training.md"
SETTING = re.compile(r"^    (\w+): [^=]+ = (.+?)(?:  # (.+))?$")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+|\d+(?= (?:k|M|G)?B\b)|[█▏▎▍▌▋▊▉]+ *")
ALL = '{"path": "a.jpg", "label": "cat", "margin": 0.05, "abstained": false, "error": null}\n'
CAPTIONS = "path,caption\n" + "photos/cat.png,a cat\nphotos/rocket.jpg,a rocket that takes off\n" * 4
RECIPE = """image_size = 32\npatch_size = 16\nlayers = 1\nwidth = 32\nembed_dim = 16\ntext_width = 32\ntext_layers = 1
vocabulary_size = 520\nepochs = 1\nbatch_size = 4\nhold_out = 0\n"""
ELSEWHERE = ("pip ", "python3 ", "make ", "inotifywait", "hf ", "git ", "bash ")  # not ours, or not here


def blocks(page: Path, language: str) -> list[str]:
    """The contents of the fenced blocks of one language."""
    return [text for found, text in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def sessions(block: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with the output that follows it."""
    found: list[tuple[str, str]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        else:
            found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return found


def make_sandbox(folder: Path) -> Path:
    """The folder in which the documents' commands are true."""
    data = Path(skimage.__file__).parent / "data"
    (folder / "photos").mkdir(parents=True)
    for name, source in (("astronaut.png", "astronaut.png"), ("cat.png", "chelsea.png"), ("rocket.jpg", "rocket.jpg")):
        (folder / "photos" / name).write_bytes((data / source).read_bytes())
    (folder / "photos" / "torn.jpg").write_bytes((data / "rocket.jpg").read_bytes()[:9000])
    (folder / "a.jpg").write_bytes((data / "rocket.jpg").read_bytes())
    for name, text in {
        "all.jsonl": ALL,
        "words.csv": "label,aliases,group\ncat,cat|kitten,animal\nrocket,rocket,\n",
        "labels.txt": "cat\nrocket\nperson\n",
        "classes.txt": "cat\nrocket\n",
        "more.txt": "dog\n",
        "rest.txt": "moon\nsoup\n",
        "bad.txt": "cat\ntabby_cat\ncat\n",
        "captions.csv": CAPTIONS,
        "recipe.toml": RECIPE,
        "list": "photos/cat.png\nphotos/rocket.jpg\n",
    }.items():
        (folder / name).write_text(text)
    (folder / "cats").mkdir()
    for number in range(8):
        (folder / "by-class" / ("cat", "rocket")[number % 2]).mkdir(parents=True, exist_ok=True)
        picture = folder / "by-class" / ("cat/{}.png", "rocket/{}.jpg")[number % 2].format(number)
        picture.write_bytes((data / ("chelsea.png", "rocket.jpg")[number % 2]).read_bytes())
    shutil.copytree(folder / "by-class", folder / "val")
    (folder / "last-run").touch()
    os.utime(folder / "last-run", (0, 0))
    tiny.save(folder / "models" / "my-clip")
    tiny.save(folder / "my-model")
    with tarfile.open(folder / "pictures.tar", "w") as archive:
        archive.add(folder / "a.jpg", "a.jpg")
    for name, template in (("before", "a photo of a <>."), ("after", "a drawing of a <>.")):
        run(f"clipcli classify photos/ -l labels.txt -t '{template}' -q -o {name}.jsonl --no-cache", folder)
    run("clipcli embed photos/ -o photos.safetensors --no-cache", folder)
    run("clipcli build-classifier labels.txt -o my.safetensors --no-cache", folder)
    return folder


def run(command: str, sandbox: Path) -> subprocess.CompletedProcess[str]:
    """Run one line of bash there, `clipcli` being this checkout's, stderr after stdout as on a terminal."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("CLIPCLI_", "HF_"))},
        "CLIPCLI_MODEL": "tiny",
        "CLIPCLI_CACHE_DIR": str(sandbox / ".cache"),
        "CLIPCLI_CONFIG_DIR": str(sandbox / ".config"),
        "HF_HOME": str(sandbox / ".hf"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    function = f'clipcli() {{ "{sys.executable}" -m clipcli "$@"; }}; '
    return subprocess.run(
        ["bash", "-c", function + command],
        cwd=sandbox,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )


def masked(text: str) -> str:
    """`text` without what differs from machine to machine."""
    return NUMBER.sub("#", text)


def command_reference(sandbox: Path) -> str:
    """docs/commands.md: the help page of every command, at 100 columns."""
    pages = ["# Commands\n\nMade from `--help` by `python tests/test_docs.py`; a test compares.\n"]
    waiting = [""]
    while waiting:
        command = waiting.pop(0)
        page = run(f"COLUMNS=100 clipcli {command} --help", sandbox).stdout
        text = "\n".join(line.rstrip() for line in page.strip().splitlines())
        pages.append(f"## clipcli {command}".rstrip() + f"\n\n```text\n{text}\n```\n")
        inside = page.partition("─ Commands ─")[2]
        waiting = [f"{command} {name}".strip() for name in re.findall(r"^│ ([a-z][a-z-]*) ", inside, re.M)] + waiting
    return "\n".join(pages)


def settings_of_training() -> str:
    """docs/training.md with the table of settings: names, defaults and comments of `TrainConfig`'s source."""
    from clipcli.train.config import TrainConfig

    before, mark, _ = TRAINING.read_text(encoding="utf-8").partition("<!-- settings")
    comment = mark + _.partition("-->")[0] + "-->\n"
    lines: list[str] = []
    for line in inspect.getsource(TrainConfig).splitlines():
        if line.startswith("    # "):
            lines += [f"\n### {line[6:].partition(';')[0]}\n", "| setting | default | |", "|---|---|---|"]
        elif found := SETTING.match(line):
            name, default, what = found.groups()
            lines.append(f"| `{name}` | `{default}` | {(what or '').replace('|', chr(92) + '|')} |")
        elif line.startswith("    @classmethod"):
            break
    return before + comment + "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sandbox(tmp_path_factory.mktemp("docs"))


@pytest.fixture
def here(sandbox: Path, cli: Run, monkeypatch: pytest.MonkeyPatch) -> Here:
    """Run one line of bash in the sandbox: within this process if it is one command, which spares importing torch."""
    monkeypatch.chdir(sandbox)
    monkeypatch.setenv("CLIPCLI_MODEL", "tiny")
    monkeypatch.setenv("CLIPCLI_CACHE_DIR", str(sandbox / ".cache"))

    def run_here(line: str) -> tuple[int, str]:
        if not line.startswith("clipcli ") or re.search(r"[|;&<>$()]", re.sub(r'"[^"]*"', "", line)):
            result = run(line, sandbox)
            return result.returncode, result.stdout
        done = cli(*shlex.split(line)[1:])
        return done.code, done.out.decode() + done.err

    return run_here


CONSOLE = [(page, block) for page in PAGES for block in blocks(page, "console")]


@pytest.mark.parametrize(("page", "block"), CONSOLE, ids=[f"{page.name}-{i}" for i, (page, _) in enumerate(CONSOLE)])
def test_console_blocks_show_what_happens(here: Here, sandbox: Path, page: Path, block: str) -> None:
    shutil.rmtree(sandbox / ".cache", ignore_errors=True)
    for command, expected in sessions(block):
        said = masked(here(command)[1])  # here, what went to stderr comes last
        assert sorted(said.splitlines()) == sorted(masked(expected).splitlines()), command


LINES = sorted(
    {
        line.partition(" #")[0].strip()
        for page in PAGES
        for block in blocks(page, "sh")
        for line in re.sub(r"(\||\\)\n\s*", r"\1 ", block).splitlines()
        if "clipcli " in line and not line.startswith(ELSEWHERE) and "parallel" not in line
    }
)


@pytest.mark.parametrize("line", LINES)
def test_command_lines_work(here: Here, sandbox: Path, line: str) -> None:
    if re.search(r"\$file|tail -f|pull|install-completion", line):
        pytest.skip("needs a shell around it, a person, or the network")
    for made in re.findall(r"-o (\S+)", line):
        (sandbox / f"{made}.run.json").unlink(missing_ok=True)
        (sandbox / made).unlink() if (sandbox / made).is_file() else shutil.rmtree(sandbox / made, ignore_errors=True)
    code, said = here(line)
    assert code in (0, 3), said
    assert "Traceback" not in said and "hint:" not in said, said


@pytest.mark.parametrize("block", blocks(ROOT / "README.md", "python"))
def test_the_python_example_runs(sandbox: Path, block: str) -> None:
    (sandbox / "example.py").write_text(block)
    result = run(f'"{sys.executable}" example.py', sandbox)
    assert result.returncode == 0, result.stdout
    rows = [line for line in result.stdout.splitlines() if not line.startswith("tiny is")]
    assert [line.split()[0] for line in rows] == ["photos/cat.png", "photos/rocket.jpg"]


def test_the_command_reference_is_what_help_prints(sandbox: Path) -> None:
    assert REFERENCE.read_text(encoding="utf-8") == command_reference(sandbox), "python tests/test_docs.py"


def test_every_setting_of_training_is_in_the_table() -> None:
    from clipcli.train.config import TrainConfig

    page = settings_of_training()
    assert TRAINING.read_text(encoding="utf-8") == page, "python tests/test_docs.py"
    assert all(f"| `{field.name}` |" in page for field in fields(TrainConfig))


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
            to = (page.parent / target).resolve() if target else page
            assert to.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", to.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, anchor


def refresh() -> None:
    """Write the outputs of all console blocks and the command reference anew."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        sandbox = make_sandbox(Path(folder) / "docs")
        for page in PAGES:

            def again(match: re.Match[str]) -> str:
                if match[1] != "console":
                    return match[0]
                shutil.rmtree(sandbox / ".cache", ignore_errors=True)
                lines = [f"$ {command}\n{run(command, sandbox).stdout}" for command, _ in sessions(match[2])]
                return "```console\n" + "".join(lines) + "```"

            page.write_text(FENCE.sub(again, page.read_text(encoding="utf-8")), encoding="utf-8")
        TRAINING.write_text(settings_of_training(), encoding="utf-8")
        REFERENCE.write_text(command_reference(sandbox), encoding="utf-8")


if __name__ == "__main__":
    refresh()
