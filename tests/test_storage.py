import sys

import fsspec
import pytest

from transfusion.data.storage import UNREADABLE, Span, names_below, open_url, read_spans, stamp


@pytest.fixture
def memory():
    """A store that is no disk."""
    store = fsspec.filesystem("memory")
    store.pipe({"/box/a.tar": b"abcdef", "/box/deep/b.tar": b"ghi", "/box/.hidden": b"x"})
    yield store
    store.rm("/box", recursive=True)


def test_spans_of_files_here_and_elsewhere_come_back_in_the_order_asked(tmp_path, memory):
    (tmp_path / "c").write_bytes(b"0123456789")
    here = str(tmp_path / "c")
    spans = [
        Span("memory://box/a.tar", 1, 2),
        Span(here, 4, 3),
        Span(str(tmp_path / "gone"), 0, 1),
        Span("memory://box/deep/b.tar", 0, 3),
        Span(here, 8, 5),
        Span("memory://box/gone", 0, 1),
        Span("memory://box/a.tar", 5, 9),
        Span("file://" + here, 0, 1),
    ]
    short = "file that ends too early"
    assert read_spans(spans) == [b"bc", b"456", UNREADABLE, b"ghi", short, UNREADABLE, short, b"0"]


def test_a_folder_lists_its_files_but_hidden_ones_here_and_elsewhere(tmp_path, memory):
    (tmp_path / "deep").mkdir()
    for name in ("a.tar", "deep/b.tar", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    assert names_below(str(tmp_path)) == names_below("memory://box") == ["a.tar", "deep/b.tar"]


def test_a_stamp_changes_with_the_file(tmp_path, memory):
    for url in (str(tmp_path / "a"), "memory://box/new"):
        with fsspec.open(url, "wb") as file:
            file.write(b"one")
        first = stamp(url)
        assert first.bytes == 3 and stamp(url) == first
        with fsspec.open(url, "wb") as file:
            file.write(b"three")
        assert stamp(url) != first and stamp(url).bytes == 5
        with open_url(url) as file:
            assert file.read() == b"three"
        with pytest.raises(OSError):
            stamp(url + "gone")


def test_what_has_to_be_installed_is_said(monkeypatch):
    with pytest.raises(ValueError, match=r"unknownscheme|Protocol not known"):
        open_url("unknownscheme://x")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ValueError, match=r"pip install 'transfusion\[remote\]'"):
        open_url("memory://box/a.tar")
