"""`clipcli labels` and `clipcli templates`, as they are typed: what comes out, where, and with which exit code."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run
from test_house import HEAVY, modules_after

from clipcli.zeroshot import templates

ROOT = Path(__file__).resolve().parents[1]
PETS = "tabby | tiger cat\ndog :: a dog that barks\n"
WRONG = "cat\ntabby_cat\ncat\n"
FOUND = (
    'labels.txt:2: warning: "tabby_cat" is spelled like an identifier; '
    'write "tabby cat", or "tabby_cat = tabby cat" to keep the name\n'
    'labels.txt:3: error: label "cat" stands twice (first on line 1); '
    'give one of them another name: "other name = words" in text, "aliases" in CSV and JSON\n'
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a good and a bad label file."""
    monkeypatch.chdir(tmp_path)
    Path("pets.txt").write_text(PETS)
    Path("labels.txt").write_text(WRONG)
    return tmp_path


def own(home: Path, name: str, text: str) -> Path:
    path = home / "config" / "prompts" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def on_a_terminal(*args: str, **environment: str) -> str:
    """What a person sees: stdout is a terminal of 80 columns, stderr is not shown."""
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-m", "clipcli", *args],
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        check=False,
        env=os.environ | {"COLUMNS": "80", "TERM": "xterm", "PYTHONPATH": str(ROOT)} | environment,
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 1 << 16):
            shown += part
    except OSError:  # Linux: the other side is closed
        pass
    os.close(ours)
    return shown.decode().replace("\r\n", "\n")


# labels lint


def test_lint(cli: Run) -> None:
    result = cli("labels", "lint", "labels.txt")
    assert (result.code, result.out.decode()) == (2, FOUND)
    assert result.err == "clipcli: 2 labels, 1 error, 1 warning\n"


def test_lint_exit_codes(cli: Run) -> None:
    clean = cli("labels", "lint", "pets.txt", "--strict")
    assert (clean.code, clean.out, clean.err) == (0, b"", "clipcli: 2 labels, 0 errors, 0 warnings\n")
    Path("hint.txt").write_text("cat\ntabby_cat\n")
    assert cli("labels", "lint", "hint.txt").code == 0
    strict = cli("labels", "lint", "hint.txt", "--strict", "-q")
    assert (strict.code, strict.out.decode(), strict.err) == (
        2,
        FOUND.splitlines(True)[0].replace("labels", "hint"),
        "",
    )


def test_lint_as_json(cli: Run) -> None:
    result = cli("labels", "lint", "labels.txt", "--json", "-q")
    assert result.code == 2 and result.err == ""
    warning, error = json.loads(result.out)
    assert warning == {
        "file": "labels.txt",
        "line": 2,
        "entry": None,
        "level": "warning",
        "code": "snake-case",
        "message": '"tabby_cat" is spelled like an identifier',
        "hint": 'write "tabby cat", or "tabby_cat = tabby cat" to keep the name',
        "label": "tabby_cat",
        "other": None,
        "cosine": None,
    }
    assert (error["line"], error["level"], error["code"], error["label"]) == (3, "error", "duplicate", "cat")
    assert json.loads(cli("labels", "lint", "pets.txt", "--json").out) == []


def test_lint_goes_by_the_templates(cli: Run) -> None:
    Path("articles.txt").write_text("a cat\na dog\n")
    assert b'doubles with that of the template "itap of a <>."' in cli("labels", "lint", "articles.txt").out
    assert cli("labels", "lint", "articles.txt", "-t", "a photo of <>").out == b""


def test_lint_with_a_model(cli: Run, model: Path) -> None:
    Path("twins.txt").write_text(f"cat\nn1 = cat\n{'x7' * 40}\n")
    result = cli("labels", "lint", "twins.txt", "-m", model, "-t", "simple", "--similar", "0.999")
    assert result.code == 2
    told = [line.partition("; ")[0] for line in result.lines]
    assert told[:2] == [
        'twins.txt:2: warning: label "n1": "cat" stands for "cat" (first on line 1) too',
        'twins.txt:2: warning: "n1" is hard to tell from "cat" (first on line 1): cosine 1.000',
    ]
    assert told[2].startswith("twins.txt:3: error: label ") and told[2].endswith(" makes 89 tokens, 77 fit")
    assert result.err == "clipcli: 3 labels, 1 error, 2 warnings, longest prompt 89 tokens, 77 fit\n"
    counted = cli("labels", "lint", "twins.txt", "--vocabulary", model / "merges.txt", "-t", "simple")
    assert [line.partition("; ")[0] for line in counted.lines] == [told[0], told[2]]


def test_lint_takes_the_model_of_the_environment(cli: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPCLI_MODEL", str(model))
    assert "longest prompt" in cli("labels", "lint", "pets.txt").err


def test_lint_shows_names_safely(cli: Run) -> None:
    Path("odd\x1b[31m.txt").write_text("cat\nzero\u200bwidth\n")
    for options in ([], ["--json"]):
        result = cli("labels", "lint", "odd\x1b[31m.txt", *options)
        assert b"\x1b" not in result.out and "\u200b".encode() not in result.out
    assert json.loads(result.out)[0]["file"] == "odd\x1b[31m.txt"
    assert json.loads(result.out)[0]["label"] == "zero\u200bwidth"


def test_lint_colours_levels_on_a_terminal_only() -> None:
    shown = on_a_terminal("labels", "lint", "labels.txt")
    assert "labels.txt:2: \x1b[33mwarning:\x1b[0m " in shown and "labels.txt:3: \x1b[31merror:\x1b[0m " in shown
    assert on_a_terminal("labels", "lint", "labels.txt", NO_COLOR="1") == FOUND


# labels show


def test_show(cli: Run) -> None:
    result = cli("labels", "show", "pets.txt", "-t", "a {|bad }photo of a <>.")
    assert result.lines == [
        "tabby\ta photo of a tabby.",
        "tabby\ta bad photo of a tabby.",
        "tabby\ta photo of a tiger cat.",
        "tabby\ta bad photo of a tiger cat.",
        "dog\ta photo of a dog.",
        "dog\ta bad photo of a dog.",
        "dog\ta dog that barks",
    ]
    assert (result.code, result.err) == (0, "clipcli: 2 labels, 7 prompts\n")


def test_show_with_tokens(cli: Run, model: Path) -> None:
    from clipcli import load_model

    tokenizer = load_model(model).tokenizer
    for given in (("-m", model), ("--vocabulary", model / "merges.txt")):
        result = cli("labels", "show", "pets.txt", "-t", "simple", "--tokens", *given)
        rows = [line.split("\t") for line in result.lines]
        assert [row[:2] for row in rows] == [
            ["tabby", "a photo of a tabby."],
            ["tabby", "a photo of a tiger cat."],
            ["dog", "a photo of a dog."],
            ["dog", "a dog that barks"],
        ]
        assert [int(row[2]) for row in rows] == [len(ids) for ids in tokenizer([row[1] for row in rows])]
        assert [row[3].split(" ") for row in rows] == [tokenizer.tokens(row[1]) for row in rows]
        assert (
            result.err == f"clipcli: 2 labels, 4 prompts, longest {max(int(row[2]) for row in rows)} tokens, 77 fit\n"
        )


def test_show_tells_what_is_too_long(cli: Run, model: Path) -> None:
    Path("long.txt").write_text(f"cat\n{'x7' * 40}\n")
    result = cli("labels", "show", "long.txt", "-m", model, "-t", "simple")
    assert [line.split("\t")[2] for line in result.lines] == ["10", "89"]
    assert "1 too long: shorten them, or cut them with --truncate" in result.err
    assert [row["fits"] for row in json.loads(cli("labels", "show", "long.txt", "-m", model, "--json").out)[::7]] == [
        True,
        False,
    ]


def test_show_as_json(cli: Run, model: Path) -> None:
    result = cli("labels", "show", "pets.txt", "-t", "2\ta <>", "-L", "dog", "--json")
    assert json.loads(result.out) == [
        {"label": "dog", "prompt": "a dog", "template": "a <>", "weight": 2.0},
        {"label": "dog", "prompt": "a dog that barks", "template": None, "weight": 1.0},
    ]
    first, *_ = json.loads(cli("labels", "show", "pets.txt", "-t", "<>", "-m", model, "--tokens", "--json").out)
    assert first["tokens"] == len(first["pieces"]) + 2 and first["fits"]


def test_show_on_a_terminal(model: Path) -> None:
    shown = on_a_terminal("labels", "show", "pets.txt", "-t", "2\ta <>", "--color", "never")
    assert shown == "tabby\n  2 × a tabby\n  2 × a tiger cat\ndog\n  2 × a dog\n  :: a dog that barks\n"
    Path("long.txt").write_text(f"cat\n{'x7' * 40}\n")
    shown = on_a_terminal("labels", "show", "long.txt", "-t", "<>", "-m", str(model))
    assert shown == f"\x1b[1mcat\x1b[0m\n   3  cat\n\x1b[1m{'x7' * 40}\x1b[0m\n\x1b[31m  82!\x1b[0m {'x7' * 40}\n"


def test_backslashes_are_escaped_as_in_rows(cli: Run) -> None:
    Path("back.txt").write_text("a\\\\b\ncat\n")
    assert cli("labels", "show", "back.txt", "-t", "<>").lines[0] == r"a\\b" + "\t" + r"a\\b"


def test_many_prompts_and_a_reader_that_has_seen_enough() -> None:
    Path("many.txt").write_text("".join(f"thing {i} of many\n" for i in range(2000)))
    run = subprocess.run(
        f"({sys.executable} -m clipcli labels show many.txt -t imagenet80; echo $? >&2) | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (run.stdout, run.stderr) == ("thing 0 of many\ta photo of a thing 0 of many.\n", "0\n")


# templates


def test_list(cli: Run) -> None:
    result = cli("templates", "list")
    rows = [line.split("\t") for line in result.lines]
    assert [row[0] for row in rows] == sorted({path.stem for path in (ROOT / "prompts").glob("*.txt")} - {"neutral"})
    assert ["pets", "1", "shipped", "breeds of cats and dogs"] in rows
    assert all(int(row[1]) == len(templates.read([row[0]])) and row[3] for row in rows)
    assert (result.code, result.err) == (0, "")


def test_list_with_sets_of_ones_own(cli: Run, home: Path) -> None:
    pets = own(home, "pets", "# my\tpets\na <>\nthe <>\n")
    broken = own(home, "broken", "# half done\na cat\n")
    bare = own(home, "bare", "a <>\n")
    result = cli("templates", "list")
    rows = [line.split("\t") for line in result.lines]
    for row in (["pets", "2", str(pets), "my pets"], ["broken", "?", str(broken), ""], ["bare", "1", str(bare), ""]):
        assert row in rows
    assert result.err == f'clipcli: {broken}:2: template "a cat" has no place for the label\n'
    sets = {one["name"]: one for one in json.loads(cli("templates", "list", "--json").out)}
    assert sets["pets"] == {"name": "pets", "templates": 2, "own": True, "file": str(pets), "purpose": "my\tpets"}
    assert sets["broken"]["templates"] is None
    assert sets["simple"]["own"] is False and Path(sets["simple"]["file"]).is_file()


def test_list_on_a_terminal() -> None:
    shown = on_a_terminal("templates", "list", "--color", "never")
    lines = shown.splitlines()
    assert lines[0].split() == ["set", "templates", "from", "for"]
    assert any(line.split()[:4] == ["imagenet80", "80", "shipped", "everyday"] for line in lines)
    assert "\x1b" not in shown and max(map(len, lines)) <= 80
    assert "\x1b[1mpets" in on_a_terminal("templates", "list")


def test_show_templates(cli: Run) -> None:
    result = cli("templates", "show", "pets", "a {good|bad} <>", "2.5\tthe {label}")
    assert (result.code, result.err) == (0, "")
    assert result.lines == ["a photo of a <>, a type of pet.", "a good <>", "a bad <>", "2.5\tthe <>"]
    assert json.loads(cli("templates", "show", "2\ta <>", "--json").out) == [{"text": "a <>", "weight": 2.0}]


def test_what_show_prints_is_a_template_file_again(cli: Run) -> None:
    Path("mine.txt").write_text("# mine\n3\ta {|nice }<>. # thrice\n0.123456789\tthe <>\n")
    Path("again.txt").write_bytes(cli("templates", "show", "mine.txt", "imagenet80").out)
    assert templates.read(["again.txt"]) == templates.read(["mine.txt", "imagenet80"])


def test_show_templates_filled(cli: Run) -> None:
    result = cli("templates", "show", "2\ta <>", "the <>", "--label", "tabby | cat :: a pet")
    assert result.lines == ["2\ta tabby", "the tabby", "2\ta cat", "the cat", "a pet"]


# Bad input, and what is imported


@pytest.mark.parametrize(
    ("args", "code", "error", "hint"),
    [
        (["labels", "lint", "nowhere.txt"], 2, "nowhere.txt: no such file or directory", "check the path"),
        (["labels", "lint", "."], 2, ".: is a directory", "check the path"),
        (["labels", "lint", "pets.txt", "-t", "pest"], 2, 'no template set "pest"', 'did you mean "pets"?'),
        (["labels", "lint", "pets.txt", "--vocabulary", "no.txt"], 2, "no.txt: no such file or directory", "take"),
        (["labels", "lint", "pets.txt", "-m", "./nowhere"], 1, "nowhere", ""),
        (["labels", "lint"], 2, "missing argument 'FILE'", "see clipcli labels lint --help"),
        (["labels", "lint", "pets.txt", "--similar", "2"], 2, "invalid value for '--similar'", ""),
        (["labels", "show", "labels.txt"], 2, 'labels.txt:3: label "cat" stands twice', "give one of them"),
        (["labels", "show", "pets.txt", "--label", "tabyb"], 2, 'pets.txt: no label "tabyb"', 'did you mean "tabby"?'),
        (["labels", "show", "pets.txt", "--tokens"], 2, "--tokens needs a vocabulary", "name a model with -m"),
        (["labels", "shwo", "pets.txt"], 2, "no such command 'shwo'", "did you mean show?"),
        (["templates", "show"], 2, "missing argument 'SET'", "see clipcli templates show --help"),
        (["templates", "show", "imagenet70"], 2, 'no template set "imagenet70"', 'did you mean "imagenet7"'),
        (["templates", "show", "a photo"], 2, '--templates: template "a photo" has no place', "write <>"),
        (["templates", "show", "pets", "--label", "|"], 2, "--label: empty alias", "write something there"),
    ],
)
def test_bad_input(cli: Run, args: list[str], code: int, error: str, hint: str) -> None:
    result = cli(*args)
    lines = result.err.splitlines()
    assert (result.code, result.out) == (code, b""), result.err
    assert len(lines) == 2 and lines[0].startswith("clipcli: ") and error in lines[0]
    assert lines[1].startswith("hint: ") and hint in lines[1]


def test_a_full_disk() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    for command in (["labels", "show", "pets.txt"], ["templates", "list", "--json"]):
        with Path("/dev/full").open("wb") as full:
            run = subprocess.run(
                [sys.executable, "-m", "clipcli", *command],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
        assert run.stderr.splitlines()[0] == "clipcli: stdout: can't be written: no space left on device"
        assert "Traceback" not in run.stderr and run.returncode == 1


def test_help_imports_nothing_heavy() -> None:
    groups = (["labels"], ["labels", "lint"], ["labels", "show"], ["templates"], ["templates", "list"])
    assert not _modules(*([*group, "--help"] for group in groups), ["templates", "show", "--help"]) & set(HEAVY)


def test_no_torch_unless_labels_are_compared(model: Path) -> None:
    light = _modules(["labels", "lint", "pets.txt"], ["templates", "list"], ["templates", "show", "pets"])
    assert not light & {"torch", "numpy", "safetensors", "PIL", "sqlite3", "huggingface_hub"}
    lint = ["labels", "lint", "pets.txt", "-m", model]
    assert "torch" not in _modules([*lint, "--similar", 1], ["labels", "show", "pets.txt", "-m", model, "--tokens"])
    assert "torch" in _modules(lint)


def _modules(*commands: list[object]) -> set[str]:
    """The modules that are imported when these commands have run."""
    folder = os.getcwd()
    runs = "; ".join(f"run({[str(arg) for arg in args]!r})" for args in commands)
    code = f"import os; os.chdir({folder!r}); sys.stdout = sys.stderr = open({os.devnull!r}, 'w')"
    code += f"; from clipcli.cli.main import run; {runs}; sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__"
    return modules_after(code)


def test_help_ends_with_examples(cli: Run) -> None:
    for command in (["labels", "lint"], ["labels", "show"], ["templates", "list"], ["templates", "show"]):
        assert cli(command[0], "--help").out.decode().partition("Examples")[2].count(f"clipcli {command[0]} ") >= 3
        examples = cli(*command, "--help").out.decode().partition("Examples")[2]
        assert examples.count(f"clipcli {' '.join(command)}") >= 3
