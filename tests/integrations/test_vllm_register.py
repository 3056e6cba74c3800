"""Who gets CUSTOM: nobody else's choice changes, and what cannot work is an error at the moment it is chosen."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_kit import OVERRIDES, Stub, vllm_config

ROOT = Path(__file__).resolve().parents[2]
PATH = "anabranch.integrations.vllm.backend.TreeAttentionBackend"


@pytest.fixture
def stub(monkeypatch):
    return Stub().install(monkeypatch)


def register():
    from anabranch.integrations.vllm import register

    register()


def chosen(stub, name="CUSTOM", **changes):
    """What vLLM's CPU platform asks for, whatever was chosen."""
    stub.config = vllm_config(attention_config__backend=stub.enum[name] if name else None, **changes)
    return stub.enum.CPU_ATTN.get_path()


def test_custom_is_ours_and_nothing_else(stub):
    for _ in range(3):  # loaded in every process, sometimes twice
        register()
    assert stub.enum.CUSTOM.get_path() == PATH and stub.enum.CUSTOM.get_path(False) == PATH.rsplit(".", 1)[0]
    assert chosen(stub) == PATH
    for other in (None, "CPU_ATTN"):
        assert chosen(stub, other) == "vllm.own.CPUAttentionBackend"
    stub.config = None
    assert stub.enum.CPU_ATTN.get_path(False) == "vllm.own"
    assert {member: path for member, path in OVERRIDES.items()} == {stub.enum.CUSTOM: PATH}


@pytest.mark.parametrize("first", [True, False])
def test_two_plugins_that_want_the_same_place(stub, first):
    if first:
        OVERRIDES[stub.enum.CUSTOM] = "other.plugin.Backend"
    register()
    OVERRIDES[stub.enum.CUSTOM] = "other.plugin.Backend"
    for ask in (stub.enum.CUSTOM.get_path, lambda: chosen(stub)):
        with pytest.raises(
            ValueError, match=r"two installed plugins want it, other\.plugin\.Backend and .*VLLM_PLUGINS"
        ):
            ask()
    assert chosen(stub, None) == "vllm.own.CPUAttentionBackend"  # who chose neither is not disturbed


def test_another_plugin_for_the_cpu_keeps_its_place(stub):
    register()
    OVERRIDES[stub.enum.CPU_ATTN] = "other.plugin.Cpu"
    assert chosen(stub, None) == "other.plugin.Cpu" and chosen(stub) == PATH


@pytest.mark.parametrize(
    "version,taken", [("0.32.0", True), ("0.32.0+cpu", True), ("0.32.1", False), ("0.33.0", False), ("dev", False)]
)
def test_versions(monkeypatch, version, taken):
    stub = Stub(version).install(monkeypatch)
    monkeypatch.delenv("ANABRANCH_VLLM_UNTESTED", raising=False)
    register()
    assert chosen(stub, None) == "vllm.own.CPUAttentionBackend"
    if taken:
        assert chosen(stub) == PATH
        return
    with pytest.raises(ValueError, match=rf"tested with vLLM 0\.32\.0, this is {version}.*install vllm==0\.32\.0"):
        chosen(stub)
    monkeypatch.setenv("ANABRANCH_VLLM_UNTESTED", "1")
    assert chosen(stub) == PATH


def test_kinds_of_layers_cannot_differ_on_a_cpu(stub):
    register()
    ours, own = stub.enum.CUSTOM, stub.enum.CPU_ATTN
    for name, kinds in (("CUSTOM", {"full_attention": own}), (None, {"sliding_window": ours})):
        with pytest.raises(ValueError, match=f"backend_per_kind.*{next(iter(kinds))} differ"):
            chosen(stub, name, attention_config__backend_per_kind=kinds)
    assert chosen(stub, "CUSTOM", attention_config__backend_per_kind={"full_attention": ours}) == PATH


def test_a_vllm_that_is_not_understood_is_left_alone(monkeypatch, caplog):
    stub = Stub()
    for change in ("module", "member"):
        if change == "module":
            del stub.modules["vllm.v1.attention.backends.registry"]
        else:
            stub.modules["vllm.v1.attention.backends.registry"] = {
                "AttentionBackendEnum": object,
                "register_backend": None,
            }
        stub.install(monkeypatch)
        with caplog.at_level(logging.WARNING, "vllm.anabranch"):
            register()
        assert "registers no attention backend with this vLLM (0.32.0)" in caplog.text
        caplog.clear()


def test_the_entry_point_is_declared_and_light():
    declared = '[project.entry-points."vllm.general_plugins"]\nanabranch = "anabranch.integrations.vllm:register"'
    assert declared in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    code = "import sys; from anabranch.integrations.vllm import register; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
