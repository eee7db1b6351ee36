"""From a benchmark's report to rows, and from rows to the README: no figure is lost, doubled or left behind."""

import csv
import json
import subprocess
import sys
from pathlib import Path

from sparseft.integrations import training

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def script(name, *arguments):
    command = [sys.executable, BENCHMARKS / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def report(commit="aaaa", ours=(1.0, 2.0, 3.0, 4.0, 5.0), **changes):
    """One case with two baselines, as `harness.compare` writes it into pytest-benchmark's JSON."""
    case = {"op": "gather", "shape": "tiny", "density": 0.005, "dtype": "fp32", "device": "cpu", "backend": "c++"}
    info = {
        "case": {**case, **changes},
        "baselines": {"torch": [6.0, 6.0, 6.0], "a loop": [12.0, 12.0, 12.0]},
        "floor_seconds": 1.5,
        "peaks": {"c++": 1024, "torch": 3 * 2**20},
        "sizes": {"c++": 100, "torch": 1000},
    }
    versions = {"python": "3.12", "torch": "2.13.0", "triton": None, "transformers": "5.0", "sparseft": "0.1.0"}
    stamp = {"threads": 2, "cpu": "a CPU, 2 threads", "cuda": None, "versions": versions}
    return {
        "machine_info": {"sparseft": {**stamp, "commit": commit, "date": "2026-01-02"}},
        "benchmarks": [{"name": "test_gather", "stats": {"data": list(ours)}, "extra_info": info}],
    }


def record(folder, **report_options):
    (folder / "report.json").write_text(json.dumps(report(**report_options)))
    run = script("record.py", folder / "report.json", "--results", folder / "results")
    assert run.returncode == 0, run.stderr
    with (folder / "results" / "cpu2.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_report_becomes_rows(tmp_path):
    rows = record(tmp_path)
    assert [(row["role"], row["backend"], row["unit"]) for row in rows] == [
        ("ours", "c++", "s"),
        ("baseline", "torch", "s"),
        ("baseline", "a loop", "s"),
        ("ours", "c++", "bytes"),
        ("baseline", "torch", "bytes"),
    ]
    ours, torch, loop, size, _ = rows
    assert (ours["median"], ours["p20"], ours["p80"], ours["rounds"]) == ("3", "1.8", "4.2", "5")
    assert (ours["ratio"], torch["ratio"], loop["ratio"], size["ratio"]) == ("0.5", "1", "2", "0.1")
    assert (ours["fraction_of_floor"], ours["peak_bytes"], loop["peak_bytes"]) == ("0.5", "1024", "")
    assert (ours["device"], ours["triton"], ours["commit"]) == ("a CPU, 2 threads", "", "aaaa")


def test_measuring_again_replaces_the_rows_of_that_case_and_commit_only(tmp_path):
    record(tmp_path)
    record(tmp_path, commit="bbbb")
    record(tmp_path, op="delta_swap_")
    rows = record(tmp_path, ours=[9.0, 9.0])
    times = [(row["op"], row["commit"], row["median"]) for row in rows if row["role"] == "ours" and row["unit"] == "s"]
    assert sorted(times) == [("delta_swap_", "aaaa", "3"), ("gather", "aaaa", "9"), ("gather", "bbbb", "3")]
    assert len(rows) == 3 * 5


def test_a_benchmark_without_a_baseline_is_refused(tmp_path):
    foreign = report()
    foreign["benchmarks"][0]["extra_info"] = {}
    (tmp_path / "report.json").write_text(json.dumps(foreign))
    run = script("record.py", tmp_path / "report.json", "--results", tmp_path)
    assert run.returncode != 0
    assert "test_gather" in run.stderr
    assert not list(tmp_path.glob("*.csv"))


def test_rows_of_other_columns_are_left_alone(tmp_path):
    record(tmp_path)
    path = tmp_path / "results" / "cpu2.csv"
    path.write_text("op,seconds\ngather,1\n")
    run = script("record.py", tmp_path / "report.json", "--results", tmp_path / "results")
    assert "must have the columns" in run.stderr
    assert path.read_text() == "op,seconds\ngather,1\n"


def test_the_newest_rows_become_the_readmes_table(tmp_path):
    record(tmp_path, commit="bbbb", ours=[1.0, 1.0])
    record(tmp_path)
    readme = tmp_path / "README.md"
    empty = "<!-- demo:begin --><!-- demo:end -->\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nend\n"
    readme.write_text(empty)
    arguments = (readme, "--results", tmp_path / "results")
    assert script("table.py", "--check", *arguments).returncode == 1
    assert readme.read_text() == empty
    assert script("table.py", *arguments).returncode == 0
    page = readme.read_text()
    assert "| `gather` | tiny | 0.5 % | torch | 6 s | 3 s | 2 x faster | 0.50 | 1 KiB against 3 MiB |" in page
    assert "| `gather` | tiny | 0.5 % | a loop | 12 s | 3 s | 4 x faster | 0.50 | 1 KiB |" in page
    assert "| `gather`, bytes | tiny | 0.5 % | torch | 1000 bytes | 100 bytes | 10 x smaller |  |  |" in page
    assert "a CPU, 2 threads; python 3.12, torch 2.13.0" in page
    assert "bbbb" not in page
    assert "old" not in page
    assert page.endswith("<!-- benchmarks:end -->\nend\n")
    assert script("table.py", "--check", *arguments).returncode == 0


def test_the_newest_run_of_the_demo_becomes_a_table(tmp_path):
    row = {
        "method": "fish", "lr": "0.003", "trained_weights": "116620", "metric": "accuracy", "dev": "0.81",
        "seconds_per_step": "0.25", "select_memory_bytes": "1048576", "train_memory_bytes": "2097152",
        "checkpoint_bytes": "690000", "torch": "2.13.0", "transformers": "5.0", "device": "a CPU", "commit": "aaaa",
        "date": "2026-01-02", "seed": "0",
    }  # fmt: skip
    rows = [
        {**row, "dev": "0.5"},
        {**row, "commit": "bbbb"},
        {**row, "commit": "bbbb", "dev": "0.83", "seed": "1"},
        {**row, "commit": "bbbb", "method": "full", "lr": "1e-4"},
    ]
    with (tmp_path / "demo-cpu2.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows(rows)
    readme = tmp_path / "README.md"
    readme.write_text(
        "<!-- demo:begin --><!-- demo:end -->\n<!-- benchmarks:begin -->\n<!-- benchmarks:end -->\n", encoding="utf-8"
    )
    assert script("table.py", readme, "--results", tmp_path).returncode == 0
    page = readme.read_text()
    assert "| FISH | 116,620 | 0.820 ± 0.014 | 0.250 | 2 MiB | 690,000 bytes | 0.003 |" in page
    assert "| full fine-tuning | 116,620 | 0.810 | 0.250 | 2 MiB | 690,000 bytes | 0.0001 |" in page
    assert "aaaa" not in page


def test_the_comparisons_runs_become_a_table(tmp_path):
    row = {
        "task": "rte", "way": "fish", "seed": "0", "lr": "0.001", "changed_weights": "100", "dev_accuracy": "0.5",
        "device": "a CPU", "torch": "2.13.0", "transformers": "5.0", "date": "2026-01-02", "head_lr": "0.03",
        **dict.fromkeys(("density", "epochs", "batch_size", "max_length", "samples", "bf16"), "1"),
    }  # fmt: skip
    rows = [
        {**row, "lr": "0.1", "dev_accuracy": "0.1"},  # at a rate that was given up
        {**row, "way": "full", "dev_accuracy": "0.6"},
        row,
        {**row, "seed": "1", "dev_accuracy": "0.52", "changed_weights": "102"},
        {**row, "task": "trec6", "dev_accuracy": "0.9", "changed_weights": "104", "date": "2026-01-03"},
    ]
    with (tmp_path / "compare-cpu2.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows(rows)
    page = tmp_path / "page.md"
    page.write_text("<!-- comparison:begin --><!-- comparison:end -->\n")
    assert script("table.py", page, "--results", tmp_path).returncode == 0
    lines = page.read_text().splitlines()
    assert "4 runs on a CPU; torch 2.13.0, transformers 5.0; until 2026-01-03:" in lines
    fish = lines.index("| fish | 0.5 % | 0.001 | 102 | 90.0 | 51.0 ± 1.4 |")
    assert lines[fish + 1] == "| full | all | 0.001 | 100 |  | 60.0 |"
    with (tmp_path / "compare-cpu2.csv").open("a", newline="") as file:
        csv.DictWriter(file, row).writerow({**row, "epochs": "3"})
    run = script("table.py", page, "--results", tmp_path)
    assert "must have one epochs, got 1, 3" in run.stderr
    assert page.read_text().splitlines() == lines


def test_a_page_without_markers_is_refused(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# A page\n")
    run = script("table.py", readme, "--results", tmp_path)
    assert "benchmarks:begin" in run.stderr
    assert readme.read_text() == "# A page\n"


def test_the_readme_says_what_the_rows_say():
    run = script("table.py", "--check")
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_benchmark_runs_and_is_recorded(tmp_path):
    """The real thing once, on the quickest case: the canned report must look like what pytest-benchmark writes."""
    pytest_command = [sys.executable, "-m", "pytest", BENCHMARKS / "bench_gather.py", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*pytest_command, "--benchmark-only", f"--benchmark-json={tmp_path / 'report.json'}", "-k", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    run = script("record.py", tmp_path / "report.json", "--results", tmp_path, "--machine", "here")
    assert run.returncode == 0, run.stderr
    with (tmp_path / "here.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["role"] for row in rows] == ["ours", "baseline"]
    assert all(float(row["median"]) > 0 and row["commit"] and row["torch"] for row in rows)


def test_default_rates_are_those_of_the_sweep():
    with (BENCHMARKS / "results" / "sweep-cpu2.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] in training.DEFAULT_LR]
    losses = {}
    for row in rows:
        # a head alone has one rate; beside others a new head has that of every method
        if row["method"] == "head" or float(row["head_lr"]) == training.HEAD_LR:
            losses.setdefault(row["method"], {})[float(row["lr"])] = float(row["loss"])
    assert losses.keys() == training.DEFAULT_LR.keys() - {"ird"}
    for method, of_rates in losses.items():
        rate = training.DEFAULT_LR[method]
        assert of_rates[rate] <= 1.02 * min(of_rates.values()), method
        assert min(of_rates) < rate < max(of_rates), method  # nor would the grid have to go on


def test_where_the_time_of_a_workload_goes(tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import pathlib, operations, provenance
provenance.RESULTS = pathlib.Path({str(tmp_path)!r})
sys.argv[1:] = "here estimate_fisher cpu MiniLM 1 2 8".split()
operations.main()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with (tmp_path / "operations-here.csv").open(newline="") as file:
        rows = {row["operation"]: row for row in csv.DictReader(file)}
    assert "sparseft::fisher_linear_" in rows
    assert {row["workload"] for row in rows.values()} == {"estimate_fisher cpu MiniLM 1 2 8"}
    shares = {name: float(row["share"]) for name, row in rows.items()}
    assert abs(sum(shares.values()) - 1) < 0.01
    assert all(0 < share < 1 for share in shares.values()), shares
