"""How many threads the CPU kernels take: torch's number, the cores of this process, quotas of control groups."""

import pytest
import torch

from anabranch.backends import cpu, threads
from anabranch.backends.threads import Limits, cpu_quota

V2 = "36 29 0:32 {top} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup rw,nsdelegate\n"
V1 = (
    "33 29 0:30 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "34 29 0:31 {top} /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
)


def tree(root, groups, mounts, files):
    """A fake machine: what /proc says, and files below /sys/fs/cgroup."""
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(groups)
    if mounts is not None:
        (proc / "mountinfo").write_text("21 1 8:1 / / rw - ext4 /dev/root rw\n" + mounts)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_no_control_groups(tmp_path):
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", None), ("150000 100000\n", 1.5), ("50000 100000", 0.5), ("", None), ("x y", None), ("1", None),
        ("0 100000", None), ("100000 0", None),
    ],
)  # fmt: skip
def test_version_2(tmp_path, text, expected):
    assert cpu_quota(tree(tmp_path, "0::/\n", V2.format(top="/"), {"cpu.max": text})) == expected


def test_the_smallest_on_the_way_up_counts(tmp_path):
    files = {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "300000 100000"}
    assert cpu_quota(tree(tmp_path, "0::/a/b/c\n", V2.format(top="/"), files)) == 2.0


def test_a_group_beside_ours_does_not_count(tmp_path):
    files = {"ab/cpu.max": "100000 100000", "a/cpu.max": "400000 100000"}
    assert cpu_quota(tree(tmp_path, "0::/a\n", V2.format(top="/"), files)) == 4.0


@pytest.mark.parametrize("mounts", [V2.format(top="/docker/1f"), V2.format(top="/"), None])
def test_a_container_that_sees_the_hosts_path(tmp_path, mounts):
    """The path is the host's, the tree is mounted from the container's own group on."""
    assert cpu_quota(tree(tmp_path, "0::/docker/1f\n", mounts, {"cpu.max": "250000 100000"})) == 2.5


def test_a_path_outside_of_the_namespace(tmp_path):
    assert cpu_quota(tree(tmp_path, "0::/../../x\n", V2.format(top="/"), {"cpu.max": "100000 50000"})) == 2.0


def test_version_1(tmp_path):
    files = {
        "cpu,cpuacct/pod/cpu.cfs_quota_us": "120000\n", "cpu,cpuacct/pod/cpu.cfs_period_us": "40000\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "memory/pod/cpu.cfs_quota_us": "1\n", "memory/pod/cpu.cfs_period_us": "100000\n",
    }  # fmt: skip
    groups = "5:memory:/pod\n4:cpuacct,cpu:/pod\n1:name=systemd:/pod\n0::/\n"
    assert cpu_quota(tree(tmp_path, groups, V1.format(top="/"), files)) == 3.0


def test_version_1_without_a_table_of_mounts(tmp_path):
    files = {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}
    assert cpu_quota(tree(tmp_path, "4:cpu:/\n", None, files)) == 0.5


def test_version_1_without_a_quota(tmp_path):
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}
    assert cpu_quota(tree(tmp_path, "4:cpu,cpuacct:/\n", V1.format(top="/"), files)) is None


@pytest.mark.parametrize(
    ("limits", "of_torch", "expected"),
    [
        (Limits(8, 8, None), 8, 8),
        (Limits(8, 8, None), 3, 3),  # torch.set_num_threads(3)
        (Limits(8, 2, None), 8, 2),
        (Limits(8, 8, 2.9), 8, 2),
        (Limits(8, 8, 0.5), 8, 1),
        (Limits(8, 2, 4.0), 8, 2),
        (Limits(8, 2, 1.0, torch_is_told=True), 8, 8),
        (Limits(8, 2, 1.0, asked=5), 8, 5),
        (Limits(8, 2, 1.0, asked=5, torch_is_told=True), 3, 5),
    ],
)
def test_the_number(limits, of_torch, expected):
    assert limits.threads(of_torch) == expected


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, and lets limits be read anew."""
    for name in ("OMP_NUM_THREADS", threads.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 300)

    def use(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        threads.limits.cache_clear()

    yield use
    monkeypatch.undo()
    threads.limits.cache_clear()


def test_without_variables(environment):
    environment()
    assert threads.count() == min(300, threads.limits().most)


def test_our_own_variable_decides(environment):
    environment(OMP_NUM_THREADS="2", ANABRANCH_NUM_THREADS="7")
    assert threads.count() == 7 and "ANABRANCH_NUM_THREADS says so" in str(threads.explain()["why"])


def test_torchs_variable_is_followed_as_it_is(environment):
    environment(OMP_NUM_THREADS="2")
    assert threads.count() == 300  # torch.set_num_threads came after it


@pytest.mark.parametrize("wrong", ["0", "-1", "many", "2.5", "99999"])
def test_a_wrong_variable_is_the_reason_why_the_backend_does_not_run(environment, wrong):
    environment(ANABRANCH_NUM_THREADS=wrong)
    assert f"ANABRANCH_NUM_THREADS='{wrong}': expected a whole number" in cpu.unavailable.__wrapped__()


def test_reasons(monkeypatch):
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 8)
    for limits, reason in (
        (Limits(8, 8, None), "as many as torch has"),
        (Limits(8, 2, None), "this process is bound to 2 of 8 cores"),
        (Limits(8, 8, 2.5), "quota is 2.5 cores"),
        (Limits(8, 2, 4.0), "bound to 2 of 8 cores"),
        (Limits(8, 2, None, torch_is_told=True), "OMP_NUM_THREADS is set"),
    ):
        monkeypatch.setattr(threads, "limits", lambda limits=limits: limits)
        assert reason in threads.explain()["why"]
