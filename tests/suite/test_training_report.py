"""The page that benchmarks/training.py writes."""

import sys

from benchmarks import training


def test_the_report_says_where_and_how(monkeypatch, tmp_path, capsys):
    asked = []

    def rows(*options):
        asked.append(options)
        return ["| cases made by |", "| 2 workers |"]

    monkeypatch.setattr(training, "rows", rows)
    page = tmp_path / "training.md"
    monkeypatch.setattr(sys, "argv", ["training", "-o", str(page), "--cases", "5", "--workers", "2"])
    assert training.main() == 0
    assert asked == [(5, 20, [2])]
    text = page.read_text()
    assert "| 2 workers |" in text
    assert "5 of them measured" in text
    assert f"`python -m benchmarks.training -o {page} --cases 5 --workers 2`" in text
    assert "| 2 workers |" in capsys.readouterr().out
