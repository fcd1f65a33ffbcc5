"""docs/performance.md quotes figures that bench/README.md has, and the commits that they were measured on."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text()
BENCH = (ROOT / "bench" / "README.md").read_text()


def test_every_figure_is_one_of_the_benchmarks():
    figures = re.findall(r"\d[\d,]*\.\d+(?= (?:×|s|ms)\b| ×)", PAGE)
    assert len(figures) > 20
    assert [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", BENCH)] == []


def test_every_peak_of_memory_is_one_of_the_benchmarks():
    peaks = re.findall(r"\| (\d+) MiB \|", PAGE)
    assert len(peaks) == 2
    assert [peak for peak in peaks if not re.search(rf"\b{peak}\b", BENCH)] == []


def test_every_commit_is_one_that_the_benchmarks_name():
    commits = set(re.findall(r"\b[0-9a-f]{10}\b", PAGE))
    assert commits
    assert commits <= set(re.findall(r"\b[0-9a-f]{10}\b", BENCH))
