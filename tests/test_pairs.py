"""What `train` is given: class folders, tables and archives, the words of a label file, and what is wrong in them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from clipcli.errors import LabelError, UsageError
from clipcli.records import Failure, FailureKind, Label, Source
from clipcli.tasks.pairs import Pair, at_most, read_pairs, shards
from clipcli.zeroshot import labels

PICTURE = b"\xff\xd8\xff picture"
Rows = list[Pair | Failure]


def read(*data: Path | str, words: Mapping[str, Label] | None = None) -> tuple[list[Pair], list[Failure]]:
    rows = list(read_pairs([str(path) for path in data], words))
    return [row for row in rows if isinstance(row, Pair)], [row for row in rows if isinstance(row, Failure)]


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PICTURE)
    return folder


def shard(path: Path, files: Mapping[str, bytes | str]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, data in files.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def told(failures: list[Failure], folder: Path) -> list[tuple[str, str, str]]:
    """What a person reads, without the folder of this test."""
    texts = [(failure.path, failure.kind.value, failure.message) for failure in failures]
    return [tuple(text.replace(f"{folder}/", "") for text in row) for row in texts]  # type: ignore[misc]


# Class folders


def test_class_folders(tmp_path: Path) -> None:
    write(tmp_path, "golden_retriever/1.jpg", "cat/2.png", "cat/deep/3.jpg", ".hidden/4.jpg", "cat/.5.jpg")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "README").write_text("neither")
    (tmp_path / "link").symlink_to(tmp_path / "cat" / "deep")
    pairs, failures = read(tmp_path)
    assert not failures
    assert pairs[0] == Pair(Source(str(tmp_path / "cat" / "2.png")), ("cat",), (), "cat")
    assert [(pair.source.path.removeprefix(f"{tmp_path}/"), pair.label) for pair in pairs[1:]] == [
        ("cat/deep/3.jpg", "cat"),
        ("golden_retriever/1.jpg", "golden retriever"),
        ("link/3.jpg", "link"),
    ]
    assert pairs[0].phrases is pairs[1].phrases  # shared, not a copy each


def test_pictures_without_a_class_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.jpg", "stray.JPG")
    with pytest.raises(UsageError, match=r"stray\.JPG: lies in no class folder") as caught:
        shards([str(tmp_path)])
    assert caught.value.hint and "a folder's name is its pictures' class" in caught.value.hint
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(UsageError) as caught:
        shards([str(tmp_path)])
    assert caught.value.hint == f"give {tmp_path}/metadata.csv instead"


def test_a_class_needs_a_name_in_utf_8(tmp_path: Path) -> None:
    write(tmp_path, "caf\udce9/1.jpg")
    with pytest.raises(LabelError, match=r"half of a character U\+DCE9 in class"):
        read(tmp_path)


def test_a_folder_of_archives_is_its_archives(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar.gz", ".c.tar"):
        shard(tmp_path / name, {"1.jpg": PICTURE, "1.txt": f"of {name}"})
    assert shards([str(tmp_path)]) == [f"{tmp_path}/a.tar.gz", f"{tmp_path}/b.tar"]
    assert [pair.phrases for pair in read(tmp_path)[0]] == [("of a.tar.gz",), ("of b.tar",)]
    write(tmp_path, "cat/1.jpg")
    with pytest.raises(UsageError, match="both class folders and archives in it"):
        shards([str(tmp_path)])


def test_what_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("cat")
    with pytest.raises(UsageError, match="empty: neither class folders nor archives in it"):
        shards([str(tmp_path / "empty")])
    for name in (str(tmp_path / "notes.txt"), "-"):
        with pytest.raises(UsageError, match="no kind of training data by its name"):
            shards([name])
    with pytest.raises(UsageError, match="no such file or folder"):
        shards([str(tmp_path / "none.tar")])
    assert shards([]) == []


# Words


def test_words_of_a_label_file(tmp_path: Path) -> None:
    (tmp_path / "words.csv").write_text(
        "label,aliases,group\n"
        "tabby,tabby cat|tabby|tabby cat,cat| animal |\n"
        "n02099712,Labrador_retriever|labrador,dog\n"
        "tub,,\n"
    )
    words = {label.name: label for label in labels.read(str(tmp_path / "words.csv"))}
    names = ("Tabby_Cat", "TABBY", "labrador", "labrador retriever", "n02099712", "tub", "hot_tub", "LABRADOR")
    write(tmp_path / "in", *(f"{name}/1.jpg" for name in names))
    pairs = {Path(pair.source.path).parts[-2]: pair for pair in read(tmp_path / "in", words=words)[0]}
    tabby, dog = (
        (("tabby", "tabby cat"), ("cat", "animal"), "tabby"),
        (("Labrador_retriever", "labrador"), ("dog",), "n02099712"),
    )
    assert {name: (pair.phrases, pair.broader, pair.label) for name, pair in pairs.items()} == {
        "Tabby_Cat": tabby,
        "TABBY": tabby,
        "labrador": dog,
        "LABRADOR": dog,
        "labrador retriever": dog,
        "n02099712": dog,
        "tub": (("tub",), (), "tub"),
        "hot_tub": (("hot tub",), (), "hot tub"),
    }


def test_a_name_wins_over_another_label_s_alias(tmp_path: Path) -> None:
    words = {label.name: label for label in labels.from_names(["lion = cat | lion", "cat | tabby", "tiger = cat"])}
    write(tmp_path, "Cat/1.jpg")
    assert [pair.label for pair in read(tmp_path, words=words)[0]] == ["cat"]


def test_synonyms_in_a_class_name(tmp_path: Path) -> None:
    names = {"1": "baluster / handrail", "2": "bow tie,bow-tie, bow_tie", "3": "9/11", "4": " , "}
    files = {
        f"{n}.{ending}": data
        for n, name in names.items()
        for ending, data in (("jpg", PICTURE), ("txt", name), ("cls", n))
    }
    pairs, failures = read(shard(tmp_path / "x.tar", files))
    assert not failures and [(pair.phrases, pair.label) for pair in pairs] == [
        (("baluster", "handrail"), "baluster / handrail"),
        (("bow tie", "bow-tie"), "bow tie,bow-tie, bow tie"),
        (("9/11",), "9/11"),
        ((",",), ","),
    ]


# Archives


def test_samples_of_an_archive(tmp_path: Path) -> None:
    files = {
        "a/1.jpg": b"one", "a/1.txt": "a dog\r\n\n  a\tbrown dog \na dog\n",
        "a/2.cls": "7", "a/2.txt": "\ufeffgoldfish\n", "a/2.PNG": b"two",
        "3.webp": b"three", "3.json": json.dumps({"caption": ["x", "y"], "label": "z", "url": "…"}),
        "4.jpeg": b"four", "4.json": json.dumps({"text": "four words"}),
        "5.jpg": b"five", "5.json": json.dumps({"label": "hot_tub"}),
        "b/1.jpg": b"six", "b/1.seg.png": b"mask", "b/1.txt": "another 1",
        "7.jpg": b"seven", "7.txt": "text first", "7.json": json.dumps({"caption": "not this"}),
    }  # fmt: skip
    for name in ("x.tar", "x.tar.gz"):
        path = shard(tmp_path / name, files)
        pairs, failures = read(path)
        assert not failures and pairs == [
            Pair(Source(f"{path}::a/1.jpg", b"one"), ("a dog", "a brown dog")),
            Pair(Source(f"{path}::a/2.PNG", b"two"), ("goldfish",), (), "goldfish"),
            Pair(Source(f"{path}::3.webp", b"three"), ("x", "y")),
            Pair(Source(f"{path}::4.jpeg", b"four"), ("four words",)),
            Pair(Source(f"{path}::5.jpg", b"five"), ("hot tub",), (), "hot tub"),
            Pair(Source(f"{path}::b/1.jpg", b"six"), ("another 1",)),
            Pair(Source(f"{path}::7.jpg", b"seven"), ("text first",)),
        ]


def test_samples_that_lack_something(tmp_path: Path) -> None:
    files = {
        "0.jpg": b"good", "0.txt": "good",
        "1.txt": "words alone",
        "2.jpg": b"picture alone",
        "3.jpg": b"", "3.cls": "3",
        "4.jpg": b"", "4.txt": b"caf\xe9",
        "5.jpg": b"", "5.json": "[1",
        "6.jpg": b"", "6.json": "[" * 60_000,
        "7.jpg": b"", "7.json": json.dumps({"caption": 5, "label": None}),
        "8.jpg": b"", "8.txt": " \n\n",
        "9.jpg": b"", "9.json": '{"caption": "\\ud83d"}',
        "a.jpg": b"", "a.txt": "x" * (10 << 20),
        "b.jpg": b"good", "b.txt": "good",
    }  # fmt: skip
    pairs, failures = read(shard(tmp_path / "x.tar", files))
    assert [pair.source.data for pair in pairs] == [b"good", b"good"]
    assert told(failures, tmp_path) == [
        ("x.tar::1", "missing", "no picture beside its .txt"),
        ("x.tar::2.jpg", "missing", "no words beside it: the members of a sample follow each other (.jpg, .txt)"),
        ("x.tar::3.jpg", "missing", "its class has a number (.cls), but no name (.txt)"),
        ("x.tar::4.jpg", "missing", "its .txt is not UTF-8"),
        ("x.tar::5.jpg", "missing", "its .json is no JSON object"),
        ("x.tar::6.jpg", "missing", "its .json is no JSON object"),
        ("x.tar::7.jpg", "missing", "no words for it"),
        ("x.tar::8.jpg", "missing", "no words for it"),
        ("x.tar::9.jpg", "missing", "its words are not UTF-8"),
        ("x.tar::a.txt", "too-large", "10485760 bytes are too many"),
    ]


def test_a_cut_archive_invents_no_captions(tmp_path: Path) -> None:
    """Without its .cls, a class's name would pass for a caption: the sample that the damage ends is left out."""
    files = {
        f"{n}.{ending}": data for n in "123" for ending, data in (("jpg", PICTURE), ("txt", "goldfish"), ("cls", "1"))
    }
    path = shard(tmp_path / "x.tar", files)
    path.write_bytes(path.read_bytes()[: 8 * 1024])  # up to the last .cls
    assert len(read(path)[0]) == 3  # cut exactly between two members nobody can tell
    path.write_bytes(path.read_bytes()[: 8 * 1024 - 100])
    pairs, failures = read(path)
    assert [pair.label for pair in pairs] == ["goldfish"] * 2
    assert failures == [Failure(str(path), FailureKind.TRUNCATED, "the archive ends early")]


def test_captions_are_one_clean_line_each(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "x.tar", {"1.jpg": PICTURE, "1.json": json.dumps({"caption": "a\x1b[31m\u2028red\n\x00 hat\x7f"})}
    )
    assert read(path)[0][0].phrases == ("a [31m red hat",)


# Tables


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", "path,caption\n1.jpg,a dog\nsub/2.jpg,\"a cat, a rug\"\n"),
        ("x.csv", "\ufeffID;Filepath;Title\r\n7;1.jpg;a dog\r\n8;sub/2.jpg;a cat, a rug\r\n"),
        ("x.csv", "image\ttext\n1.jpg\ta dog\n\nsub/2.jpg\ta cat, a rug\n"),
        ("x.TSV", "caption\tfile_name\na dog\t1.jpg\na cat, a rug\tsub/2.jpg\n"),
        ("x.jsonl", '{"path": "1.jpg", "caption": "a dog"}\n\n{"file_name": "sub/2.jpg", "text": ["a cat, a rug"]}\n'),
        ("x.ndjson", '{"path": "1.jpg", "caption": "a dog"}\r\n{"path": "sub/2.jpg", "title": "a cat, a rug"}'),
    ],
)  # fmt: skip
def test_tables_of_captions(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path, "1.jpg", "sub/2.jpg")
    (tmp_path / name).write_text(text, newline="")
    assert read(tmp_path / name) == (
        [
            Pair(Source(str(tmp_path / "1.jpg")), ("a dog",)),
            Pair(Source(str(tmp_path / "sub" / "2.jpg")), ("a cat, a rug",)),
        ],
        [],
    )


def test_tables_of_labels(tmp_path: Path) -> None:
    write(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "x.csv").write_text(f"path,label\n1.jpg,hot_tub\n{tmp_path}/2.jpg,cat\n")
    words = {"cat": Label("cat", ("cat", "tabby"), group="animal")}
    assert [(pair.phrases, pair.broader, pair.label) for pair in read(tmp_path / "x.csv", words=words)[0]] == [
        (("hot tub",), (), "hot tub"),
        (("cat", "tabby"), ("animal",), "cat"),
    ]


def test_relative_paths_are_relative_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in", "1.jpg")
    (tmp_path / "in" / "x.csv").write_text("path,caption\n1.jpg,a dog\n")
    monkeypatch.chdir(tmp_path)
    assert [pair.source.path for pair in read("in/x.csv")[0]] == ["in/1.jpg"]
    monkeypatch.chdir(tmp_path / "in")
    assert [pair.source.path for pair in read("x.csv")[0]] == ["1.jpg"]


def test_bad_rows_are_told_by_line_and_the_others_read(tmp_path: Path) -> None:
    write(tmp_path, "1.jpg", "9.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "x.csv").write_bytes(
        b'path,caption\n1.jpg,"one\nline"\nnone.jpg,x\nfolder.jpg,x\n'
        b"1.jpg\n,x\n1.jpg,a,b\n1.jpg,caf\xe9\n1.jpg, \n9.jpg,nine\n"
    )
    pairs, failures = read(tmp_path / "x.csv")
    assert [pair.phrases for pair in pairs] == [("one line",), ("nine",)]
    assert told(failures, tmp_path) == [
        ("none.jpg", "missing", "no such file (x.csv:4)"),
        ("folder.jpg", "unreadable", "a folder, not a file (x.csv:5)"),
        ("1.jpg", "missing", "no words for it (x.csv:6)"),
        ("x.csv:7", "missing", "no path of a picture"),
        ("x.csv:8", "corrupt", "3 cells, but 2 columns: a cell with ',' in it needs quotes"),
        ("1.jpg", "missing", "its words are not UTF-8 (x.csv:9)"),
        ("1.jpg", "missing", "no words for it (x.csv:10)"),
    ]


def test_bad_lines_of_json(tmp_path: Path) -> None:
    write(tmp_path, "1.jpg")
    lines = [
        "{",
        '["1.jpg"]',
        "[" * 100_000,
        '{"caption": "x"}',
        '{"path": "1.jpg"}',
        '{"path": "a\\u0000", "caption": "x"}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, '{"path": "1.jpg", "caption": "good"}']))
    pairs, failures = read(tmp_path / "x.jsonl")
    assert [pair.phrases for pair in pairs] == [("good",)]
    none = "no JSON object with path and caption"
    assert told(failures, tmp_path) == [
        ("x.jsonl:1", "corrupt", none),
        ("x.jsonl:2", "corrupt", none),
        ("x.jsonl:3", "corrupt", none),
        ("x.jsonl:4", "missing", "no path of a picture"),
        ("1.jpg", "missing", "no words for it (x.jsonl:5)"),
        ("a\0", "missing", "no file can have this name: it holds a NUL byte (x.jsonl:6)"),
    ]


def test_an_archive_is_no_picture(tmp_path: Path) -> None:
    """Not even its first one; a member of it is."""
    shard(tmp_path / "two.tar", {"1.jpg": PICTURE, "2.jpg": PICTURE})
    shard(tmp_path / "none.tar", {"1.txt": "words"})
    (tmp_path / "x.csv").write_text("path,caption\ntwo.tar,both\nnone.tar,none\ntwo.tar::2.jpg,the second\n")
    pairs, failures = read(tmp_path / "x.csv")
    assert [(pair.source.path, pair.phrases) for pair in pairs] == [(f"{tmp_path}/two.tar::2.jpg", ("the second",))]
    assert told(failures, tmp_path) == [
        ("two.tar", "not-a-picture", "an archive, not a picture (x.csv:2)"),
        ("none.tar", "not-a-picture", "an archive, not a picture (x.csv:3)"),
    ]


def test_a_table_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.csv")
    with pytest.raises(UsageError, match=r"x\.csv: is no file"):
        read(tmp_path / "x.csv")


def test_a_line_without_an_end_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipcli.tasks.pairs.LONGEST", 1000)
    write(tmp_path, "1.jpg")
    (tmp_path / "x.jsonl").write_text("x" * 2500 + '\n{"path": "1.jpg", "caption": "good"}\n')
    pairs, failures = read(tmp_path / "x.jsonl")
    assert (len(pairs), len(failures)) == (1, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"x\.csv:1: no line that names the columns"),
        (b"1.jpg,a dog\n", r"x\.csv:1: no line that names the columns"),
        (b"path,words\n", r"x\.csv:1: no line that names the columns"),
        (bytes(range(256)) * 900, r"x\.csv:1: no line that names the columns"),
        (b'path,caption\n1.jpg,x\n1.jpg,"a" dog\n', r"x\.csv:3: bad CSV"),
        (b'path,caption\n1.jpg,x\n1.jpg,"never ends\n', r"x\.csv:3: bad CSV"),
        (b'path,caption\n1.jpg,x\n1.jpg,"' + b"never\n" * 40_000, r"x\.csv:\d+: bad CSV: field larger"),
    ],
)
def test_what_is_no_table(tmp_path: Path, data: bytes, message: str) -> None:
    write(tmp_path, "1.jpg")
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read(tmp_path / "x.csv")


def test_a_picture_whose_name_is_no_utf_8(tmp_path: Path) -> None:
    write(tmp_path, "caf\udce9.jpg")
    (tmp_path / "x.csv").write_bytes(b"path,caption\ncaf\xe9.jpg,coffee\n")
    assert [pair.source.path for pair in read(tmp_path / "x.csv")[0]] == [str(tmp_path / "caf\udce9.jpg")]


# All together


def test_shards_are_read_in_the_given_order_and_each_by_itself(tmp_path: Path) -> None:
    write(tmp_path / "tree", "cat/1.jpg", "dog/2.jpg")
    (tmp_path / "x.csv").write_text("path,caption\ntree/cat/1.jpg,mine\n")
    shard(tmp_path / "x.tar", {"1.jpg": PICTURE, "1.txt": "in a tar"})
    data = [str(tmp_path / name) for name in ("x.tar", "tree", "x.csv")]
    assert shards(data) == data
    whole = list(read_pairs(data))
    assert whole == [pair for one in data for pair in read_pairs([one])] and len(whole) == 4


def test_real_pictures(pictures: Path) -> None:
    pairs, failures = read(pictures / "flickr8k-captions-dev.tar", pictures / "cifar10-test-dev.tar.gz")
    assert not failures and len(pairs) == 1200
    assert all(pair.source.data and pair.source.data[:3] == b"\xff\xd8\xff" for pair in pairs)
    assert all(pair.label is None and 1 <= len(pair.phrases) <= 5 for pair in pairs[:600])
    assert set(Counter(pair.label for pair in pairs[600:]).values()) == {60}


def test_real_classes(pictures: Path) -> None:
    names = json.loads((pictures / "classes.json").read_text())["datasets"]["tiny-imagenet"]["names"]
    words = {
        label.name: label for label in labels.from_names(["sea slug = nudibranch | sea slug", "goldfish | gold fish"])
    }
    pairs, failures = read(pictures / "tiny-imagenet-val-dev.tar.gz", words=words)
    found = {pair.label: pair.phrases for pair in pairs}
    assert not failures and len(pairs) == 4000 and set(found) == set(names)
    assert found["goldfish"] == ("goldfish", "gold fish")


# Balance


def test_at_most() -> None:
    indices = {"cat": list(range(0, 1000, 2)), "dog": list(range(1, 100, 2)), "fox": [2001]}
    kept = at_most(indices, 100, 0)
    assert kept == sorted(set(kept)) and len(kept) == 100 + 50 + 1
    assert set(indices["dog"]) | {2001} < set(kept)
    assert kept == at_most(dict(reversed(indices.items())), 100, 0) != at_most(indices, 100, 1)
    assert [i for i in kept if i in indices["cat"]] == at_most({"cat": indices["cat"]}, 100, 0)
    assert at_most({}, 5, 0) == []


def test_at_most_takes_each_as_often() -> None:
    counts = Counter(index for seed in range(2000) for index in at_most({"cat": range(10)}, 3, seed))
    assert min(counts.values()) > 500 and max(counts.values()) < 700  # 600 are expected, give or take 21
