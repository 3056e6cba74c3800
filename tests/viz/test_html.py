"""The page and the Perfetto export as files: self-contained, safe, whole or not there."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser

import pytest
from engine_kit import byte_tokenizer, make_engine
from typer.testing import CliRunner
from viz_kit import wide

from anabranch import viz
from anabranch.cli.app import app
from anabranch.records.files import write_whole
from anabranch.viz.html import page
from anabranch.viz.perfetto import perfetto


class Reader(HTMLParser):
    """Every element with its attributes, and the text of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.inside: list[tuple[str, dict, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.inside.append((tag, dict(attributes), ""))

    def handle_data(self, data):
        if self.inside and self.cdata_elem:
            tag, attributes, text = self.inside[-1]
            self.inside[-1] = tag, attributes, text + data


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    wide().trace().save(path)
    return path


def invoke(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def test_nothing_is_loaded_and_only_the_two_scripts_of_the_page_may_run():
    read = Reader(page(wide()))
    policy = next(a["content"] for tag, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert set(rules) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    allowed = {
        tag: [
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for which, attributes, text in read.inside
            if which == tag and attributes.get("type") != "application/json"
        ]
        for tag in ("script", "style")
    }
    assert rules["script-src"].split() == allowed["script"] and len(allowed["script"]) == 2
    assert rules["style-src"].split() == allowed["style"] and len(allowed["style"]) == 1
    for tag, attributes in read.elements:
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "style" not in attributes and attributes.get("href", "data:,") == "data:,"


def test_what_a_model_wrote_is_data_and_never_markup():
    prompt = "</script><script>alert(1)</script><!-- <b>né</b>"
    result = wide(prompt=prompt)
    evil = result.trace()
    object.__setattr__(evil, "strategy", "<img src=x onerror=alert(1)>(")
    object.__setattr__(evil, "model", "<i>@data@<i>")
    object.__setattr__(evil, "malformed", ("<script>alert(2)</script>",))
    text = page(evil)
    read = Reader(text)
    tags = [tag for tag, _ in read.elements]
    assert tags.count("script") == 3 and "img" not in tags and "b" in tags  # <b> is the page's own
    data = next(text for _, attributes, text in read.inside if attributes.get("type") == "application/json")
    assert "<" not in data and json.loads(data)["lanes"][0]["id"] == "0"
    assert "<i>@data@<i>" not in text and "&lt;i&gt;@data@&lt;i&gt;" in text
    assert "alert(1)" not in re.sub(r"&lt;[^<]*", "", text.split("</head>")[1].split("<script")[0])


def test_the_data_are_those_of_the_timeline():
    result = wide()
    drawn = viz.timeline(result)
    data = json.loads(next(t for _, a, t in Reader(page(result)).inside if a.get("type") == "application/json"))
    assert data["ids"] == drawn.ids and data["length"] == drawn.length == result.metrics.critical_path_tokens
    for lane, drawn_lane in zip(data["lanes"], drawn.lanes, strict=True):
        assert lane["clocks"] == [token.clock for token in drawn_lane.tokens]
        assert [bool(kind & 2) for kind in lane["kinds"]] == [token.cut for token in drawn_lane.tokens]
    assert any(kind & 2 for kind in data["lanes"][0]["kinds"])
    assert data["pieces"][str(byte_tokenizer()("é")["input_ids"][0])] == [0xC3]
    quiet = json.loads(
        next(t for _, a, t in Reader(page(make_engine().generate([1], max_new_tokens=2))).inside if a.get("type"))
    )
    assert quiet["pieces"] is None and quiet["lanes"][0]["logprobs"] is None


def test_perfetto_reads_lanes_as_threads_and_forks_as_flows():
    result = wide()
    out = json.loads(json.dumps(perfetto(result), allow_nan=False))
    events, lanes = out["traceEvents"], viz.timeline(result).lanes
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(names.values()) == [f"thread {lane.id}" for lane in lanes] and len(names) == len(lanes)
    slices = [e for e in events if e["ph"] == "X"]
    assert sum(e["cat"] in ("sampled", "inserted") for e in slices) == result.metrics.total_tokens
    assert all(e["ts"] >= 0 and e["dur"] > 0 for e in slices)
    for tid in names:  # slices of a track nest
        mine = sorted((e for e in slices if e["tid"] == tid), key=lambda e: (e["ts"], -e["dur"]))
        open_: list[int] = []
        for event in mine:
            while open_ and open_[-1] <= event["ts"]:
                open_.pop()
            assert not open_ or event["ts"] + event["dur"] <= open_[-1]
            open_.append(event["ts"] + event["dur"])
    flows = [e for e in events if e["ph"] in "sf"]
    assert len(flows) == 2 * len(viz.timeline(result).arrows)
    for begin, end in zip(flows[::2], flows[1::2], strict=True):
        assert begin["ph"] == "s" and end["ph"] == "f" and end["bp"] == "e" and begin["id"] == end["id"]
        assert begin["name"] == end["name"] and begin["cat"] == end["cat"] and begin["ts"] <= end["ts"]
        for flow in (begin, end):  # each lies in a slice of its track
            assert any(e["tid"] == flow["tid"] and e["ts"] <= flow["ts"] <= e["ts"] + e["dur"] for e in slices), flow
    counters = [e for e in events if e["ph"] == "C"]
    assert counters and all(e["args"]["held"] <= e["args"]["seen"] for e in counters)


# ------------------------------------------------------------------------------------------------ files


def test_view_writes_both_files_and_says_so(trace_file, tmp_path):
    html, chrome = tmp_path / "out.html", tmp_path / "out.json"
    result = invoke("view", str(trace_file), "--html", str(html), "--perfetto", str(chrome))
    assert "out.html written" in result.stderr and not result.stdout
    assert html.read_text(encoding="utf-8") == page(wide().trace())
    assert json.loads(chrome.read_text(encoding="utf-8")) == json.loads(json.dumps(perfetto(wide())))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.html", "out.json"]
    viz.save_html(wide(), html)  # over the old one, from a result
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_file_that_may_not_be_written(trace_file, tmp_path):
    before = trace_file.read_bytes()
    link = tmp_path / "link.json"
    link.symlink_to(trace_file)
    for path in (trace_file, link):
        assert "is the trace itself" in invoke("view", str(trace_file), "--html", str(path), code=2).stderr
    both = str(tmp_path / "x")
    assert "name two files" in invoke("view", str(trace_file), "--html", both, "--perfetto", both, code=2).stderr
    assert "no folder" in invoke("view", str(trace_file), "--html", str(tmp_path / "no" / "x"), code=2).stderr
    assert "--perfetto" in invoke("view", str(trace_file), "--perfetto", str(tmp_path), code=2).stderr
    assert trace_file.read_bytes() == before


def test_a_trace_cut_short_or_of_another_version(trace_file, tmp_path):
    cut, other = tmp_path / "cut.json", tmp_path / "other.json"
    cut.write_bytes(trace_file.read_bytes()[:3000])
    other.write_text(json.dumps(wide().trace().as_dict() | {"version": 9}), encoding="utf-8")
    out = tmp_path / "out.html"
    assert "cut short" in invoke("view", str(cut), "--html", str(out), code=1).stderr
    assert "use the anabranch that wrote it" in invoke("view", str(other), "--html", str(out), code=1).stderr
    assert not out.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_told(trace_file):
    result = invoke("view", str(trace_file), "--html", "/dev/full", code=1)
    assert "No space left" in result.stderr and "Traceback" not in result.stderr


def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "out.html"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="what was there is unchanged") as error:
        write_whole(path, "new")
    assert error.value.errno == 28 and error.value.filename == str(path)
    with pytest.raises(OSError):
        wide().trace().save(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_permissions_stay(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_whole(link, "new \ud800")
    assert link.is_symlink() and target.read_text() == "new ?" and target.stat().st_mode & 0o777 == 0o640
