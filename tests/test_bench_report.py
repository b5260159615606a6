"""The report on recorded benchmarks, and the recorded runs themselves."""

import importlib.util
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("bench_report", BENCH / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path):
    """A run of one case: 800 MB, which dentropy takes 1.25 times as long for as the copy."""

    def row(ms, mib, times, fraction, **more):
        return (
            dict(
                median_ms=ms,
                min_ms=0.9 * ms,
                max_ms=1.1 * ms,
                calls_per_round=1,
                peak_mib_above_inputs=mib,
                rate=800 / ms,
                times_reference=times,
                fraction_of_reference=fraction,
            )
            | more
        )

    providers = {
        "dentropy": row(500.0, 6.2, 1.25, 0.8, error=1.2e-7),
        "copy": row(400.0, 0.0, 1.0, 1.0),
        "jvp": row(5000.0, 1536.0, 12.5, 0.08, error=3.4e-6),
        "fused": dict(not_run="fused is not installed"),
    }
    case = dict(
        title="A case",
        device="cpu",
        rounds=5,
        work=8e8,
        unit="GB/s",
        reference="copy",
        headline=True,
        providers=providers,
    )
    machine = dict(cpu="A CPU", threads=2, gpu=None, torch="2.13.0", triton="3.9.0")
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps(
            dict(
                machine_info=machine,
                commit_info=dict(id="0123456789", dirty=False),
                datetime="2026-01-02T03:04:05",
                benchmarks=[dict(extra_info=case)],
            )
        )
    )
    return path


def test_tables_show_every_provider_and_why_one_did_not_run(report, run, capsys):
    report.main([str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert "| A case | 500 ms, 6 MiB | 80% of copy | jvp: 5 s, 1.5 GiB |" in lines
    assert "A CPU, 2 threads; PyTorch 2.13.0, Triton 3.9.0; commit 0123456, 2026-01-02" in lines
    assert "| jvp | 5 s (4.5 s to 5.5 s) | 0.16 GB/s | 8% | 1.5 GiB | 3e-06 |" in lines
    assert "| fused | not run: fused is not installed |  |  |  |  |" in lines


@pytest.mark.parametrize("name, begins", [("chart.png", b"\x89PNG"), ("chart.svg", b"<?xml")])
def test_chart_of_the_headline_cases(report, run, tmp_path, name, begins, capsys):
    report.main([str(run), "--chart", str(tmp_path / name)])
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_a_run_without_providers_is_refused(report, run, capsys):
    content = json.loads(run.read_text())
    content["benchmarks"][0]["extra_info"] = {}
    run.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        report.main([str(run)])
    assert "no cases of interleaved providers" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((BENCH / "results").glob("*.json")), ids=lambda path: path.name)
def test_recorded_runs_name_no_machine(path):
    run = json.loads(path.read_text())
    named = set(run["machine_info"]) | set(run["commit_info"])
    assert named <= {
        "cpu",
        "cores",
        "load",
        "threads",
        "gpu",
        "cuda",
        "system",
        "python",
        "torch",
        "triton",
        "transformers",
        "numpy",
        "id",
        "dirty",
    }
    assert "/home" not in path.read_text() and "/tmp" not in path.read_text()
