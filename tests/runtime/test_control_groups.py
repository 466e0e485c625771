"""What control groups leave to a process, from files as Linux has them, and what is taken where there are none."""

from __future__ import annotations

import os

import pytest
import torch

from grcsf_fast.cli import main
from grcsf_fast.runtime import control_groups, memory

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes a group's files; of the process are /job and what is below it."""
    monkeypatch.setattr(control_groups, "ROOT", tmp_path)
    monkeypatch.setattr(control_groups, "PROCESS", tmp_path / "process")

    def write(lines: str, **files: str) -> None:
        (tmp_path / "process").write_text(lines)
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("100000 100000", 1), ("150000 100000", min(2, CORES)), ("1000 100000", 1), ("max 100000", CORES)],
)
def test_a_quota_of_version_2(groups, quota, cores):
    groups("0::/job/step\n", job__cpu_DOT_max=quota, job__step__cpu_DOT_max="max 100000")
    assert control_groups.usable_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("-1", CORES)])
def test_a_quota_of_version_1(groups, quota, cores):
    groups(
        "3:cpu,cpuacct:/job\n2:memory:/other\n",
        cpu__job__cpu_DOT_cfs_quota_us=quota, cpu__job__cpu_DOT_cfs_period_us="100000\n",
    )  # fmt: skip
    assert control_groups.usable_cores() == cores


def test_without_groups(groups):
    assert control_groups.usable_cores() == CORES
    groups("0::/gone\n")
    assert control_groups.usable_cores() == CORES


def test_memory_of_both_versions(groups):
    stat = "active_file 1000\ninactive_file 500\n"
    groups(
        "0::/job\n", job__memory_DOT_max="1000000", job__memory_DOT_current="600000", job__memory_DOT_stat=stat,
        memory__old__memory_DOT_limit_in_bytes="800000", memory__old__memory_DOT_usage_in_bytes="700000",
        memory__old__memory_DOT_stat="active_file 5\ntotal_active_file 2000\ntotal_inactive_file 300\n",
    )  # fmt: skip
    assert memory.available_memory() == 401500
    groups("1:memory:/old\n")
    assert memory.available_memory() == 102300


@pytest.mark.parametrize(("arguments", "threads"), [([], 1), (["--threads", "2"], 2)])
def test_a_command_takes_threads_by_the_quota(groups, monkeypatch, tmp_path, arguments, threads):
    """Unless it is told how many."""
    groups("0::/job\n", job__cpu_DOT_max="100000 100000")
    before, found = torch.get_num_threads(), []
    monkeypatch.setattr("grcsf_fast.cli.predict.run", lambda options: found.append(torch.get_num_threads()) or 0)
    try:
        torch.set_num_threads(2)
        assert main(["predict", "-i", str(tmp_path), "-o", str(tmp_path / "out"), *arguments]) == 0
    finally:
        torch.set_num_threads(before)
    assert found == [threads]


def test_a_system_without_the_files_of_linux(monkeypatch, tmp_path):
    """As macOS is, and Windows, which has no os.sysconf either."""
    monkeypatch.setattr(control_groups, "PROCESS", tmp_path / "none")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 2**21, "SC_PAGE_SIZE": 2**14}.__getitem__)
    assert memory.available_memory() == 16 * 2**30
    assert memory.memory_budget() == int(memory.FRACTION * 16 * 2**30)
    monkeypatch.delattr(os, "sysconf")
    assert memory.available_memory() == 8 * 2**30
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for cores in (10, None):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert control_groups.usable_cores() == (cores or 1)
