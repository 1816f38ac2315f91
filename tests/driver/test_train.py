"""`dsc train`: its curve against torch's, runs that are stopped and resumed, checkpoints that others read, and what it refuses."""

from __future__ import annotations

import json
import pydoc_data.topics
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import dsc
from dsc import DscError, backends
from dsc.driver import train_program
from dsc.driver.curve import read, smoothed
from dsc.driver.data import Batches, Position, open_text
from dsc.driver.learning_rate import Schedule
from dsc.driver.tokens import ByteTokenizer
from dsc.driver.train import Outcome, Stepper, train
from dsc.driver.train_program import Programs
from dsc.driver.train_state import State, checkpoints, first_state
from dsc.ir.types import DType, bound
from dsc.models.build import build
from dsc.models.checkpoint import CheckpointFolder, save_checkpoint
from dsc.models.config import load_config
from dsc.models.safetensors_file import SafetensorsFile
from dsc.models.weights import Wanted
from dsc.passes.optimizer import AdamW

TEXT = pydoc_data.topics.__file__
SMALL = ("num_hidden_layers=2", "hidden_size=48", "n_routed_experts=8", "moe_intermediate_size=24", "intermediate_size=64")
RATE = 2e-3
TIME = "tokens_per_second"
Train = Callable[..., Outcome]


@pytest.fixture(scope="session")
def compiled() -> Callable[..., Programs]:
    """`train_program.programs`, each program made once."""
    return cache(lambda source, **options: train_program.programs(source, **options))


@pytest.fixture
def short(compiled: Callable[..., Programs], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Train:
    """`short("run", steps=4)`: train a small model into tmp_path / "run"."""
    monkeypatch.setattr("dsc.driver.train.programs", compiled)

    def run(out: str = "run", data: Any = (TEXT,), **options: Any) -> Outcome:
        given = {"steps": 6, "batch": 2, "seq": 16, "learning_rate": RATE, "overrides": SMALL} | options
        return train(given.pop("source", "deepseek-v3-tiny"), data, tmp_path / out, **given)

    return run


def curve_of(run: Path) -> list[dict[str, str]]:
    """The rows of a run's loss.csv without what depends on the clock."""
    return [{name: value for name, value in row.items() if name != TIME} for row in read(run / "loss.csv")]


def torch_losses(programs: Programs, state: State, batches: Batches, schedule: Schedule) -> Iterator[dict[str, float]]:
    """The same run in torch: its autograd, AdamW and clipping, and gates moved by a loop, in float32."""
    model = build(load_config(dict(programs.config)), "train", "cpu")
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in state.weights.items()})
    parameters = dict(model.named_parameters())
    matrices = [parameters[name] for name in programs.trained if parameters[name].dim() > 1]
    vectors = [parameters[name] for name in programs.trained if parameters[name].dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    at = Position()
    for step in range(1, schedule.steps + 1):
        tokens, labels, at = batches.next(at)
        optimizer.zero_grad()
        loss, *others, counts = model(torch.from_numpy(tokens), torch.from_numpy(labels))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([*matrices, *vectors], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        optimizer.step()
        with torch.no_grad():
            for bias, loads in zip((parameters[name] for name in programs.gates), counts.tolist(), strict=True):
                for expert, load in enumerate(loads):
                    mean = sum(loads) / len(loads)
                    bias[expert] += 0.001 * ((load < mean) - (load > mean))
        yield dict(zip(programs.metrics, [loss.item(), *(x.item() for x in others)], strict=False)) | {"gradient_norm": float(norm)}


def test_the_curve_is_that_of_torch(compiled: Callable[..., Programs], monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 with float32 moments. A step's relative difference is some ten roundings of a sum of a thousand terms, 1e-5 at most, and
    grows with the steps as an error of the weights does: ten steps stay within 1e-4."""
    overrides = (*SMALL, "dtype=float32")
    adamw = AdamW(moments=DType.f32)
    programs = compiled("deepseek-v3-tiny", batch=2, seq=16, overrides=overrides, adamw=adamw)
    batches = Batches([open_text(TEXT)], ByteTokenizer(), 2, 16, fim=0.1)
    stepper = Stepper(programs, Schedule(10, RATE), backends.get("numpy"))
    state = first = first_state(programs, seed=0)
    for step, expected in enumerate(torch_losses(programs, first, batches, stepper.schedule), 1):
        state, found = stepper.step(state, batches)
        for name, value in expected.items():
            assert float(found[name]) == pytest.approx(value, rel=1e-5 * step), f"step {step}: {name}"
    moved = [float(np.abs(state.weights[name] - first.weights[name]).max()) for name in programs.gates]
    assert min(moved) >= 0.001, "no gate has moved"


def test_a_run_learns_and_leaves_what_it_says(short: Train, tmp_path: Path) -> None:
    done = short(steps=30, save_every=8, ema=0.9)
    run = tmp_path / "run"
    losses = [float(row["loss"]) for row in done.rows]
    assert losses[0] == pytest.approx(1.3 * np.log(320), rel=0.02), "the first loss is not that of even odds"
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    assert [row["step"] for row in read(run / "loss.csv")] == [str(i) for i in range(1, 31)]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in checkpoints(run)] == ["step-00000024", "step-00000030"], "not the last two"
    assert done.checkpoint == checkpoints(run)[-1]
    assert {path.name for path in run.iterdir()} == {"settings.json", "loss.csv", "loss.png", "checkpoints", ".lock"}
    assert (done.steps, done.tokens) == (30, 30 * 32)


def test_stopping_anywhere_and_resuming_leaves_no_trace(short: Train, tmp_path: Path) -> None:
    short("whole", steps=9, save_every=2, ema=0.9)

    class Stop(Exception):
        pass

    def stop_at(last: int) -> Callable[[int, Any], None]:
        def on_step(step: int, row: Any) -> None:
            if step == last:
                raise Stop

        return on_step

    for last in (1, 4, 7):
        with pytest.raises(Stop):
            short("parts", steps=9, save_every=2, ema=0.9, resume=last > 1, on_step=stop_at(last))
    short("parts", steps=9, save_every=2, ema=0.9, resume=True)
    assert curve_of(tmp_path / "parts") == curve_of(tmp_path / "whole")
    for whole in checkpoints(tmp_path / "whole")[-1].rglob("*"):
        if whole.is_file():
            parts = tmp_path / "parts" / whole.relative_to(tmp_path / "whole")
            assert parts.read_bytes() == whole.read_bytes(), whole.name


def test_a_run_that_is_done_stays_as_it_is(short: Train, tmp_path: Path) -> None:
    short()
    before = (tmp_path / "run" / "loss.csv").read_text()
    done = short(resume=True)
    assert (done.steps, len(done.rows)) == (0, 6)
    assert (tmp_path / "run" / "loss.csv").read_text() == before


def test_the_curve_is_one_of_its_seed(short: Train, tmp_path: Path) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        short(out, seed=seed, steps=2)
    a, b, c = (curve_of(tmp_path / out) for out in "abc")
    assert a == b != c


def test_the_average_is_kept_beside_the_weights(short: Train, tmp_path: Path, compiled: Callable[..., Programs]) -> None:
    short(steps=3, save_every=1, ema=0.75)
    programs = compiled("deepseek-v3-tiny", batch=2, seq=16, recipe=None, overrides=SMALL)
    before, after = checkpoints(tmp_path / "run")
    wanted = {name: Wanted(name, "f32", tuple(map(bound, programs.weights[name].shape))) for name in programs.trained}
    masters = SafetensorsFile(after / "optimizer.safetensors").tensors
    old, new = (CheckpointFolder(folder / "ema") for folder in (before, after))
    for name, item in wanted.items():
        average, master = old.get(item), masters[f"{name}.master"].array()
        np.testing.assert_array_equal(new.get(item), average + (master - average) * np.float32(0.25))
    logits = [dsc.run(dsc.trace(folder, seq=8), weights=str(folder))[0] for folder in (after, after / "ema")]
    assert not np.array_equal(*logits)


def test_transformers_and_dsc_read_a_checkpoint(short: Train) -> None:
    done = short(steps=2, overrides=(*SMALL, "dtype=float32", "num_nextn_predict_layers=0"))
    tokens = np.arange(40, 56)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(done.checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    (found,) = dsc.run(dsc.trace(done.checkpoint, seq=16), weights=str(done.checkpoint), inputs=(tokens,))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(done.checkpoint / "tokenizer.json"))
    assert tokenizer.encode("größer", add_special_tokens=False) == list("größer".encode())


def test_training_goes_on_from_the_weights_of_a_checkpoint(short: Train) -> None:
    first = short("first", steps=8)
    second = short("second", steps=1, source=first.checkpoint, overrides=())
    tokens, labels, _ = Batches([open_text(TEXT)], ByteTokenizer(), 2, 16, fim=0.1).next(Position())
    program = dsc.trace(first.checkpoint, mode="train", batch=2, seq=16)
    loss, *_ = dsc.run(program, weights=str(first.checkpoint), inputs=(tokens, labels))
    assert np.float32(second.rows[0]["loss"]) == loss != np.float32(first.rows[0]["loss"])


@pytest.mark.parametrize("recipe", ["deepseek-v3", "block-only"])
def test_every_recipe_trains(short: Train, recipe: str) -> None:
    done = short(steps=3, recipe=recipe)
    assert all(np.isfinite(float(row["loss"])) for row in done.rows)


def test_a_loss_that_is_no_number_names_the_step_and_the_op(short: Train, tmp_path: Path) -> None:
    first = short("first", steps=1)
    weights = {name: np.array(tensor.array()) for name, tensor in SafetensorsFile(first.checkpoint / "model.safetensors").tensors.items()}
    weights["model.layers.1.self_attn.o_proj.weight"][3, 5] = np.nan
    save_checkpoint(tmp_path / "damaged", weights, json.loads((first.checkpoint / "config.json").read_text()))
    with pytest.raises(DscError) as error:
        short(source=tmp_path / "damaged", overrides=())
    kept = tmp_path / "run" / "checkpoints" / "step-00000000"
    assert str(error.value) == (
        "step 1: the loss is nan; the first op to make a number that is not finite is param at "
        f"@training_moe_layer_fwd (model.layers.1) self_attn.o_proj#1; the state after step 0 is kept in {kept}"
    )
    assert kept.is_dir()


def test_a_run_that_diverges_keeps_its_last_state(short: Train, tmp_path: Path) -> None:
    with pytest.raises(
        DscError, match=r"^step \d+: the .*(nan|inf).*; the first op to make .* is \w+ at @.*; the state after step \d+ is kept"
    ):
        short(steps=40, learning_rate=1e37, overrides=(*SMALL, "dtype=float32"))
    rows, (*_, kept) = curve_of(tmp_path / "run"), checkpoints(tmp_path / "run")
    assert kept.name == f"step-{len(rows):08d}"
    assert all(np.isfinite(float(row["loss"])) for row in rows)


def test_data_that_vanishes_stops_the_run_with_its_state(short: Train, tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("\n\n".join(f"document {i} of many" for i in range(100)))

    def remove(step: int, row: Any) -> None:
        if step == 3:
            data.unlink()

    with pytest.raises(
        DscError, match=rf"^{data}: has vanished since training began; the state after step \d is kept in .*step-0000000\d$"
    ):
        short(data=[data], on_step=remove)
    data.write_text("\n\n".join(f"document {i} of many" for i in range(100)))
    assert len(short(data=[data], resume=True).rows) == 6


def settled(folder: Path, condition: Callable[[Path], bool], process: Any) -> bool:
    """Wait until a condition holds; False where the process ends before."""
    while process.poll() is None:
        if condition(folder):
            return True
        time.sleep(0.001)
    return False


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "at the beginning": lambda run: (run / "checkpoints").is_dir(),
    "in the first steps": lambda run: (run / "loss.csv").exists() and len(read(run / "loss.csv")) >= 2,
    "while a checkpoint is written": lambda run: any((run / "checkpoints").glob(".step-00000006.partial")),
    "while another is written": lambda run: any((run / "checkpoints").glob(".step-00000009.partial/*")),
}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(forks: Any, tmp_path: Path) -> None:
    """SIGKILL leaves no time to save anything. The process is killed at four moments, and the last one runs to the end."""
    forks.ask("compile", source="deepseek-v3-tiny", batch=2, seq=16, overrides=SMALL)
    sets = [part for override in SMALL for part in ("--set", override)]
    options = ["--steps", "12", "--save-every", "3", "--batch", "2", "--seq", "16", "--ema", "0.9", "--lr", str(RATE), *sets]

    def start(out: str, *more: str) -> Any:
        arguments = ["train", "deepseek-v3-tiny", "--data", TEXT, "-o", str(tmp_path / out), *options, *more]
        return forks.start("dsc", *arguments, files=("/dev/null", "/dev/null", tmp_path / "errors"))

    assert start("whole").wait() == 0, (tmp_path / "errors").read_text()
    for moment, condition in MOMENTS.items():
        process = start("parts", "--resume")
        assert settled(tmp_path / "parts", condition, process), f"{moment}: the run ended too early to be killed"
        process.kill()
        assert process.wait() == -signal.SIGKILL
        for folder in checkpoints(tmp_path / "parts"):
            assert (folder / "state.json").exists(), f"{moment}: a checkpoint is there and incomplete"
    assert start("parts", "--resume").wait() == 0, (tmp_path / "errors").read_text()
    assert curve_of(tmp_path / "parts") == curve_of(tmp_path / "whole")
    assert not list((tmp_path / "parts" / "checkpoints").glob(".*"))
    for file in checkpoints(tmp_path / "whole")[-1].rglob("*.safetensors"):
        assert (tmp_path / "parts" / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes(), file.name


def test_two_processes_do_not_share_a_run(short: Train, tmp_path: Path) -> None:
    message = ""

    def again(step: int, row: Any) -> None:
        nonlocal message
        message = message or refused(lambda: short(resume=True))

    short(steps=6, on_step=again)
    assert message == f"{tmp_path / 'run'}: another process is training into it"


def refused(run: Callable[[], object]) -> str:
    with pytest.raises(DscError) as error:
        run()
    return str(error.value)


def test_what_is_refused(short: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    short(steps=2)
    assert refused(lambda: short(steps=2)) == f"{run} holds a run; --resume goes on with it"
    (folder,) = checkpoints(run)
    hint = (
        "  --resume goes on with a run as it was begun: leave these settings as they are there; "
        f"or begin another run with {folder}: dsc train {folder} -o ..."
    )
    assert refused(lambda: short(steps=3, resume=True)).splitlines() == [f"{run}: steps is 2 there, but 3 was asked for", hint]
    assert refused(lambda: short(steps=2, resume=True, seed=4, fim=0.2)).splitlines() == [
        f"{run}: seed is 0 there, but 4 was asked for",
        f"{run}: fim is 0.1 there, but 0.2 was asked for",
        hint,
    ]
    other = (*SMALL, "moe_intermediate_size=32")
    message = refused(lambda: short(steps=2, resume=True, overrides=other))
    assert message.splitlines() == [f"{run}: moe_intermediate_size is 24 there, but 32 was asked for", hint]
    (run / "settings.json").write_text(
        (run / "settings.json").read_text().replace('"moe_intermediate_size": 24', '"moe_intermediate_size": 32')
    )
    message = refused(lambda: short(steps=2, resume=True, overrides=other))
    assert message == f"{folder}: moe_intermediate_size is 24 there, but 32 was asked for"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    for resume in (False, True):
        message = refused(lambda: short("mine", resume=resume))  # noqa: B023
        assert message == f"{tmp_path / 'mine'} exists and holds no run; expected a new folder, an empty one or a run to resume"
    assert refused(lambda: short("mine/file")) == f"{tmp_path / 'mine' / 'file'} is a file, expected a folder for the run"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps is 0, expected more than 0"),
        ({"learning_rate": -1.0}, "--lr is -1.0, expected more than 0"),
        ({"save_every": 0}, "--save-every is 0, expected more than 0"),
        ({"ema": 1.0}, "--ema is 1.0, expected a decay between 0 and 1"),
        ({"fim": 2.0}, "--fim is 2, expected a share between 0 and 1"),
        ({"data": ["nowhere.txt"]}, "nowhere.txt: no such file"),
        ({"data": []}, "there is no data to train on"),
        ({"overrides": (*SMALL, "vocab_size=200")}, "bytes and their marks are 260 tokens, but the model's vocab_size is 200"),
        ({"recipe": "nonsense"}, "unknown recipe nonsense; expected a .toml file or one of: "),
        ({"backend": "nonsense"}, "unknown backend 'nonsense'; known are "),
    ],
)
def test_options_that_make_no_sense(short: Train, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert refused(lambda: short(**options)).startswith(message)
    assert not (tmp_path / "run").exists()


def test_the_command(short: Train, command: Any, tmp_path: Path) -> None:
    """`short` is here for the programs that it has compiled already."""
    more = tmp_path / "more.txt"
    more.write_text("further text\n\nand more of it\n")
    sets = [part for override in SMALL for part in ("--set", override)]
    asked = ["train", "deepseek-v3-tiny", "--data", TEXT, more, "-o", tmp_path / "run", "--steps", 3, "--batch", 2, "--seq", 16, *sets]
    done = command(*asked)
    assert done.code == 0
    assert done.err.splitlines()[-1].startswith("step 3 of 3: loss ")
    first, second, third = done.out.splitlines()
    assert first.startswith("step 3: loss ")
    assert second.startswith("3 steps in ")
    assert third == f"{tmp_path / 'run/checkpoints/step-00000003'}: the last checkpoint; the curve is in {tmp_path / 'run/loss.csv'}"
    again = command(*asked, "--resume", "--json").json
    assert (again["steps"], again["steps_now"]) == (3, 0)
    assert str(np.float32(again["last"]["loss"])) == read(tmp_path / "run" / "loss.csv")[-1]["loss"]
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert len(settings["data"]) == 2
    assert command(*asked).err == f"dsc: error: {tmp_path / 'run'} holds a run; --resume goes on with it\n"


def test_smoothing() -> None:
    assert smoothed([1.0, 0.0, 0.0]) == [1.0, 0.9, 0.81]
    assert smoothed([]) == []
