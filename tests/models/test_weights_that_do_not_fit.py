"""Every way in which a checkpoint can be broken, or belong to another model, and the lines that say so."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dsc.ir.errors import DscError
from dsc.models.checkpoint import CheckpointFolder, StateDict, Wanted, save_checkpoint

E, I, H = 4, 6, 8  # noqa: E741
EXPERTS = "model.layers.1.mlp.experts"


def arrays() -> dict[str, np.ndarray]:
    """A small model as dsc names it: embedding, one norm, one stack of experts, an integer."""
    values = iter(range(10**6))
    shapes = {"model.embed_tokens.weight": (10, H), "model.layers.0.norm.weight": (H,), "steps": (3,)}
    shapes |= {f"{EXPERTS}.gate_proj": (E, I, H), f"{EXPERTS}.up_proj": (E, I, H), f"{EXPERTS}.down_proj": (E, H, I)}
    dtypes = {"steps": np.int64}
    return {n: np.array([next(values) for _ in range(int(np.prod(s)))], dtypes.get(n, np.float32)).reshape(s) for n, s in shapes.items()}


def wanted() -> dict[str, Wanted]:
    return {n: Wanted(n, "i64" if a.dtype == np.int64 else "f32", a.shape) for n, a in arrays().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards."""
    save_checkpoint(tmp_path / "model", arrays(), {"num_hidden_layers": 2}, shard_bytes=1000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    return tmp_path / "model"


def message(action: Callable[[], object]) -> str:
    with pytest.raises(DscError) as error:
        action()
    return str(error.value)


class TestTheProgramAgainstTheWeights:
    def test_all_offenders_at_once(self, folder: Path) -> None:
        items = wanted()
        del items["model.layers.0.norm.weight"]
        items["model.norm.weight"] = Wanted("model.norm.weight", "bf16", (H,))
        items["model.embed_tokens.weight"] = Wanted("model.embed_tokens.weight", "f32", (11, H))
        items["steps"] = Wanted("steps", "f32", (3,))
        items[f"{EXPERTS}.gate_proj"] = Wanted(f"{EXPERTS}.gate_proj", "f32", (E + 2, I, H))
        items[f"{EXPERTS}.up_proj"] = Wanted(f"{EXPERTS}.up_proj", "f8e4m3", (E, I, H))
        items[f"{EXPERTS}.down_proj"] = Wanted(f"{EXPERTS}.down_proj", "f32", (E - 1, H, I))
        lines = message(lambda: CheckpointFolder(folder).check(list(items.values()))).splitlines()
        first, second, third = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
        assert lines[0] == f"checkpoint {folder}: these weights do not fit the program: 1 misshapen, 5 dtype, 3 missing, 2 extra"
        assert sorted(lines[1:]) == sorted(
            [
                f"  misshapen: model.embed_tokens.weight: expected f32[11, 8], found f32[10, 8] in {first}",
                f"  dtype: steps: expected f32[3], found i64[3] in {first}; cannot be converted",
                f"  missing: {EXPERTS}.{{4..5}}.gate_proj.weight: expected f32[6, 8]",
                f"  dtype: {EXPERTS}.{{0..3}}.up_proj.weight: expected f8e4m3[6, 8], found f32[6, 8] in {second};"
                " weights are not quantised on loading",
                "  missing: model.norm.weight: expected bf16[8]",
                f"  extra: {EXPERTS}.3.down_proj.weight: found f32[8, 6] in {third}, which the program does not want",
                f"  extra: model.layers.0.norm.weight: found f32[8] in {first}, which the program does not want",
            ]
        )

    def test_experts_with_gaps(self) -> None:
        stored = {f"experts.{e}.up_proj.weight": np.zeros((I, H), np.float32) for e in (1, 4, 5, 7, 8, 9, 11)}
        lines = message(lambda: StateDict(stored).check([Wanted("experts.up_proj", "f32", (4, I, H))])).splitlines()
        assert lines[0] == "state dict: these weights do not fit the program: 3 missing, 6 extra"
        assert [line.split(": ")[1] for line in lines[1:]] == [
            "experts.{0,2..3}.up_proj.weight",
            "experts.{4..5,7..9,11}.up_proj.weight",
        ]

    def test_one_offender_is_one_line_from_check_and_from_get(self, folder: Path) -> None:
        item = Wanted(f"{EXPERTS}.gate_proj", "f32", (E + 1, I, H))
        for action in (lambda: CheckpointFolder(folder).check([item], strict=False), lambda: CheckpointFolder(folder).get(item)):
            assert message(action) == f"checkpoint {folder}: missing: {EXPERTS}.4.gate_proj.weight: expected f32[6, 8]"

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_whatever_is_wrong_is_named_and_nothing_else(self, data: st.DataObject) -> None:
        items, spoilt = wanted(), {}
        for name in data.draw(st.sets(st.sampled_from(sorted(items)))):
            spoilt[name] = data.draw(st.sampled_from(["missing", "extra", "misshapen", "dtype"]))
        stored = arrays()
        for name, how in spoilt.items():
            if how == "missing":
                del stored[name]
            elif how == "extra":
                del items[name]
            elif how == "misshapen":
                stored[name] = stored[name][..., :-1]
            else:
                stored[name] = stored[name].astype(np.int32)
        weights = StateDict(stored)
        if not spoilt:
            weights.check(list(items.values()))
            return
        lines = message(lambda: weights.check(list(items.values()))).removeprefix("state dict: ").splitlines()
        found = {(kind, name) for kind, name, *_ in (line.strip().split(": ") for line in (lines if len(lines) == 1 else lines[1:]))}
        assert found == {(how, self.on_disk(name)) for name, how in spoilt.items()}
        weights.check([item for name, item in items.items() if name not in spoilt], strict=False)

    @staticmethod
    def on_disk(name: str) -> str:
        stem, _, projection = name.rpartition(".")
        return f"{stem}.{{0..3}}.{projection}.weight" if stem == EXPERTS else name

    def test_a_rank_wants_its_own_experts_only(self, folder: Path) -> None:
        mine = [Wanted(f"{EXPERTS}.{p}", "f32", (2, *s), experts=(1, 3)) for p, s in (("gate_proj", (I, H)), ("down_proj", (H, I)))]
        others = [item for name, item in wanted().items() if EXPERTS not in name]
        weights = CheckpointFolder(folder)
        up = message(lambda: weights.check([*mine, *others])).splitlines()
        assert all(f"extra: {EXPERTS}." in line and ".up_proj.weight" in line for line in up[1:])
        np.testing.assert_array_equal(weights.get(mine[0]), arrays()[f"{EXPERTS}.gate_proj"][[1, 3]])
        with pytest.raises(DscError, match="3 experts for a stack of 2"):
            Wanted(f"{EXPERTS}.gate_proj", "f32", (2, I, H), experts=(1, 2, 3))


class TestTensorsThatMayBeLeftAlone:
    """Of a model with two layers and one MTP layer, number 2."""

    CONFIG = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}  # noqa: RUF012
    MAIN = ("model.embed_tokens.weight", "model.layers.1.q.weight", "lm_head.weight")
    COPIES = ("model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight")
    MTP = ("model.layers.2.enorm.weight", "model.layers.2.eh_proj.weight")

    def weights(self, *names: str, config: dict[str, int] | None = None) -> StateDict:
        return StateDict({n: np.full((2, 2), i, np.float32) for i, n in enumerate(names)}, self.CONFIG if config is None else config)

    @staticmethod
    def wanted(*names: str) -> list[Wanted]:
        return [Wanted(name, "f32", (2, 2)) for name in names]

    def test_an_mtp_layer_that_the_program_lacks(self) -> None:
        self.weights(*self.MAIN, *self.COPIES, *self.MTP).check(self.wanted(*self.MAIN))

    def test_copies_of_embedding_and_head_in_an_mtp_layer_that_it_has(self) -> None:
        self.weights(*self.MAIN, *self.COPIES, *self.MTP).check(self.wanted(*self.MAIN, *self.MTP))

    def test_an_mtp_layer_that_it_has_is_wanted_whole(self) -> None:
        weights = self.weights(*self.MAIN, *self.COPIES, *self.MTP)
        assert "extra: model.layers.2.eh_proj.weight" in message(lambda: weights.check(self.wanted(*self.MAIN, self.MTP[0])))
        weights = self.weights(*self.MAIN, self.MTP[0])
        assert "missing: model.layers.2.eh_proj.weight" in message(lambda: weights.check(self.wanted(*self.MAIN, *self.MTP)))

    def test_copies_are_served_from_the_originals(self) -> None:
        weights = self.weights(*self.MAIN, *self.MTP)
        weights.check(self.wanted(*self.MAIN, *self.COPIES, *self.MTP))
        for copy, original in zip(self.COPIES, (self.MAIN[0], self.MAIN[2]), strict=True):
            np.testing.assert_array_equal(weights.get(Wanted(copy, "f32", (2, 2))), weights.get(Wanted(original, "f32", (2, 2))))

    def test_a_main_layer_is_never_left_alone(self) -> None:
        assert "extra: model.layers.1.q.weight" in message(lambda: self.weights(*self.MAIN).check(self.wanted(self.MAIN[0], self.MAIN[2])))
        without_config = self.weights(*self.MAIN, *self.MTP, config={})
        assert "extra: model.layers.2.enorm.weight" in message(lambda: without_config.check(self.wanted(*self.MAIN)))

    def test_rope_frequencies_and_scales(self) -> None:
        names = (*self.MAIN, "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.q.weight_scale_inv")
        self.weights(*names).check(self.wanted(*self.MAIN))
        orphan = self.weights(*self.MAIN, "model.layers.1.k.weight_scale_inv")
        assert "extra: model.layers.1.k.weight_scale_inv" in message(lambda: orphan.check(self.wanted(*self.MAIN)))

    def test_not_strict(self) -> None:
        self.weights(*self.MAIN, "junk").check(self.wanted(*self.MAIN), strict=False)


class TestBrokenFolders:
    def test_no_folder_no_safetensors_only_pickles(self, tmp_path: Path) -> None:
        either = "expected model.safetensors or model.safetensors.index.json"
        assert message(lambda: CheckpointFolder(tmp_path / "no")).startswith(f"{tmp_path / 'no'}: no such folder, expected a checkpoint")
        assert message(lambda: CheckpointFolder(tmp_path)) == f"{tmp_path}: {either}, found neither"
        torch.save({}, tmp_path / "pytorch_model.bin")
        assert (
            message(lambda: CheckpointFolder(tmp_path))
            == f"{tmp_path}: {either}, found only pytorch_model.bin, pickles, which are not read"
        )

    def test_every_fault_of_the_shards_at_once(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        index["weight_map"]["ghost"] = names[0]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        size = (folder / names[1]).stat().st_size
        with open(folder / names[1], "r+b") as file:
            file.truncate(size - 10)
        (folder / names[2]).unlink()
        lines = message(lambda: CheckpointFolder(folder)).splitlines()
        last = [name for name, shard in index["weight_map"].items() if shard == names[1]][-1]
        assert lines == [
            f"{folder / names[1]}: truncated: expected {size:,} bytes, found {size - 10:,}; cut short: {last}",
            f"{folder / names[2]}: absent, though model.safetensors.index.json names it",
            f"{folder / names[0]}: lacks 'ghost', which model.safetensors.index.json places there",
        ]

    def test_a_tensor_that_the_index_forgets_is_found_all_the_same(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        del index["weight_map"]["steps"]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        weights = CheckpointFolder(folder)
        weights.check(list(wanted().values()))
        np.testing.assert_array_equal(weights.get(wanted()["steps"]), arrays()["steps"])

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}', "\xff", "[" * 100_000])
    def test_bad_index(self, folder: Path, text: str) -> None:
        (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
        assert message(lambda: CheckpointFolder(folder)).startswith(f"{folder / 'model.safetensors.index.json'}:")

    @pytest.mark.parametrize("text", ["", "{", "[]"])
    def test_bad_config(self, folder: Path, text: str) -> None:
        (folder / "config.json").write_text(text)
        assert message(lambda: CheckpointFolder(folder)).startswith(f"{folder / 'config.json'}:")

    def test_the_given_config_overrides_the_folders(self, folder: Path) -> None:
        items = [item for name, item in wanted().items() if not name.startswith("model.layers.1")]
        assert "extra" in message(lambda: CheckpointFolder(folder).check(items))
        CheckpointFolder(folder, {"num_hidden_layers": 1}).check(items)


def one_file(tmp_path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return tmp_path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class TestBrokenFiles:
    @pytest.mark.parametrize(("header", "data", "expected"), [
        (b"{", b"", "corrupt header: not JSON"),
        (b"\xff\xfe", b"", "corrupt header: not JSON"),
        ([], b"", "corrupt header: expected a JSON object, found list"),
        ({"a": 1}, b"", "corrupt header: 'a': expected dtype, shape and data_offsets, found 1"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "corrupt header: 'a': expected dtype, shape and data_offsets"),
        ({"a": entry(shape=[-2])}, bytes(8), "corrupt header: 'a': expected dtype, shape"),
        ({"a": entry(shape=[2.0])}, bytes(8), "corrupt header: 'a': expected dtype, shape"),
        ({"a": entry(offsets=[8, 0])}, bytes(8), "corrupt header: 'a': expected dtype, shape"),
        ({"a": entry(shape=[3])}, bytes(8), "corrupt header: 'a': f32[3] is 12 bytes, data_offsets give 8"),
        ({"a": entry(), "b": entry()}, bytes(8), "corrupt header: 'b' starts at byte"),
        ({"a": entry(offsets=[8, 16])}, bytes(16), "corrupt header: 'a' starts at byte"),
        ({"a": entry(), "b": entry(offsets=[8, 16])}, bytes(15), "bytes, found 146; cut short: b"),
        ({"a": entry(), "b": entry(offsets=[8, 16])}, bytes(7), "cut short: a, b"),
        ({"a": entry()}, bytes(9), "by its header, found"),
    ])  # fmt: skip
    def test_one_line_and_the_safetensors_library_agrees(self, tmp_path: Path, header: object, data: bytes, expected: str) -> None:
        folder = one_file(tmp_path, header, data)
        text = message(lambda: CheckpointFolder(folder))
        assert text.startswith(f"{folder / 'model.safetensors'}: ")
        assert expected in text
        assert "\n" not in text
        with pytest.raises(SafetensorError), safe_open(folder / "model.safetensors", "numpy"):
            pass

    @pytest.mark.parametrize(("content", "expected"), [
        (b"", "not a safetensors file"),
        (b"short", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "not a safetensors file"),
        (struct.pack("<Q", 1000) + b"{}", "truncated within its header: expected 1,008 bytes or more, found 10"),
    ])  # fmt: skip
    def test_files_of_another_kind(self, tmp_path: Path, content: bytes, expected: str) -> None:
        (tmp_path / "model.safetensors").write_bytes(content)
        assert expected in message(lambda: CheckpointFolder(tmp_path))

    @settings(max_examples=100, deadline=None)
    @given(cut=st.integers(0, 10_000))
    def test_a_file_cut_anywhere(self, tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
        folder = tmp_path_factory.mktemp("cut")
        save_file(arrays(), folder / "model.safetensors")
        whole = (folder / "model.safetensors").read_bytes()
        CheckpointFolder(folder)
        (folder / "model.safetensors").write_bytes(whole[: cut % len(whole)])
        assert message(lambda: CheckpointFolder(folder)).startswith(f"{folder / 'model.safetensors'}: ")

    def test_a_dtype_that_dsc_lacks_offends_only_where_it_is_wanted(self, tmp_path: Path) -> None:
        header = {"a": entry(), "b": {"dtype": "F4", "shape": [16], "data_offsets": [8, 16]}}
        weights = CheckpointFolder(one_file(tmp_path, header, bytes(16)))
        weights.check([Wanted("a", "f32", (2,))], strict=False)
        assert "dtype: b: expected f32[16], found F4[16] in model.safetensors; cannot be converted" in message(
            lambda: weights.get(Wanted("b", "f32", (16,)))
        )

    def test_tensors_that_the_file_does_not_align(self, tmp_path: Path) -> None:
        header = {"a": entry("U8", [3], [0, 3]), "b": entry("F32", [2], [3, 11])}
        weights = CheckpointFolder(one_file(tmp_path, header, bytes(3) + np.array([1.5, -2], np.float32).tobytes()))
        found = weights.get(Wanted("b", "f32", (2,)))
        assert found.flags.aligned
        assert found.tolist() == [1.5, -2]
