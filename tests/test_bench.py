"""The benchmark's own logic: a wrong peer is caught, work is counted right, tables say what was measured."""

import dataclasses
import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: an installed metafast goes first

from bench import __main__ as command
from bench import answers, calibrate, claim, flops, harness, op, options, peers, plot, table, trial, workloads
from bench.claims import first_call
from metafast import cost

TINY = workloads.WORKLOADS["tiny-mlp"]
TINY_CONV = workloads.WORKLOADS["tiny-conv"]
EFFORT = harness.Effort(rounds=3, sample=0.0, budget=1.0, pause=0.0)


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A cache of its own, and one thread: nothing here is large enough for two."""
    monkeypatch.setenv("METAFAST_CACHE", str(tmp_path))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Crooked(peers.Eager):
    """The eager loop with its gradient turned by what `spoil` does to it."""

    def __init__(self, spoil, name="crooked"):
        self.spoil, self.name = spoil, name

    def prepare(self, case):
        call = super().prepare(case)
        return lambda: self.spoil(*call())


class OnlyCopied(peers.Eager):
    """Stands in for metafast."""

    name, family = "metafast", "metafast"


def entry_of(*contenders, workload=TINY):
    return harness.measure(workload, {c.name: c for c in contenders}, EFFORT, report=lambda line: None)


# ---- answers


@pytest.mark.parametrize("workload", [TINY, TINY_CONV], ids=lambda w: w.name)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("adapted", ["*", "head.*"])
@pytest.mark.parametrize("peer", [peers.Eager(), peers.Vmap()], ids=lambda p: p.name)
def test_peers_in_float64_agree_with_the_oracle(workload, order, adapted, peer):
    row = dataclasses.replace(workload, order=order, adapted=adapted, dtype=torch.float64)
    case = workloads.make_case(row)
    forms = getattr(peer, "forms", (None,))
    for form in forms:
        call = peer.prepare(case) if form is None else peer.build(case, form)
        found = answers.deviation(answers.as_answer(call()), answers.oracle_answer(case))
        assert found.loss < 1e-12 and found.l2 < 1e-12


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")  # a first import compiles the peer
@pytest.mark.parametrize("name", ["learn2learn", "higher", "torchopt", "jax-vmap", "jax-scan"])
@pytest.mark.parametrize("order", [1, 2])
def test_installed_peers_agree_with_the_oracle(name, order):
    peer = peers.all_peers()[name]
    if missing := peer.missing():
        pytest.skip(missing)
    row = dataclasses.replace(TINY, order=order, dtype=torch.float64)
    if declined := peer.declines(row):
        pytest.skip(declined)
    case = workloads.make_case(row)
    found = answers.deviation(answers.as_answer(peer.prepare(case)()), answers.oracle_answer(case))
    assert found.l2 < 1e-12


def test_a_missing_peer_says_how_to_install_it(monkeypatch):
    class Absent(peers.Eager):
        name, packages, install = "absent", ("no_such_package",), "pip install no-such-package"

    found = entry_of(Absent(), peers.Eager())["peers"]
    assert found["absent"]["skipped"] == "no_such_package not installed: pip install no-such-package"
    assert found["eager"]["median"] > 0


def test_every_peer_names_what_it_needs():
    for peer in peers.all_peers().values():
        assert bool(peer.packages) == bool(peer.install), peer.name
    assert set(peers.DEFAULT) | set(peers.QUICK) <= set(peers.all_peers())


def test_torch_compile_starts_empty(monkeypatch):
    """Else the second workload's shapes are taken for dynamic ones, and the ninth workload fails."""
    said = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: said.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda form, fullgraph: said.append("compile") or form)
    peers.Compiled().prepare(workloads.make_case(TINY))
    assert said == ["reset", "compile", "compile"]


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_chunks_of_tasks_change_nothing(chunk):
    case = workloads.make_case(dataclasses.replace(TINY, chunk=chunk, dtype=torch.float64))
    for form in peers.Vmap.forms:
        found = answers.deviation(
            answers.as_answer(peers.Vmap().build(case, form)()), answers.oracle_answer(case)
        )
        assert found.l2 < 1e-12


SPOILT = {
    "sign": lambda loss, grads: (loss, [-g for g in grads]),
    "scale": lambda loss, grads: (loss, [g * 1.01 for g in grads]),
    "one entry": lambda loss, grads: (
        loss,
        [grads[0].clone().index_fill_(0, torch.tensor(0), 0.0), *grads[1:]],
    ),
    "nan": lambda loss, grads: (loss, [g * math.nan for g in grads]),
    "loss": lambda loss, grads: (loss * 1.01, grads),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_wrong_peer_is_not_timed(kind):
    record = entry_of(Crooked(SPOILT[kind]))["peers"]["crooked"]
    assert record["skipped"].startswith("wrong answer: relative ")
    assert "median" not in record and record["seconds"] == []


@pytest.mark.parametrize("workload", [TINY, TINY_CONV], ids=lambda w: w.name)
def test_metafast_is_timed(workload):
    found = entry_of(peers.Metafast(), workload=workload)["peers"]["metafast"]
    assert found["skipped"] is None and found["median"] > 0


def test_a_peer_that_raises_does_not_end_the_run():
    def fail(loss, grads):
        raise RuntimeError("out of luck\nsecond line")

    found = entry_of(Crooked(fail), peers.Eager())["peers"]
    assert found["crooked"]["skipped"] == "RuntimeError: out of luck"
    assert found["eager"]["median"] > 0


def test_a_gradient_of_another_length_is_named():
    short = answers.Answer(0.0, torch.zeros(3))
    with pytest.raises(ValueError, match="got 3 numbers, expected 4"):
        answers.deviation(short, answers.Answer(0.0, torch.zeros(4)))


def test_bound_follows_the_references_own_error():
    oracle = answers.Answer(1.0, torch.ones(4, dtype=torch.float64))
    off = answers.Answer(1.0, torch.tensor([1.0, 1.0, 1.0, 1.02], dtype=torch.float64))
    tight, loose = answers.Deviation(0, 1e-6, 1), answers.Deviation(0, 5e-3, 1)
    assert answers.judge(off, oracle, tight, torch.float32).fault
    assert answers.judge(off, oracle, loose, torch.float32).fault is None


@pytest.mark.parametrize(("leaps", "wrong"), [(1, False), (2, False), (3, True), (5, True)])
def test_a_leap_that_rounding_undoes_is_no_fault(leaps: int, wrong: bool):
    """Of the case and its four copies, so many give an answer that is far off (once NaN)."""
    case, error = workloads.make_case(TINY), answers.Deviation(0, 1e-6, 1)
    oracle = answers.Answer(1.0, torch.ones(4, dtype=torch.float64))
    far = [torch.full((4,), 2.0), torch.full((4,), math.nan)] * 3
    given = iter([*far[:leaps], *[torch.ones(4)] * (5 - leaps)])
    first = answers.judge(answers.Answer(1.0, next(given).double()), oracle, error, torch.float32)
    verdict = answers.judge_again(first, lambda copy: (1.0, [next(given)]), case, oracle, error)
    assert bool(verdict.fault) == wrong


def test_oracle_answers_are_kept_by_content(tmp_path):
    case = workloads.make_case(TINY)
    first, error = answers.reference(case)
    again, same = answers.reference(case)
    assert torch.equal(first.gradient, again.gradient) and error == same
    assert len(list(answers.cache_folder().iterdir())) == 1
    answers.reference(workloads.make_case(TINY, seed=1))
    assert len(list(answers.cache_folder().iterdir())) == 2


# ---- work


@pytest.mark.parametrize("adapted", ["*", "head.*"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("workload", [TINY, TINY_CONV], ids=lambda w: w.name)
def test_work_is_what_the_eager_loop_does(workload, order, adapted):
    row = dataclasses.replace(workload, order=order, adapted=adapted)
    call = peers.Eager().prepare(workloads.make_case(row))
    with FlopCounterMode(display=False) as counter:
        call()
    counted = flops.count(row)
    if workload is TINY_CONV and order == 2 and adapted == "*":
        # PyTorch's double backward of a convolution computes one product too many for the first layer.
        counted += row.tasks * row.support * row.steps * flops.products(row)[0].flops
    assert counter.get_total_flops() == counted


def test_no_steps_leave_the_query_alone():
    row = dataclasses.replace(TINY, steps=0)
    assert flops.count(row) == row.tasks * row.query * (2 * 3 * 8 * 2 + 2 * 8 * 3)


# ---- harness


def test_slow_contenders_get_fewer_rounds():
    effort = harness.Effort(rounds=15, budget=20.0)
    assert [effort.rounds_for(s) for s in (0.001, 1.0, 4.0, 6.0, 60.0)] == [15, 15, 5, 3, 3]


def test_a_call_too_long_to_repeat_is_named():
    def wait(loss, grads):
        time.sleep(0.2)
        return loss, grads

    effort = dataclasses.replace(EFFORT, longest=0.1)
    contenders = {c.name: c for c in (Crooked(wait), peers.Eager())}
    found = harness.measure(TINY, contenders, effort, report=lambda line: None)["peers"]
    assert found["crooked"]["skipped"] .startswith("one call takes 0.2")
    assert found["eager"]["samples"] == 3


def test_progress_grows_from_nothing_to_almost_all():
    seen = []

    def at(done, note):
        seen.append((done, note))

    harness.measure(TINY, {"eager": peers.Eager()}, EFFORT, report=lambda line: None, at=at)
    shares = [done for done, _ in seen]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] < 100
    assert seen[-1][1] == "round 3/3, eager"


def test_contenders_take_turns_and_the_order_rotates():
    seen = []

    def contender(name):
        return harness.Contender(harness.Record(name, "pytorch"), lambda: seen.append(name), estimate=2.0)

    harness.take_turns([contender("a"), contender("b"), contender("c")], EFFORT)
    assert "".join(seen) == "abcbcacab"


@pytest.mark.parametrize(("sample", "calls"), [(0.0, 1), (0.35, 3)])
def test_calls_that_fill_a_sample_come_before_it_and_do_not_count(monkeypatch, sample, calls):
    """As many as then count; the first of all takes 0.2 s, the others 0.1."""
    clock, made = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def call():
        made.append(None)
        clock[0] += 0.1 if len(made) > 1 else 0.2

    one = harness.Contender(harness.Record("one", "pytorch"), call, estimate=0.1)
    harness._turn(one, dataclasses.replace(EFFORT, sample=sample))
    assert len(made) == 2 * calls
    assert one.record.seconds == [pytest.approx(0.1)]


def test_round_trips_go_into_the_entry(monkeypatch):
    trips = iter([3e-7, 1e-7, 2e-7])
    monkeypatch.setattr(harness, "round_trip", lambda: next(trips))
    found = entry_of(peers.Eager())
    assert found["round_trip"] == {"least": 1e-7, "median": 2e-7, "most": 3e-7}
    assert json.loads(json.dumps(found))["round_trip"] == found["round_trip"]


def test_with_one_core_there_is_no_round_trip(monkeypatch):
    monkeypatch.setattr(harness, "round_trip", lambda: None)
    assert entry_of(peers.Eager())["round_trip"] is None


def test_ratios_are_formed_by_family():
    found = entry_of(OnlyCopied(), peers.Eager(), Crooked(lambda *raw: raw, "twin"))
    assert set(found["ratios"]) == {"pytorch", "eager"}
    fastest = min((found["peers"][n]["median"], n) for n in ("eager", "twin"))
    ratio = fastest[0] / found["peers"]["metafast"]["median"]
    assert found["ratios"]["pytorch"] == {"peer": fastest[1], "ratio": pytest.approx(ratio)}


# ---- trials


def of_trial(monkeypatch, answer):
    """Every trial answers so, or raises; the list of what was tried."""
    tried = []

    def child(module, workload, peer, *options, limit):
        tried.append((workload, peer))
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(trial, "child", child)
    return tried


FOUND = {"first": 8.0, "second": 0.5, "peak": 1 << 20}


def test_compilers_are_tried_elsewhere_first_and_once(monkeypatch):
    tried = of_trial(monkeypatch, FOUND)
    for _ in range(2):
        record = harness.enter(peers.Compiled(), TINY, EFFORT).record
        assert record.skipped is None and record.fresh == FOUND and harness.first_call(record) == 8.0
    assert harness.enter(peers.Eager(), TINY, EFFORT).record.fresh is None
    assert tried == [("tiny-mlp", "compile")]
    harness.enter(peers.Compiled(), dataclasses.replace(TINY, steps=3), EFFORT)
    assert len(tried) == 2  # another workload is another trial


def test_fresh_numbers_are_found_for_all_and_metafasts_anew(monkeypatch):
    tried = of_trial(monkeypatch, FOUND)
    effort = dataclasses.replace(EFFORT, fresh=True)
    for peer in (peers.Eager(), peers.Metafast()) * 2:
        assert harness.enter(peer, TINY, effort).record.fresh == FOUND
    assert [peer for _, peer in tried] == ["eager", "metafast", "metafast"]


def test_a_trial_over_its_limit_is_repeated_for_a_higher_one(monkeypatch):
    tried = of_trial(monkeypatch, subprocess.TimeoutExpired("python", 9.0))
    for limit, number in ((9.0, 1), (9.0, 1), (5.0, 1), (20.0, 2)):
        effort = dataclasses.replace(EFFORT, limit=limit)
        assert harness.enter(peers.Compiled(), TINY, effort).record.skipped in ("not done in 9 s", "not done in 20 s")
        assert len(tried) == number


def test_a_trial_that_crashes_is_not_kept(monkeypatch):
    tried = of_trial(monkeypatch, RuntimeError("bench.trial: ended with -9: no message"))
    for _ in range(2):
        record = harness.enter(peers.Compiled(), TINY, EFFORT).record
        assert record.skipped == "bench.trial: ended with -9: no message"
    assert len(tried) == 2


def test_compiled_calls_that_take_too_long_are_not_started(monkeypatch):
    of_trial(monkeypatch, FOUND | {"second": 42.0})
    assert harness.enter(peers.Compiled(), TINY, EFFORT).record.skipped == "one call takes 42 s, over 30 s"


def test_a_child_ends_at_the_limit_with_what_it_started(tmp_path, monkeypatch):
    (tmp_path / "endless.py").write_text(
        "import subprocess, sys, pathlib\n"
        "started = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path(sys.argv[1]).write_text(str(started.pid))\n"
        "started.wait()\n"
    )
    monkeypatch.setattr(trial, "ROOT", tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        trial.child("endless", str(tmp_path / "pid"), limit=3.0)
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    deadline = time.monotonic() + 20  # a process that was killed ends when it is next scheduled
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_prepare_keeps_references_and_trials_and_times_nothing(monkeypatch):
    tried = of_trial(monkeypatch, FOUND)
    lines = []
    contenders = {p.name: p for p in (peers.Metafast(), peers.Eager(), peers.Compiled())}
    harness.prepare(TINY, contenders, EFFORT, lines.append)
    assert tried == [("tiny-mlp", "compile")]
    assert [line.split(maxsplit=1) for line in lines] == [
        ["eager", "no trial"],
        ["compile", "first call 8.00 s, second 0.500 s"],
    ]
    assert answers.cache_folder().is_dir()


def test_entries_are_plain_json():
    found = entry_of(OnlyCopied(), peers.Eager())
    assert json.loads(json.dumps(found)) == found


def test_cases_are_the_same_for_the_same_seed_and_leave_the_generator():
    before = torch.random.get_rng_state()
    one, two = workloads.make_case(TINY_CONV), workloads.make_case(TINY_CONV)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.fingerprint() == two.fingerprint() != workloads.make_case(TINY_CONV, seed=1).fingerprint()


@pytest.mark.parametrize("row", workloads.WORKLOADS.values(), ids=lambda w: w.name)
def test_every_row_describes_a_net_that_fits_its_data(row):
    module = workloads.as_module(row.layers)
    with torch.device("meta"):
        made = module.to("meta")(torch.empty(2, *row.features))
    assert made.shape == (2, row.classes or 1)
    assert any(row.adapts(name) for name, _ in module.named_parameters())


# ---- tables, plot, claims

SAMPLE = {
    "machine": {
        "processor": "Some CPU",
        "vector_sets": ["avx2"],
        "threads": 2,
        "python": "3.11.7",
        "versions": {"metafast": "0.1.0", "torch": "2.13.0"},
    },
    "workloads": {
        "sinusoid": {
            "title": "sinusoid, K=5",
            "peers": {
                "metafast": {
                    "family": "metafast",
                    "median": 4e-4,
                    "iqr": 1e-5,
                    "samples": 15,
                    "notes": [],
                    "gflops": 80.0,
                },
                "eager": {
                    "family": "pytorch",
                    "median": 0.14,
                    "iqr": 1e-3,
                    "samples": 15,
                    "notes": [],
                    "gflops": 0.3,
                },
                "compile": {
                    "family": "pytorch",
                    "median": 2.2e-3,
                    "iqr": 1e-4,
                    "samples": 2,
                    "notes": [],
                    "gflops": 20.0,
                },
                "jax-scan": {"family": "jax", "skipped": "jax not installed"},
            },
            "ratios": {
                "pytorch": {"peer": "compile", "ratio": 5.5},
                "eager": {"peer": "eager", "ratio": 350.0},
            },
            "goal": {"pytorch": [4, 6], "eager": [400, 400], "jax": [3, 5], "roof": [40, 60]},
            "round_trip": {"least": 8e-8, "median": 9.1e-8, "most": 3.8e-7},
            "roof": {"sgemm_gflops": 160.0},
        },
        "other": {
            "title": "never ran",
            "peers": {"metafast": {"family": "metafast", "skipped": "metafast not installed"}},
            "ratios": {},
            "goal": {},
            "round_trip": None,
            "roof": {"sgemm_gflops": 160.0},
        },
    },
}


def test_table_from_a_sample():
    lines = table.markdown(SAMPLE).splitlines()
    assert "threads: 2, on Some CPU (avx2), Python 3.11.7, torch 2.13.0" in lines[0]
    assert lines[0].endswith("A cache line to another core and back: 91 ns to 91 ns, median of a row.")
    expected = (
        "| sinusoid, K=5 | 400 µs | **5.5×** (compile, 2.2 ms, 2 runs) | **350×** (140 ms) | – | 50 % (80 GFLOP/s) |"
    )
    assert lines[4] == f"{expected} `python -m bench sinusoid` |"
    assert lines[5].startswith("| never ran | – | – |")
    assert len({line.count("|") for line in lines[2:6]}) == 1
    assert lines[6:] == [
        "",
        "Not timed:",
        "",
        "- jax-scan (sinusoid): jax not installed",
        "- metafast (other): metafast not installed",
    ]


SHARES = [(172.4, "172 %"), (100.0, "100 %"), (9.6, "10 %"), (9.4, "9.4 %"), (0.04, "0.0 %")]


@pytest.mark.parametrize(("share", "text"), SHARES)
def test_percentages_have_no_exponent(share, text):
    assert table.percent(share) == text


def test_terminal_report_shows_first_call_and_peak():
    entry = SAMPLE["workloads"]["sinusoid"]
    record = entry["peers"]["metafast"] | {"fresh": {"first": 0.2, "second": 4e-4, "peak": 3 << 20}}
    text = table.report(entry | {"peers": {"metafast": record}})
    assert "first 200 ms, peak 3.0 MiB" in text


def test_terminal_report_names_goals():
    text = table.report(SAMPLE["workloads"]["sinusoid"])
    assert "goal pytorch  must 4×, aim 6×: 5.5× reached" in text
    assert "must 400×, aim 400×: 350.0× MISSED" in text
    assert "must 40 %, aim 60 %: 50.0 % reached" in text
    assert "jax not installed" in text and "goal jax" not in text


def test_terminal_report_says_how_far_apart_the_cores_were():
    entry = SAMPLE["workloads"]["sinusoid"]
    assert "a cache line to another core and back 91 ns (80 ns to 380 ns)" in table.report(entry)
    assert "no round trip between cores" in table.report(entry | {"round_trip": None})


def test_tables_of_results_without_round_trips_say_nothing_of_them():
    rows = {name: {k: v for k, v in row.items() if k != "round_trip"} for name, row in SAMPLE["workloads"].items()}
    assert "cache line" not in table.markdown(SAMPLE | {"workloads": rows})


def test_table_goes_between_the_markers():
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    made = table.replace_between(text, "new")
    assert made == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"
    assert table.replace_between(made, "new") == made
    with pytest.raises(ValueError, match="expected <!-- bench: begin --> once"):
        table.replace_between("no markers", "new")


@pytest.mark.parametrize(("ratio", "text"), [(0.084, "0.084×"), (1.0, "1.0×"), (3.44, "3.4×"), (181.2, "181×")])
def test_ratios_keep_their_digits(ratio, text):
    assert table.times(ratio) == text


DURATIONS = [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.12e-4, "412 µs"), (5e-9, "5 ns")]


@pytest.mark.parametrize(("seconds", "text"), DURATIONS)
def test_durations_are_read_at_a_glance(seconds, text):
    assert table.duration(seconds) == text


def test_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plot.draw(SAMPLE, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").stat().st_size > 1000


def test_merge_keeps_other_workloads(tmp_path):
    file = tmp_path / "results.json"
    command._write({"machine": {}, "workloads": {"a": 1, "b": 1}}, file, {})
    again = command.parse(["--json", str(file), "--merge"])
    command._write({"machine": {}, "workloads": {"b": 2}}, file, command._held(again))
    assert json.loads(file.read_text())["workloads"] == {"a": 1, "b": 2}
    assert command._held(command.parse(["--json", str(file)])) == {}


def test_an_interrupted_run_keeps_the_workloads_before(tmp_path, monkeypatch, capsys):
    def measure(w, *rest):
        if w.name == "tiny-conv":
            raise KeyboardInterrupt
        return {"title": w.title, "peers": {}, "ratios": {}, "goal": {}, "round_trip": None}

    monkeypatch.setattr(harness, "measure", measure)
    monkeypatch.setattr(command.machine, "bind", lambda threads: None)
    monkeypatch.setattr(command.machine, "settle", lambda threads: None)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    file = tmp_path / "results.json"
    assert command.main(["tiny-mlp", "tiny-conv", "--quick", "--json", str(file)]) == 130
    held = json.loads(file.read_text())
    assert list(held["workloads"]) == ["tiny-mlp"] and held["workloads"]["tiny-mlp"]["roof"]["sgemm_gflops"] > 0
    assert [f.name for f in tmp_path.iterdir()] == ["results.json"]
    assert f"the workloads before are in {file}" in capsys.readouterr().err


def test_only_metafasts_failures_fail_the_run():
    results = {
        "workloads": {
            "w": {
                "peers": {
                    "metafast": {"family": "metafast", "skipped": "wrong answer: relative L2"},
                    "vmap": {"family": "pytorch", "skipped": "wrong answer: relative L2"},
                }
            },
            "absent": {"peers": {"metafast": {"family": "metafast", "skipped": "metafast not installed: pip install"}}},
        }
    }
    assert command._failures(results) == ["w: wrong answer: relative L2"]


def test_unknown_names_end_with_the_known_ones():
    with pytest.raises(SystemExit, match="got nothing; expected one of: a, b"):
        command._chosen(["nothing"], {"a": 1, "b": 2}, "workload")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--threads", "0"], "argument --threads: got 0, expected 1 or more"),
        (["--threads", "all"], "argument --threads: got 'all', expected a whole number"),
        (["--rounds", "-1"], "argument --rounds: got -1, expected 1 or more"),
        (["--plot", "x.txt"], "argument --plot: got a picture of format 'txt', expected one of eps, "),
        (["--plot", f"{__file__}/x.png"], f"nothing can be written in {__file__}; give another place"),
        (["--json", f"{__file__}/a/b.json"], f"nothing can be written in {__file__}; give another place"),
        (["--json", "."], "argument --json: got ., a folder, expected a file"),
    ],
)
def test_bad_options_are_refused_before_any_work(given, text, capsys):
    with pytest.raises(SystemExit) as ended:
        command.parse(given)
    assert ended.value.code == 2 and text in capsys.readouterr().err


def test_every_picture_that_the_options_take_can_be_drawn(tmp_path):
    canvas = pytest.importorskip("matplotlib.backend_bases").FigureCanvasBase
    assert set(options.PICTURES) <= set(canvas.get_supported_filetypes())
    assert options.picture(str(tmp_path / "new" / "A.PNG")) == tmp_path / "new" / "A.PNG"


@pytest.mark.parametrize("kind", ["fwd", "dx", "dw"])
@pytest.mark.parametrize(("side", "n_in", "n_out"), [(14, 64, 64), (42, 32, 32)])
def test_convolutions_of_conv4_are_measured(kind, side, n_in, n_out):
    size = f"{side}x{side}x{n_in}->{n_out} "
    rows = [r for r in op.conv_rows() if r.kernel == f"conv_{kind}" and size in r.label]
    assert rows
    for row in rows:
        pixels = int(row.label.rpartition("=")[2]) * side * side
        assert row.flops == 2 * pixels * 9 * n_in * n_out
        assert row.bytes == 4 * (pixels * (n_in + n_out) + 9 * n_in * n_out)


def test_a_kernels_line_has_rates_and_percent_of_the_roof(tmp_path, capsys):
    file = tmp_path / "op.json"
    op.main(["conv_fwd 14x14x64->64 N=5", "reduce 10x40->40", "--quick", "--threads", "1", "2", "--json", str(file)])
    conv, reduce = capsys.readouterr().out.splitlines()[2:]
    assert [conv.count(unit) for unit in ("GFLOP/s", "GB/s", "%")] == [2, 2, 2]
    assert [reduce.count(unit) for unit in ("GFLOP/s", "GB/s", "%")] == [0, 2, 2]
    held = json.loads(file.read_text())
    for r, (gflops, gbs) in zip(held["results"], [held["roof"][t].values() for t in "1212"], strict=True):
        assert r["fraction"] == pytest.approx(r["gflops"] / gflops if r["gflops"] else r["gbs"] / gbs)


def test_the_cost_model_can_be_calibrated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bench.machine.settle", lambda threads: None)  # which would hold for the tests that follow
    file = tmp_path / "nets.json"
    calibrate.main(["--quick", "--json", str(file)])
    out = capsys.readouterr().out
    assert all(out.count(word) == 1 for word in ("by itself: Work(", "in blocks: Work(", "fitted: ", "present: "))
    for sample in json.loads(file.read_text()):
        assert min(sample["alone"], sample["block"]) > 0 and len(sample["work"]) == len(cost.Work._fields)


CLAIMS = ("first_call", "import_time", "memory", "order", "overhead", "speed", "threads")


@pytest.mark.parametrize("name", CLAIMS)
def test_readme_names_every_claim(name):
    module = importlib.import_module(f"bench.claims.{name}")
    assert callable(module.measure)
    readme = (Path(trial.ROOT) / "README.md").read_text()
    assert f".{name}`" in readme


def test_claims_are_all_listed_here():
    assert {f.stem for f in (trial.ROOT / "bench" / "claims").glob("*.py")} - {"__init__"} == set(CLAIMS)


def test_the_table_has_every_workload_and_its_first_order_twin():
    rows = [workloads.WORKLOADS[name] for name in workloads.DEFAULT]
    second = [w.name for w in rows if w.order == 2 and w.tasks > 1]
    assert {f"{name}-fo" for name in second} <= set(workloads.DEFAULT)
    assert {w.name for w in rows if w.tasks == 1} == {"one-mlp", "one-sinusoid", "one-omniglot"}


def test_claims_hold_or_miss():
    at_most = claim.Claim("import", 40.0, 50, "ms")
    at_least = claim.Claim("threads", 1.5, 1.85, "×", at_least=True)
    assert at_most.holds and at_most.line() == "ok     import: 40 ms (at most 50)"
    assert not at_least.holds and at_least.line().startswith("MISSED threads: 1.5 ×")
    assert not dataclasses.replace(at_most, measured=math.nan).holds
    given = claim.parser("doc").parse_args(["--check"])
    assert claim.conclude(given, [at_most]) == 0 and claim.conclude(given, [at_most, at_least]) == 1


def test_claims_name_workloads_that_exist():
    assert {name for name, _ in first_call.NETS.values()} <= set(workloads.WORKLOADS)


def test_a_child_that_fails_says_so():
    with pytest.raises(RuntimeError, match=r"bench\.nothing"):
        trial.child("bench.nothing")
