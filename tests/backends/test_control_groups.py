"""What control groups and the system leave to a process: cores and memory."""

import pytest

from anabranch.backends.control_groups import available_memory, cpu_quota

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


# ------------------------------------------------------------------------------------------------ memory

GB = 2**30


def machine(root, groups, mounts, files, available=8):
    tree(root, groups, mounts, files)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemFree: 5 kB\nMemAvailable:   {available * GB // 1024} kB\n")
    return root


def test_what_the_system_has(tmp_path):
    assert available_memory(tmp_path) is None
    assert available_memory(machine(tmp_path, "", None, {})) == 8 * GB


def test_a_meminfo_of_an_old_system(tmp_path):
    (tmp_path / "proc").mkdir()
    for text in ("MemFree: 5 kB\n", "MemAvailable:\n", "MemAvailable: some kB\n", ""):
        (tmp_path / "proc/meminfo").write_text(text)
        assert available_memory(tmp_path) is None


@pytest.mark.parametrize(
    ("most", "used", "stat", "expected"),
    [
        (f"{4 * GB}\n", f"{GB}\n", "anon 1\ninactive_file 0\n", 3),
        (f"{4 * GB}", f"{3 * GB}", f"active_file 7\ninactive_file {2 * GB}\n", 3),  # files that can be dropped
        (f"{4 * GB}", f"{5 * GB}", "", 0),
        ("max", f"{GB}", "", 8), ("", "", "", 8), (f"{20 * GB}", f"{GB}", "", 8),
    ],
)  # fmt: skip
def test_memory_of_version_2(tmp_path, most, used, stat, expected):
    files = {"a/memory.max": most, "a/memory.current": used, "a/memory.stat": stat, "memory.max": "max"}
    assert available_memory(machine(tmp_path, "0::/a\n", V2.format(top="/"), files)) == expected * GB


def test_memory_of_version_1(tmp_path):
    files = {
        "memory/pod/memory.limit_in_bytes": f"{6 * GB}\n", "memory/pod/memory.usage_in_bytes": f"{5 * GB}\n",
        "memory/pod/memory.stat": f"inactive_file 0\ntotal_inactive_file {GB}\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "1\n",
        "cpu,cpuacct/pod/memory.limit_in_bytes": "1", "cpu,cpuacct/pod/memory.usage_in_bytes": "0",
    }  # fmt: skip
    groups = "5:memory:/pod\n4:cpuacct,cpu:/pod\n0::/\n"
    assert available_memory(machine(tmp_path, groups, V1.format(top="/"), files)) == 2 * GB
