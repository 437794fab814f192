"""Settings: which of option, environment and files wins, and that a file with a mistake in it is never half obeyed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conftest import Run
from test_house import modules_after

from clipcli import settings
from clipcli.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and no variables of ours."""
    for name in [name for name in os.environ if name.startswith("CLIPCLI_")]:
        if name not in ("CLIPCLI_CACHE_DIR", "CLIPCLI_CONFIG_DIR"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def config(home: Path) -> Path:
    """The user's own settings file, to be written."""
    (home / "config").mkdir()
    return home / "config" / "config.toml"


def effective(cli: Run, name: str) -> tuple[object, str]:
    """Value and source of a setting, as doctor tells them."""
    report = json.loads(cli("doctor", "--json").out)
    return next((one["value"], one["source"]) for one in report["settings"] if one["name"] == name)


def write(text: str, path: Path = settings.LOCAL) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---- who wins


def test_each_source_beats_those_after_it(
    cli: Run, folder: Path, config: Path, photos: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batch_size(*typed: str) -> str:
        result = cli("classify", photos / "rocket.jpg", "-L", "cat", "-L", "dog", "-m", model, "-v", *typed)
        assert result.code == 0, result.err
        return next(line for line in result.err.splitlines() if line.startswith("batch size")).split(",")[0]

    built_in = batch_size()
    write("batch-size = 3", config)
    assert batch_size() == "batch size 3" != built_in
    assert effective(cli, "batch-size") == (3, f"{config}:1")
    write("\nbatch_size = 4")
    assert batch_size() == "batch size 4"
    assert effective(cli, "batch-size") == (4, "clipcli.toml:2")
    monkeypatch.setenv("CLIPCLI_BATCH_SIZE", "5")
    assert batch_size() == "batch size 5"
    assert effective(cli, "batch-size") == ("5", "environment CLIPCLI_BATCH_SIZE")
    assert batch_size("-b", "6") == "batch size 6"


def test_an_option_of_doctor_is_a_source(cli: Run, folder: Path, model: Path) -> None:
    write('model = "elsewhere"')
    report = json.loads(cli("doctor", "-m", model, "--json").out)
    found = [one for one in report["settings"] if one["name"] == "model"]
    assert found == [{"name": "model", "value": str(model), "source": "option"}]


def test_a_table_is_for_one_command_and_beats_what_all_share(cli: Run, folder: Path) -> None:
    write('templates = "simple"\n[classify]\ntemplates = ["pets", "food"]\n')
    assert effective(cli, "classify.templates") == (["pets", "food"], "clipcli.toml:3")
    assert effective(cli, "build-classifier.templates") == (["simple"], "clipcli.toml:1")


def test_what_all_share_here_beats_a_table_of_the_users_file(cli: Run, folder: Path, config: Path) -> None:
    write("[classify]\nworkers = 2", config)
    write("workers = 3")
    assert effective(cli, "workers") == (3, "clipcli.toml:1")


def test_a_value_goes_to_the_commands_that_take_it(folder: Path) -> None:
    import typer

    from clipcli.cli import defaults

    app = typer.Typer()

    @app.command()
    def one(form: int = 1) -> None: ...

    @app.command()
    def two(form: str = "x") -> None: ...

    @app.command()
    def three() -> None: ...

    write('form = "csv"')
    assert defaults.default_map(typer.main.get_command(app)) == {"one": {}, "two": {"form": "csv"}, "three": {}}


def test_defaults_reach_a_run(cli: Run, folder: Path, photos: Path, model: Path) -> None:
    write('["classify"]\nlabels = "labels.txt"\nformat = "csv"\nquiet = true\ntemplates = "simple"\n')
    (folder / "labels.txt").write_text("cat\ndog\n")
    result = cli("classify", photos / "rocket.jpg", "-m", model)
    assert (result.code, result.err) == (0, "")
    assert result.lines[0].startswith("path,label,score")


def test_typed_words_replace_those_of_a_file(cli: Run, folder: Path, photos: Path, model: Path) -> None:
    write('labels = "labels.txt"')
    (folder / "labels.txt").write_text("cat\ndog\n")
    run = ("classify", photos / "rocket.jpg", "-m", model, "-f", "jsonl")

    def labels(*typed: object) -> set[str]:
        result = cli(*run, *typed)
        assert result.code == 0, result.err
        return {entry["label"] for entry in result.rows[0]["top"]}

    assert labels() == {"cat", "dog"}
    assert labels("-L", "moon", "-L", "sun") == {"moon", "sun"}
    (folder / "prompts.json").write_text('{"sea": ["waves"], "land": ["hills"]}')
    assert labels("--prompts", "prompts.json") == {"sea", "land"}
    assert cli("build-classifier", "-m", model, "-L", "moon", "-L", "sun", "-o", "my.safetensors").code == 0
    assert labels("-c", "my.safetensors") == {"moon", "sun"}
    assert cli(*run, "-l", "labels.txt", "-c", "my.safetensors").code == 2  # both typed: still a contradiction


def test_a_variable_turns_a_flag_of_a_file_off(cli: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("no-cache = true")
    assert effective(cli, "no-cache") == (True, "clipcli.toml:1")
    monkeypatch.setenv("CLIPCLI_NO_CACHE", "0")
    assert effective(cli, "no-cache") == ("0", "environment CLIPCLI_NO_CACHE")


def test_help_shows_the_default_that_counts(cli: Run, folder: Path) -> None:
    write('device = "cpu"')
    assert "[default: cpu]" in cli("classify", "--help").out.decode()


# ---- paths


def test_paths_beside_the_users_file_are_found_from_anywhere(
    cli: Run, folder: Path, config: Path, photos: Path
) -> None:
    tiny.save(config.parent / "models" / "mine")
    (config.parent / "labels.json").write_text('{"pets": ["cat", "dog"]}')
    write('model = "models/mine"\nlabels = "labels.json#pets"\ntemplates = ["simple", "my.txt"]', config)
    (config.parent / "my.txt").write_text("my <>.\n")
    assert effective(cli, "model")[0] == str(config.parent / "models" / "mine")
    assert effective(cli, "templates")[0] == ["simple", str(config.parent / "my.txt")]
    assert cli("classify", photos / "rocket.jpg").code == 0


def test_a_path_that_is_not_there_stays_as_it_is_written(cli: Run, folder: Path, config: Path) -> None:
    write('model = "ViT-B-32"', config)
    assert effective(cli, "model")[0] == "ViT-B-32"


def test_a_tilde_is_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "me"))
    file = settings.read(write(""))
    assert file is not None
    assert file.at_home("model", "~/m") == str(folder / "me" / "m")
    assert file.at_home("templates", ["~/t.txt", "simple"]) == [str(folder / "me" / "t.txt"), "simple"]
    assert file.at_home("unknown_label", "~/m") == "~/m"


def test_what_is_no_path_is_not_taken_for_one(folder: Path, config: Path) -> None:
    (config.parent / "auto").write_text("")
    file = settings.read(write('device = "auto"', config))
    assert file is not None and file.at_home("device", "auto") == "auto"


# ---- mistakes

MISTAKES = {
    'modle = "x"': ("1: clipcli has no option modle", "did you mean model?"),
    "\n# note\nworkers = 0": ("3: workers: 0 is not in the range 1<=x<=1024", "see clipcli classify --help"),
    'workers = "many"': ("1: workers: 'many' is no whole number", "see clipcli"),
    "workers = true": ("1: workers takes a value, not true or false", "see clipcli"),
    "workers = 2.5": ("1: workers: '2.5' is no whole number", "see clipcli"),
    'format = "jsonll"': ("1: format: 'jsonll' is not one of", "did you mean jsonl?"),
    "model = 3": ("1: model takes text", 'write "3"'),
    "templates = [1]": ("1: templates takes text", 'write "1"'),
    'device = ["cpu"]': ("1: device takes one value, not a list", "brackets"),
    'no-cache = "yes"': ("1: no-cache takes true or false", "see clipcli"),
    'output = "x.csv"': ("1: output can't be set in a file: it lets a run write or delete", "typed"),
    "force = true": ("1: force can't be set in a file", "typed"),
    "[classify]\n'force' = true": ("2: force can't be set in a file", "typed"),
    "[cache.clear]\nyes = true": ("1: cache can't be set in a file", "typed"),
    '[clasify]\nmodel = "x"': ("1: there is no command clasify", "did you mean classify?"),
    "[classify.deep]\nx = 1": ("1: there is no command classify deep", "--help"),
    "[classify]\nworkers = 2\n[build-classifier]\n\nmin-score = 1": (
        "5: build-classifier has no option min-score",
        "see clipcli build-classifier --help",
    ),
    "classify = 3": ("1: clipcli has no option classify", "did you mean"),
    'inputs = ["a.jpg"]': ("1: clipcli has no option inputs", "see"),
    "help = true": ("1: clipcli has no option help", "see"),
    "workers = 1\nmodel = ": ("2: bad TOML: ", "ends too early"),
    'model = "a': ("1: bad TOML: ", "hint"),
    "model = [[[": ("1: bad TOML: ", "hint"),
    "model = " + "[" * 100_000: (": bad TOML: nested too deep", "brackets"),
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text[:30])
def test_a_mistake_is_one_line_with_its_place(cli: Run, folder: Path, text: str) -> None:
    message, hint = MISTAKES[text]
    write(text)
    result = cli("classify", "a.jpg")
    lines = result.err.splitlines()
    assert (result.code, result.out, len(lines)) == (2, b"", 2), result.err
    assert lines[0].startswith(f"clipcli: clipcli.toml{'' if message.startswith(':') else ':'}{message}")
    assert lines[1].startswith("hint: ") and hint in lines[1]
    assert not lines[0].endswith(".")


def test_bytes_that_are_no_text(cli: Run, folder: Path) -> None:
    Path("clipcli.toml").write_bytes(b'model = "a"\nlabels = "caf\xe9"\n')
    assert cli("classify", "a.jpg").err.startswith("clipcli: clipcli.toml:2: not UTF-8\nhint: ")


def test_windows_line_ends_and_a_byte_order_mark(cli: Run, folder: Path) -> None:
    Path("clipcli.toml").write_bytes(b'\xef\xbb\xbfdevice = "cpu"\r\nworkers = 2\r\n')
    assert effective(cli, "workers") == (2, "clipcli.toml:2")


def test_a_file_without_end(folder: Path) -> None:
    write("#" * (settings.MOST_BYTES + 1))
    with pytest.raises(UsageError, match="too large"):
        settings.read(settings.LOCAL)


def test_a_folder_of_that_name_is_no_settings_file(folder: Path) -> None:
    settings.LOCAL.mkdir()
    assert settings.read(settings.LOCAL) is None


def test_control_characters_of_a_file_do_not_reach_the_terminal(cli: Run, folder: Path) -> None:
    write('"a\\u001b[31m" = 1')
    result = cli("classify", "a.jpg")
    assert "\x1b" not in result.err and "\\x1b[31m" in result.err


@pytest.mark.parametrize("args", [["--help"], ["classify", "--help"], ["classify", "-h"], ["--version"], []], ids=str)
def test_help_works_beside_a_broken_file(cli: Run, folder: Path, args: list[str]) -> None:
    write("model = ")
    result = cli(*args)
    assert result.code == (0 if args else 2) and "bad TOML" not in result.err
    assert result.out


def test_commands_never_write_where_a_found_file_says(cli: Run, folder: Path, photos: Path, model: Path) -> None:
    (folder / "precious.txt").write_text("mine")
    write('output = "precious.txt"\nforce = true\n')
    assert cli("classify", photos / "rocket.jpg", "-L", "cat", "-L", "dog", "-m", model).code == 2
    assert (folder / "precious.txt").read_text() == "mine"


def test_without_a_file_nothing_is_imported_for_it(folder: Path) -> None:
    script = "import sys; from clipcli.cli.main import run; run(['classify', 'nowhere.jpg', '-L', 'a', '-L', 'b'])"
    loaded = subprocess.run(
        [sys.executable, "-c", f"{script}; print('tomllib' in sys.modules)"],
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    assert loaded.stdout.strip() == "False"
    assert "tomllib" not in modules_after("import clipcli.settings")


def test_sub_commands_have_tables_of_their_own(cli: Run, folder: Path) -> None:
    plain = cli("models", "list").out
    write("[models.list]\njson = true\n")
    assert json.loads(cli("models", "list").out)
    assert not plain.startswith(b"[")
    assert effective(cli, "models.list.json") == (True, "clipcli.toml:2")


def test_no_option_that_writes_may_be_set_in_a_file() -> None:
    """A guard for options to come: what its help calls writing belongs into settings.TYPED_ONLY."""
    import typer

    from clipcli.cli import defaults
    from clipcli.cli.main import application

    helps = [
        f"{' '.join(address)} --{name}: {option.help}"
        for address, command in defaults._commands(typer.main.get_command(application())).items()
        for name, option in defaults._options(command).items()
    ]
    assert len(helps) > 40
    assert [text for text in helps if re.search(r": (Write|Save|Replace|Overwrite|Delete|Remove|Move)\b", text)] == []
