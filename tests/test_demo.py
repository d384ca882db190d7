"""The command line and the main job, small."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("platformdirs")

import metafast
from metafast import cli
from metafast.demo import console, eager, job, train
from metafast.demo.settings import Settings

SMALL = ["--steps", "4", "--tasks", "2", "--filters", "4", "--test-tasks", "20", "--threads", "1"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = tmp_path_factory.getbasetemp() / "glyphs"  # shared with test_glyphs
    package = Path(metafast.__file__).parents[1]  # found even where it runs from a checkout without being installed
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(package)]))
    return dict(os.environ) | {"METAFAST_CACHE": str(cache), "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths}


def start(arguments: Sequence[str], folder: Path, environment: dict[str, str]) -> "subprocess.Popen[str]":
    """The command in a process of its own (it flushes subnormals in all of PyTorch's threads)."""
    command = [sys.executable, "-m", "metafast", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


# ---- the whole job


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    process = start(["demo", *SMALL, "--out", "shown"], folder, environment)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, out + errors
    return out, folder / "shown"


def test_it_reports(finished: tuple[str, Path]) -> None:
    out, folder = finished
    for text in (
        "Letters:",
        "20/20  accuracy after 1 inner step ",
        "Accuracy on Greek Armenian Georgian, 20 tasks",
        "tasks/s",
        "plain PyTorch loop",
        "Total:",
    ):
        assert text in out
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in folder.iterdir()) == ["demo.json", "demo.png"]


def test_the_accuracy_shown_while_testing_is_that_of_the_table(finished: tuple[str, Path]) -> None:
    shown = re.findall(r"testing +20/20  accuracy after 1 inner step +([\d.]+) %", finished[0])
    assert shown == [f"{100 * json.loads((finished[1] / 'demo.json').read_text())['accuracy_after']['mean']:.1f}"]


def test_its_numbers(finished: tuple[str, Path]) -> None:
    record = json.loads((finished[1] / "demo.json").read_text())
    assert record["interrupted"] is False
    assert record["steps_done"] == len(record["losses"]) == 4
    assert record["accuracy_before"]["tasks"] == record["accuracy_after"]["tasks"] == 20
    assert 0 < record["accuracy_after"]["interval"] < 0.1
    assert record["eager"]["metafast_loss"] == pytest.approx(record["eager"]["eager_loss"], rel=1e-3)
    assert record["settings"]["filters"] == 4
    assert len(record["curve"]) == job.CURVE_STEPS + 1


def test_the_reference_starts_alike(finished: tuple[str, Path]) -> None:
    """Same weights, same tasks: the first loss is the same number, up to float32 rounding."""
    record = json.loads((finished[1] / "demo.json").read_text())
    if record["backend"] == job.REFERENCE:
        pytest.skip("there is no native backend here, the reference ran alone")
    assert record["reference_losses"][0] == pytest.approx(record["losses"][0], rel=1e-4)
    assert record["reference_accuracy_before"]["tasks"] == 20
    assert 1 <= record["reference_steps_alike"] <= 4


def test_training_is_that_of_the_reference() -> None:
    """In float64 rounding does not part the two runs: twelve steps of Adam give the same losses and weights."""
    losses, weights = [], []
    for backend in ("auto", job.REFERENCE):
        settings = Settings(filters=4, steps=12, inner_steps=2, backend=backend)
        net = train.make_net(settings).double()
        inner = train.make_inner(net, settings, backend)
        optimizer, _ = train.make_optimizer(net, settings)
        tasks = torch.Generator().manual_seed(3)
        for _ in range(settings.steps):
            x = torch.rand(2, 3, 5, 1, 28, 28, generator=tasks, dtype=torch.float64)
            y = torch.arange(5).expand(2, 5)
            optimizer.zero_grad()
            loss = inner((x[:, 0], y), (x[:, 1:].flatten(1, 2), y.repeat(1, 2)))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert losses[:12] == pytest.approx(losses[12:], rel=1e-8)
    assert torch.allclose(weights[0], weights[1], rtol=0, atol=1e-7)


def test_interrupted(tmp_path: Path, environment: dict[str, str]) -> None:
    """Ctrl-C in training: no traceback, results of what there is, the shell's status for it."""
    process = start(["demo", *SMALL, "--steps", "100000", "--out", "shown"], tmp_path, environment)
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("training"):
        assert line, process.stderr.read() if process.stderr else ""
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors
    assert process.returncode == cli.INTERRUPTED, errors
    assert "Interrupted after" in out
    record = json.loads((tmp_path / "shown" / "demo.json").read_text())
    assert record["interrupted"] is True
    assert 1 <= record["steps_done"] < 100000
    assert record["eager"] is None


# ---- parts


def test_flushing_is_undone() -> None:
    with job.flushed_subnormals():
        assert float(torch.tensor(1e-39) * 1) == 0.0
    assert float(torch.tensor(1e-39) * 1) > 0.0


def test_net_is_seeded_and_leaves_the_global_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = (train.make_net(Settings(filters=4, seed=seed)).state_dict() for seed in (1, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = train.make_net(Settings(filters=4, seed=2)).state_dict()
    assert not torch.equal(a["0.weight"], other["0.weight"])
    assert not any("running" in name for name in a)


def test_accuracy_interval() -> None:
    accuracy = train.Accuracy.of(torch.tensor([0.0, 1.0] * 50))
    assert accuracy.mean == 0.5
    assert accuracy.interval == pytest.approx(1.96 * 0.5025 / 10, rel=1e-3)
    assert str(accuracy) == " 50.0 ± 9.8 %"


@pytest.mark.parametrize("order", [1, 2])
def test_plain_loop_is_maml(order: int) -> None:
    """Its second-order gradient is the slope of its loss by finite differences; its first-order one is not."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2).double()
    support, query = ((torch.randn(1, 4, 3).double(), torch.tensor([[0, 1, 0, 1]])) for _ in range(2))

    def loss() -> float:
        fast = eager.adapt(net, (support[0][0], support[1][0]), 0.5, 2, 1)
        logits = torch.func.functional_call(net, fast, (query[0][0],))
        return torch.nn.functional.cross_entropy(logits, query[1][0]).item()

    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    assert eager.meta_step(net, optimizer, support, query, inner_lr=0.5, steps=2, order=order) == pytest.approx(loss())
    gradient = net.weight.grad
    assert gradient is not None
    h = 1e-5
    with torch.no_grad():
        net.weight[0, 0] += h
    up = loss()
    with torch.no_grad():
        net.weight[0, 0] -= 2 * h
    slope = (up - loss()) / (2 * h)
    agrees = float(gradient[0, 0]) == pytest.approx(slope, rel=1e-6)
    assert agrees == (order == 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected 1 or more"),
        ({"ways": 1}, "ways: got 1, expected 2 or more"),
        ({"order": 3}, "order: got 3, expected 1"),
        ({"inner_lr": float("nan")}, "inner_lr: got nan, expected a positive number"),
        ({"outer_lr": -1.0}, "outer_lr: got -1.0, expected a positive number"),
    ],
)
def test_bad_settings(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**change)  # type: ignore[arg-type]


def test_plain_console(capsys: pytest.CaptureFixture[str]) -> None:
    plain = console.Console(lines=2)
    with plain.track("work") as at:
        for i in range(10):
            at(i + 1, 10, "loss 1")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "5/10", "10/10"]
    assert lines[-1].endswith("loss 1")


def test_stop_is_a_wish_and_then_an_order() -> None:
    before = signal.getsignal(signal.SIGINT)
    with console.Stop() as stop:
        assert not stop.wanted
        signal.raise_signal(signal.SIGINT)
        assert stop.wanted
        assert stop.take()
        assert not stop.take()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# ---- the command line


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"metafast {metafast.__version__}\n"


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.USAGE
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: got 0, expected 1 or more"),
        (["--steps", "many"], "argument --steps: got 'many', expected a whole number"),
        (["--ways", "1"], "argument --ways: got 1, expected 2 or more"),
        (["--order", "3"], "argument --order: invalid choice: 3"),
        (["--inner-lr", "-1"], "argument --inner-lr: got -1, expected a positive number"),
        (["--inner-lr", "nan"], "argument --inner-lr: got nan, expected a positive number"),
        (["--backend", "magic"], "argument --backend: invalid choice: 'magic'"),
        (["--backend", "cuda"], "argument --backend: invalid choice: 'cuda'"),
        (["--seed", str(10**20)], f"argument --seed: got {10**20}, expected {2**63 - 1} or less"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["demo", *arguments])
    assert exit_info.value.code == cli.USAGE
    assert message in capsys.readouterr().err


def test_more_than_the_letters_can_fill(tmp_path: Path, environment: dict[str, str]) -> None:
    process = start(["demo", "--ways", "5000", "--out", "shown"], tmp_path, environment)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == cli.USAGE
    assert "5000 ways, but only" in errors
    assert not (tmp_path / "shown").exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text("precious")
    assert cli.main(["demo", "--json", str(mine)]) == cli.USAGE
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["demo", "--out", str(mine)]) == cli.USAGE
    assert "is a file; give a folder" in capsys.readouterr().err
    assert cli.main(["demo", "--json", str(tmp_path / "no" / "a.json")]) == cli.USAGE
    assert "there is no folder" in capsys.readouterr().err
    assert cli.main(["demo", "--out", str(mine / "sub" / "er")]) == cli.USAGE
    assert f"--out: nothing can be written in {mine}; give another place" in capsys.readouterr().err
    assert mine.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_takes_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    for option in (["--out", str(tmp_path / "new")], ["--json", str(tmp_path / "a.json")]):
        assert cli.main(["demo", *option]) == cli.USAGE
        assert f"{option[0]}: nothing can be written in {tmp_path}" in capsys.readouterr().err
    tmp_path.chmod(0o700)


def test_a_folder_that_cannot_be_made(tmp_path: Path, environment: dict[str, str]) -> None:
    """What no look beforehand tells comes before the training as well."""
    process = start(["demo", "--out", "x" * 300], tmp_path, environment)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == cli.USAGE and "\ntraining" not in out
    assert re.fullmatch(r"metafast demo: error: --out x+ cannot be made \(.*\); give another folder\n", errors)


def test_help_of_the_reference_says_that_it_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "--reference, --no-reference train a second time, on the PyTorch reference (default: True)" in words
    parse = cli.make_parser().parse_args
    assert [parse(["demo", *o]).reference for o in ([], ["--no-reference"])] == [True, False]


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "missing_packages", lambda: ["matplotlib"])
    assert cli.main(["demo"]) == cli.USAGE
    assert "needs matplotlib; pip install matplotlib" in capsys.readouterr().err


def test_bench_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "find_checkout", lambda: None)
    assert cli.main(["bench", "--quick"]) == cli.USAGE
    assert "source checkout" in capsys.readouterr().err


def test_bench_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "bench" / "__main__.py").write_text("import sys; sys.exit(7 if sys.argv[1:] == ['op', '-h'] else 1)")
    monkeypatch.setattr(cli, "find_checkout", lambda: tmp_path)
    assert cli.main(["bench", "op", "-h"]) == 7


def test_bench_writes_where_the_caller_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkout, here = tmp_path / "checkout", tmp_path / "here"
    (checkout / "bench").mkdir(parents=True)
    here.mkdir()
    (checkout / "bench" / "__init__.py").touch()
    (checkout / "bench" / "__main__.py").write_text("import sys; open(sys.argv[1], 'w').close()")
    monkeypatch.setattr(cli, "find_checkout", lambda: checkout)
    monkeypatch.chdir(here)
    assert cli.main(["bench", "results.json"]) == 0
    assert (here / "results.json").exists()
