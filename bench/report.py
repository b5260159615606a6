"""Recorded runs as tables (markdown, on stdout) and as the chart of their headline cases.

    python bench/report.py bench/results/*_cpu.json --chart bench/results/cpu.png

Runs are those of `--benchmark-json`. First one line for each case, then one table for each. Times are medians
over rounds in which providers took turns, with the least and the largest round; memory is peak memory above
the inputs. In the chart bars are times, each case on a scale of its own.
"""

import argparse
import json
from pathlib import Path

OURS, OURS_PARTLY, THEIRS, LESS_WORK = "#0072B2", "#8FC1DE", "#ADADAD", "#E0E0E0"


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--chart", type=Path, help="a file to draw, .png or .svg")
    arguments = parser.parse_args(arguments)
    cases, places = [], []
    for path in arguments.runs:
        run = json.loads(path.read_text())
        found = [bench["extra_info"] for bench in run["benchmarks"] if "providers" in bench["extra_info"]]
        if not found:
            parser.error(f"{path}: no cases of interleaved providers")
        cases += found
        places.append(where(run))
    print(summary(cases))
    for place in dict.fromkeys(places):
        print(f"\n{place}")
    for case in cases:
        print(f"\n**{case['title']}**\n\n{table(case)}")
    if arguments.chart:
        draw([case for case in cases if case["headline"]], places[0], arguments.chart)


def where(run: dict) -> str:
    """What the run ran on, in a line."""
    machine, commit = run["machine_info"], run["commit_info"]
    on = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    changes = " with changes" if commit["dirty"] else ""
    return (
        f"{on}; PyTorch {machine['torch']}, Triton {machine['triton']}; "
        f"commit {commit['id'][:7]}{changes}, {run['datetime'][:10]}"
    )


def summary(cases: list[dict]) -> str:
    """A line for each case: dentropy, what it reaches of the reference, and the others that do the work."""
    lines = [["", "dentropy", "", "others"]]
    for case in cases:
        ours = case["providers"]["dentropy"]
        if "not_run" in ours:
            lines.append([case["title"], f"not run: {ours['not_run']}", "", ""])
            continue
        others = [
            f"{name}: {figures(row)}"
            for name, row in case["providers"].items()
            if "error" in row and not name.startswith("dentropy")
        ]
        lines.append([case["title"], figures(ours), relative(ours, case), "<br>".join(others)])
    return markdown(lines)


def relative(row: dict, case: dict) -> str:
    """To the case's reference, where that ran."""
    if "times_reference" not in row:
        return ""
    if case["unit"]:
        return f"{row['fraction_of_reference']:.0%} of {case['reference']}"
    return f"{row['times_reference']:.1f} × {case['reference']}"


def table(case: dict) -> str:
    """Every provider of a case; below it where the time goes, if that was recorded."""
    head = ["time (rounds)", "rate", f"of {case['reference']}", "peak memory", "error"]
    if not case["unit"]:
        head[1:3] = [f"× {case['reference']}"]
    lines = [["", *head]]
    for name, row in case["providers"].items():
        if "not_run" in row:
            lines.append([name, f"not run: {row['not_run']}", *[""] * (len(head) - 1)])
            continue
        low, high = (duration(row[key]) for key in ("min_ms", "max_ms"))
        of_reference = [f"{row['times_reference']:.2f}" if "times_reference" in row else ""]
        if case["unit"]:
            fraction = f"{row['fraction_of_reference']:.0%}" if "fraction_of_reference" in row else ""
            of_reference = [rate(row["rate"], case["unit"]), fraction]
        lines.append(
            [
                name,
                f"{duration(row['median_ms'])} ({low} to {high})",
                *of_reference,
                memory(row["peak_mib_above_inputs"]),
                f"{row['error']:.0e}" if "error" in row else "",
            ]
        )
    spent = []
    for name, row in case["providers"].items():
        kinds = [f"{kind} {duration(ms)}" for kind, ms in row.get("ms_by_kind", {}).items()]
        spent += [f"\n{name}, one profiled call: {', '.join(kinds)}"] if kinds else []
    return "\n".join([markdown(lines), *spent])


def markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figures(row: dict) -> str:
    return f"{duration(row['median_ms'])}, {memory(row['peak_mib_above_inputs'])}"


def duration(ms: float) -> str:
    return f"{ms / 1e3:.3g} s" if ms >= 999.5 else f"{ms:.3g} ms"


def memory(mib: float) -> str:
    return f"{mib / 1024:.3g} GiB" if mib >= 1023.5 else f"{max(mib, 0):.0f} MiB"


def rate(value: float, unit: str) -> str:
    return f"{1e3 * value:.3g} GFLOP/s" if unit == "TFLOP/s" and value < 1 else f"{value:.3g} {unit}"


def draw(cases: list[dict], place: str, path: Path) -> None:
    """A panel of bars for each case, the fastest way on top, names and figures beside the bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ran = [{name: row for name, row in case["providers"].items() if "not_run" not in row} for case in cases]
    heights = [len(rows) + 1.2 for rows in ran]
    figure, panels = plt.subplots(
        len(cases), figsize=(8.6, 0.3 * sum(heights) + 0.6), height_ratios=heights, layout="constrained", squeeze=False
    )
    for axes, case, rows in zip(panels[:, 0], cases, ran):
        rows = dict(sorted(rows.items(), key=lambda item: item[1]["median_ms"]))
        longest = max(row["median_ms"] for row in rows.values())
        gap = 0.012 * longest
        for height, (name, row) in enumerate(rows.items()):
            less = LESS_WORK if "error" not in row else THEIRS
            color = OURS if name == "dentropy" else OURS_PARTLY if name.startswith("dentropy") else less
            look = dict(va="center", fontsize=9, weight="bold" if name == "dentropy" else "normal")
            axes.barh(height, row["median_ms"], 0.7, color=color)
            axes.text(-gap, height, name, ha="right", **look)
            axes.text(row["median_ms"] + gap, height, figures(row), **look)
        axes.set(xlim=(-0.62 * longest, 1.3 * longest), ylim=(len(rows) - 0.4, -0.6))
        axes.set_title(case["title"], loc="left", fontsize=9.5, color="0.25")
        axes.axis("off")
    note = (
        f"Time (median of {cases[0]['rounds']} interleaved rounds), peak memory above the inputs; "
        f"light bars do less of the work.\n{place}"
    )
    figure.supxlabel(note, fontsize=8, color="0.4", x=0.01, ha="left")
    figure.savefig(path, dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    main()
