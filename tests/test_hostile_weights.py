"""Weight files that are broken, or that mean harm: one clear line each, and nothing of theirs is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcli.errors import ModelError, UnsafeFile
from clipcli.weights.load import load_checkpoint
from clipcli.weights.tensors import read_tensors
from clipcli.weights.torch_files import read as read_torch

MAGIC = 0x1950A86A20F9469CFC6C


def refused(path: Path, kind: type[ModelError] = ModelError) -> ModelError:
    """Open `path`, weights and all, and return the error, which is one line that names the file."""
    with pytest.raises(ModelError) as caught:
        checkpoint = load_checkpoint(path, activation="gelu", head_width=16)
        checkpoint.tower("image")
        checkpoint.tower("text")
    assert type(caught.value) is kind, caught.value
    assert "\n" not in caught.value.message
    assert str(path.parent) in caught.value.message
    return caught.value


@cache
def sample(layout: str, folder: Path) -> bytes:
    return tiny.save(folder / layout, layout).read_bytes()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    folder = tmp_path_factory.mktemp("samples")

    def get(layout: str) -> bytes:
        if layout != "legacy":
            return sample(layout, folder)
        import torch

        file = io.BytesIO()
        arrays = {name: torch.from_numpy(array) for name, array in tiny.weights(tiny.vit()).items()}
        torch.save(arrays, file, _use_new_zipfile_serialization=False)
        return file.getvalue()

    return get


# Broken files


@pytest.mark.parametrize("layout", ["bare", "openai_pt", "torchscript", "legacy"])
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 15, 40, 1000, 0.3, 0.7, 0.99, -1], ids=str)
def test_truncated(tmp_path: Path, samples: Callable[[str], bytes], layout: str, kept: float) -> None:
    whole = samples(layout)
    length = int(len(whole) * kept) if isinstance(kept, float) else kept
    path = tmp_path / "model.pt"
    path.write_bytes(whole[:length])
    error = refused(path)
    assert error.hint
    if length:
        assert "truncated or corrupt" in error.message


@pytest.mark.parametrize("layout", ["bare", "openai_pt", "torchscript", "legacy"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_garbled(
    tmp_path_factory: pytest.TempPathFactory, samples: Callable[[str], bytes], layout: str, data: Any
) -> None:
    """Any byte changed anywhere in what describes the tensors: read, or refused in our own words."""
    garbled = bytearray(samples(layout))
    ends = (0, 4000) if layout != "torchscript" or data.draw(st.booleans()) else (-20000, -1)
    for _ in range(data.draw(st.integers(1, 3))):
        garbled[data.draw(st.integers(*ends))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("garbled") / "model.pt"
    path.write_bytes(garbled)
    try:
        for tensor in read_tensors(path).values():
            if tensor.dtype == "F32":
                assert tensor.read().shape == tensor.shape
    except ModelError as error:
        assert "\n" not in error.message


@pytest.mark.parametrize(
    "content",
    [
        b"<html>404: not found</html>",
        b"cat\ndog\n",
        b"cat\ndog\nrocket\n",
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        b"\xff" * 4096,
    ],
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    error = refused(tmp_path / "model.pt")
    assert error.message.endswith("model.pt: no weight file") and error.hint


@pytest.mark.parametrize("content", [b"", bytes(4096)])
def test_empty_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    assert "truncated or corrupt" in refused(tmp_path / "model.pt").message


def test_a_quantised_part_of_the_attention_weights(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = tiny.save(tmp_path / "model", "transformers") / "model.safetensors"
    arrays = load_file(path)
    name = "text_model.encoder.layers.0.self_attn.k_proj.weight"
    save_file(arrays | {name: arrays[name].astype(np.int8)}, path)
    assert "1 not floating-point: transformer.resblocks.0.attn.in_proj_weight I8" in refused(path.parent).message


def test_numbers_of_a_file_alone_in_lists(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = tiny.save(tmp_path / "model", "bare")
    numbers = {name: np.array([1]) for name in ("input_resolution", "context_length", "vocab_size")}
    save_file(load_file(path) | numbers, path)
    assert "says input_resolution 1, but its tensors are of 32" in refused(path).message


def test_a_classifier_file_is_no_model(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "my.safetensors"
    save_file({"weight": np.eye(2, dtype=np.float32)}, path, metadata={"clipcli": "{}"})
    error = refused(path)
    assert error.message.endswith("this is a classifier file, no model") and error.hint == "give it as --classifier"


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    (folder / "open_clip_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 5\n")
    error = refused(folder)
    assert error.message.endswith("open_clip_model.safetensors: a pointer of Git LFS, not the weights")
    assert error.hint == "fetch them with: git lfs pull"


def safetensors_file(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, '
        b'"b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}',  # overlap
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 9999]}}',
        b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": [24, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [-6], "data_offsets": [0, 24]}}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 24]}}',
        b'{"a": {"dtype": "OBJ", "shape": [6], "data_offsets": [0, 24]}}',
        b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '  # one name twice
        b'"a": {"dtype": "F32", "shape": [6], "data_offsets": [4, 28]}}',
        b'{"a": [6]}',
        b"[]",
        b"\xff\xfe{}",
    ],
)
def test_safetensors_headers_that_lie(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_file(header, bytes(24)))
    with pytest.raises(ModelError, match="truncated or corrupt"):
        read_tensors(path)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for length in (25, 1 << 40, (1 << 64) - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{" + bytes(24))
        with pytest.raises(ModelError, match="truncated or corrupt"):
            read_tensors(path)


# Code


class Evil:
    """Pickled, it says: call this."""

    def __init__(self, canary: Path, by: str = "mkdir") -> None:
        self.canary = canary
        self.by = by

    def __reduce__(self) -> Any:
        if self.by == "exec":
            return exec, (f"import os; os.mkdir({str(self.canary)!r})",)
        return os.mkdir, (str(self.canary),)


def legacy(tree: Any) -> bytes:
    parts = (MAGIC, 1001, {"little_endian": True}, tree, [])
    return b"".join(pickle.dumps(part, 2) for part in parts)


def archive(index: bytes, members: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as zipped:
        zipped.writestr("archive/data.pkl", index)
        for name, content in (members or {}).items():
            zipped.writestr(f"archive/{name}", content)
    return file.getvalue()


@pytest.mark.parametrize("by", ["mkdir", "exec"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("form", ["pickle", "zip", "torchscript", "legacy"])
@pytest.mark.parametrize("place", ["file", "bin"])
def test_code_is_not_executed(tmp_path: Path, form: str, protocol: int, by: str, place: str) -> None:
    canary = tmp_path / "canary"
    evil = {"token_embedding.weight": Evil(canary, by)}
    index = pickle.dumps(evil, protocol)
    content = {
        "pickle": index,
        "zip": archive(index),
        "torchscript": archive(index, {"constants.pkl": index, "code/__torch__.py": b"import os"}),
        "legacy": legacy(evil),
    }[form]
    if place == "file":
        path = tmp_path / "model.pt"
        path.write_bytes(content)
    else:
        path = tiny.save(tmp_path / "model")
        (path / "open_clip_model.safetensors").unlink()
        (path / "open_clip_pytorch_model.bin").write_bytes(content)
    error = refused(path, UnsafeFile)
    assert "could execute code" in error.message and ".safetensors" in str(error.hint)
    assert not canary.exists()
    pickle.loads(index)  # what another program would have done
    assert canary.exists()


def test_an_old_pickle_is_not_executed(tmp_path: Path) -> None:
    """Protocol 0 has no signature: it is taken for a broken safetensors file."""
    canary = tmp_path / "canary"
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Evil(canary), 0))
    refused(tmp_path / "model.pt")
    assert not canary.exists()


@pytest.mark.parametrize(
    "name",
    [
        b"os\nsystem",
        b"builtins\neval",
        b"torch.hub\nload",
        b"torch._utils\n_rebuild_tensor",
        b"torch\nload",
        b"torch\n__loader__.x",
        b"__torch__evil\nx",
        b"clipcli.weights.torch_files\n_view",
        b"collections\nOrderedDict.fromkeys",
        b"copyreg\n_reconstructor",
    ],
)
def test_names_outside_the_list_are_refused(tmp_path: Path, name: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(archive(b"\x80\x02c" + name + b"\n."))
    error = refused(tmp_path / "model.pt", UnsafeFile)
    assert name.replace(b"\n", b".").decode() in error.message


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02}c__torch__\nX\n\x86b.",  # attributes onto what is none
        b"\x80\x02c__torch__\nX\n)R}U\x05itemsK\x01s\x86b.",
        b"\x80\x02ccollections\nOrderedDict\n)R}U\x05itemsK\x01sb.",  # a dict without its method
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # no function
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))tR.",
        b"\x80\x02K\x01Q.",  # an unknown kind of storage
        b"\x80\x02r\xff\xff\xff\x7f.",  # asks for 16 GB
        b"\x80\x02}r\xff\xff\xff\x7f.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01h\x00s.",  # a dict that holds itself
        b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x02L" + b"9" * 5000 + b"L\n.",
        b".",
        b"\x80\x02",
        b"",
    ],
)
def test_pickles_that_make_no_sense(tmp_path: Path, program: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(archive(program))
    refused(tmp_path / "model.pt")


def test_shared_dictionaries_do_not_explode(tmp_path: Path) -> None:
    tree: dict[str, Any] = {}
    for _ in range(60):
        tree = {"a": tree, "b": tree}  # 2 ** 60 ways to the bottom
    (tmp_path / "model.pt").write_bytes(archive(pickle.dumps(tree, 2)))
    assert "token_embedding.weight" in refused(tmp_path / "model.pt").message


# Tensors that don't lie where they say


class Persistent(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, Stored) else None


class Stored:
    def __init__(self, *pid: Any) -> None:
        self.pid = pid


class Rebuilt:
    """Pickled as torch pickles a tensor."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        import torch

        return torch._utils._rebuild_tensor_v2, (*self.arguments, False, OrderedDict())


def index_of(offset: Any, shape: Any, strides: Any, numel: Any = 6, key: Any = "0") -> bytes:
    import torch

    file = io.BytesIO()
    storage = Stored("storage", torch.FloatStorage, key, "cuda:0", numel)
    Persistent(file, 2).dump({"a": Rebuilt(storage, offset, shape, strides)})
    return file.getvalue()


def test_the_forged_form_is_otherwise_right(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(
        archive(index_of(1, (2, 2), (1, 2)), {"data/0": np.arange(6, dtype="<f4").tobytes()})
    )
    np.testing.assert_array_equal(read_torch(tmp_path / "a.pt")["a"].read(), [[1, 3], [2, 4]])


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "numel", "key"),
    [
        (0, (7,), (1,), 6, "0"),
        (0, (7,), (1,), 7, "0"),
        (5, (2,), (1,), 6, "0"),
        (-1, (2,), (1,), 6, "0"),
        (0, (2,), (-1,), 6, "0"),
        (0, (-2,), (1,), 6, "0"),
        (0, (2, 2), (1,), 6, "0"),
        (0, (2,), (6,), 6, "0"),
        (0, (10**9, 10**9), (0, 0), 6, "0"),
        (0, (1 << 62, 4), (1, 1), 6, "0"),
        (1 << 63, (1,), (1,), 6, "0"),
        (0, (2.0,), (1,), 6, "0"),
        ("0", (2,), (1,), 6, "0"),
        (0, (2,), (1,), 6, "1"),
        (0, (2,), (1,), 6, "../data.pkl"),
        (0, (2,), (1,), "6", "0"),
        (0, (2,), (1,), 6, 0),
    ],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_tensors_outside_their_storage(
    tmp_path: Path, offset: Any, shape: Any, strides: Any, numel: Any, key: Any, compression: int
) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(archive(index_of(offset, shape, strides, numel, key), {"data/0": bytes(24)}, compression))
    with pytest.raises(ModelError, match="truncated or corrupt"):
        read_torch(path)["a"].read()


def test_a_legacy_file_whose_storages_end_early(tmp_path: Path, samples: Callable[[str], bytes]) -> None:
    (tmp_path / "model.pt").write_bytes(samples("legacy")[:-4])
    assert "doesn't fit its storage" in refused(tmp_path / "model.pt").message


# Archives


def test_compressed_storages(tmp_path: Path) -> None:
    values = np.arange(6, dtype="<f4")
    path = tmp_path / "a.pt"
    path.write_bytes(archive(index_of(0, (6,), (1,)), {"data/0": values.tobytes()}, zipfile.ZIP_DEFLATED))
    np.testing.assert_array_equal(read_torch(path)["a"].read(), values)


def test_zip_bombs(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    index = index_of(0, (1 << 24,), (1,), 1 << 24)
    path.write_bytes(archive(index, {"data/0": bytes(1 << 26)}, zipfile.ZIP_DEFLATED))
    with pytest.raises(ModelError, match="unpacks to 67,108,864 bytes"):
        read_torch(path)
    path.write_bytes(archive(bytes((1 << 26) + 1), compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(ModelError, match="its index is 67,108,865 bytes long"):
        read_torch(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unusual_compression(tmp_path: Path, compression: int) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(archive(index_of(0, (6,), (1,)), {"data/0": bytes(24)}, compression))
    with pytest.raises(ModelError, match="unusual compression"):
        read_torch(path)


def test_an_encrypted_archive(tmp_path: Path) -> None:
    content = bytearray(archive(index_of(0, (6,), (1,)), {"data/0": bytes(24)}))
    for sign, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag, in both headers
        content[content.index(sign) + place] |= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ModelError, match="truncated or corrupt"):
        read_torch(tmp_path / "a.pt")


def test_zips_that_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("a/photo.jpg", b"x")
    assert "torch didn't write" in refused(path).message
    path.write_bytes(archive(pickle.dumps({}), {"byteorder": b"big"}))
    assert "big-endian" in refused(path).message


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 5, None, [1], "a\0b", "\ud800", "a" * 256],
)
def test_shards_outside_the_folder(tmp_path: Path, name: Any) -> None:
    folder = tiny.save(tmp_path / "model", "transformers")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"logit_scale": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(folder).message
    assert "is not the name of a file beside it" in message and len(message) < 250 + len(str(folder))


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "transformers")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"logit_scale": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "gone.safetensors: can't be read" in refused(folder).message


@pytest.mark.parametrize("stored", [1000, -1000, 9.3, float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_scale_that_makes_no_sense(tmp_path: Path, stored: float) -> None:
    arrays = {**tiny.weights(tiny.vit()), "logit_scale": np.array(stored, np.float32)}
    checkpoint = load_checkpoint(tiny.save(tmp_path / "m", arrays=arrays))
    with pytest.raises(ModelError, match=r"`logit_scale` is [-\w.]+, but the logarithm") as caught:
        _ = checkpoint.logit_scale
    assert str(tmp_path / "m") in caught.value.message and caught.value.hint


# Places


def test_a_folder_that_may_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # for tests that root runs
        assert refused(folder).message == f"{folder}: permission denied"
    folder.chmod(0)
    try:
        if not os.access(folder, os.X_OK):
            assert refused(folder).message == f"{folder}: permission denied"
            assert refused(folder / "open_clip_model.safetensors").message.endswith("permission denied")
    finally:
        folder.chmod(0o700)


def test_a_place_that_is_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "fifo: neither a file nor a folder" in refused(tmp_path / "fifo").message
