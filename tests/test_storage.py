import gzip
import json
import sys

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from shard_files import picture, write_table, write_tar

from transfusion.data import storage
from transfusion.data.build import build
from transfusion.data.check import check
from transfusion.data.storage import (
    MOST,
    SHORT,
    UNREADABLE,
    Span,
    names_below,
    open_url,
    read_spans,
    stamp,
    stamps_below,
    why,
)


@pytest.fixture
def memory():
    """A store that is no disk."""
    store = fsspec.filesystem("memory")
    store.pipe({"/box/a.tar": b"abcdef", "/box/deep/b.tar": b"ghi", "/box/.hidden": b"x"})
    yield store
    store.rm("/box", recursive=True)


def test_spans_of_files_here_and_elsewhere_come_back_in_the_order_asked(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.0,))
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
    found = read_spans(spans)
    gone = [found.pop(i) for i in (5, 2)]  # of files that are not there, which are not asked for again
    assert found == [b"bc", b"456", b"ghi", SHORT, SHORT, b"0"]
    assert all(word.startswith(f"{UNREADABLE}: FileNotFoundError: ") for word in gone)


def test_a_folder_lists_its_files_but_hidden_ones_here_and_elsewhere(tmp_path, memory):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".none").mkdir()
    for name in ("a.tar", "deep/b.tar", ".hidden", ".none/c.tar"):
        (tmp_path / name).write_bytes(b"x")
    memory.pipe("/box/.none/c.tar", b"x")
    names = ["a.tar", "deep/b.tar"]
    assert names_below(tmp_path) == [*stamps_below(str(tmp_path))] == [*stamps_below("memory://box")] == names
    assert all(
        found == stamp(f"{folder}/{name}")
        for folder in (str(tmp_path), "memory://box")
        for name, found in stamps_below(folder).items()
    )


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


class ClientError(Exception):
    """What no package that is imported here knows."""


class Breaking(MemoryFileSystem):
    """A store that fails as the packages of stores do: with errors of their own, wherever it is said to."""

    protocol = "breaking"
    cachable = False
    store = MemoryFileSystem.store
    fails: tuple[str, ...] = ()
    calls = 0  # that have asked for ranges
    heals = 10**9  # from which of these on they are answered

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("breaking://", "memory://"))

    def give(self, what: str, name: str):
        if what in self.fails and "bad" in name:
            raise ClientError("an error occurred\n(SlowDown)" + " when calling" * 99)

    def _open(self, path, *args, **options):
        self.give("open", path)
        file = super()._open(path, *args, **options)
        reads = file.read

        def read(n=-1):
            if file.tell() > 0 or "early" in self.fails:
                self.give("read", path)
            return reads(min(n, 500) if "read" in self.fails else n)

        file.read = read
        return file

    def info(self, path, **options):
        self.give("info", path)
        return super().info(path, **options)

    def find(self, path, *args, **options):
        self.give("find", path)
        return super().find(path, *args, **options)

    def cat_file(self, path, start=None, end=None, **options):
        Breaking.calls += 1
        if Breaking.calls < Breaking.heals:
            self.give("ranges", path)
        return super().cat_file(path, start, end, **options)


@pytest.fixture
def breaking(monkeypatch, memory):
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(Breaking, "calls", 0)
    fsspec.register_implementation("breaking", Breaking, clobber=True)
    return Breaking


FILES = {"images": "bad.tar", "text": "bad.jsonl.gz", "documents": "bad.parquet"}


@pytest.fixture
def there(tmp_path, breaking):
    """A good and a bad shard of each kind, in the store."""
    store = fsspec.filesystem("memory")
    samples = {"a.png": picture(), "a.txt": "a"}
    for _ in range(2):
        store.pipe("/box/images/bad.tar", write_tar(tmp_path / "a.tar", samples).read_bytes())
        store.pipe("/box/images/good.tar", (tmp_path / "a.tar").read_bytes())
    lines = gzip.compress("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(9)).encode())
    table = write_table(tmp_path / "a.parquet", segments=[[{"text": f"a {i}"}] for i in range(9)]).read_bytes()
    for name, data in (("text/{}.jsonl.gz", lines), ("documents/{}.parquet", table)):
        for which in ("bad", "good"):
            store.pipe("/box/" + name.format(which), data)
    return "breaking://box"


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("fails", [("open",), ("read",), ("read", "early")])
def test_a_shard_whose_store_raises_errors_of_its_own_is_told_and_left_out(
    tmp_path, there, breaking, kind, fails, monkeypatch
):
    monkeypatch.setattr(breaking, "fails", fails)
    found = {one.url.rpartition("/")[2]: one for one in check(kind, [f"{there}/{kind}"])}
    bad = found.pop(FILES[kind])
    (good,) = found.values()
    assert good.usable and not good.left and not bad.usable
    assert [reason for reason in bad.left if "cannot be read" in reason] == ["shard that cannot be read"]
    dataset = build(kind, [f"{there}/{kind}"], tmp_path / "built")
    bad, good = dataset["shards"]
    assert bad["problem"].startswith("shard that cannot be read: ClientError: an error occurred (SlowDown) when")
    assert len(bad["problem"]) < 2 * MOST and good["samples"]
    monkeypatch.setattr(breaking, "fails", ())
    again = build(kind, [f"{there}/{kind}"], tmp_path / "built")  # which tries what could not be read
    assert [shard["samples"] for shard in again["shards"]] == [good["samples"]] * 2


@pytest.mark.parametrize("source, fails", [("bad.tar", "info"), ("{1..3}.bad.tar", "info"), ("bad", "find")])
def test_a_source_that_cannot_be_listed_is_refused_with_the_remedy(
    tmp_path, there, breaking, source, fails, monkeypatch
):
    monkeypatch.setattr(breaking, "fails", (fails,))
    with pytest.raises(ValueError, match=r"bad.* cannot be (read|listed) \(ClientError: an error .*: name a f"):
        build("images", [f"{there}/{source}"], tmp_path / "built")


def test_ranges_that_a_store_did_not_give_are_asked_for_again(breaking, memory, monkeypatch):
    memory.pipe({"/box/bad.tar": b"abcdef"})
    spans = [
        Span("breaking://box/a.tar", 0, 2),
        Span("breaking://box/bad.tar", 1, 2),
        Span("breaking://box/gone", 0, 1),
    ]
    monkeypatch.setattr(breaking, "fails", ("ranges",))
    monkeypatch.setattr(breaking, "heals", 5)  # the first call, of three ranges, and the second fail
    assert read_spans(spans)[:2] == [b"ab", b"bc"] and breaking.calls == 5
    monkeypatch.setattr(breaking, "heals", 10**9)
    good, bad, gone = read_spans(spans)
    assert good == b"ab" and gone.startswith(f"{UNREADABLE}: FileNotFoundError") and breaking.calls > 5
    assert bad.startswith(f"{UNREADABLE}: ClientError: an error occurred (SlowDown) when") and "\n" not in bad
    assert len(bad) <= len(UNREADABLE) + 2 + MOST


def test_a_range_that_came_too_short_is_asked_for_again(breaking, memory, monkeypatch):
    answers = iter([b"a", b"ab"])
    monkeypatch.setattr(breaking, "cat_file", lambda self, path, start=None, end=None, **options: next(answers))
    assert read_spans([Span("breaking://box/a.tar", 0, 2)]) == [b"ab"]


class Hosts(MemoryFileSystem):
    """A store whose host is part of the file system, as of sftp and hdfs."""

    protocol = "hosts"

    def __init__(self, host="", **options):
        super().__init__(**options)
        self.host = host

    @staticmethod
    def _get_kwargs_from_urls(path):
        return {"host": path.removeprefix("hosts://").partition("/")[0]}

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("hosts://").partition("/")[2]

    def cat_file(self, path, start=None, end=None, **options):
        return f"{self.host}{path}".encode()[start:end]


def test_files_of_the_same_scheme_are_read_each_from_its_own_host():
    fsspec.register_implementation("hosts", Hosts, clobber=True)
    spans = [Span(f"hosts://{host}/x", 0, 3) for host in "aba"]
    assert read_spans(spans) == [b"a/x", b"b/x", b"a/x"]


def test_an_image_that_a_store_fails_to_give_costs_no_document_for_good(tmp_path, breaking, memory, monkeypatch):
    lines = [json.dumps({"segments": ["see", {"image": name}]}) + "\n" for name in ("bad.png", "gone.png")]
    memory.pipe({"/box/d/documents.jsonl": "".join(lines).encode(), "/box/d/bad.png": picture()})
    monkeypatch.setattr(breaking, "fails", ("open",))
    with pytest.raises(ValueError, match=r"documents\.jsonl: shard that cannot be read: ClientError"):
        build("documents", ["breaking://box/d"], tmp_path / "built")
    monkeypatch.setattr(breaking, "fails", ())
    assert build("documents", ["breaking://box/d"], tmp_path / "built")["skipped"] == {"missing image file": 1}


def test_a_name_that_no_file_can_have_is_a_file_that_is_not_there(tmp_path):
    for name in ("a\0b", "a" * 999, "~nobody-of-that-name/a"):
        with pytest.raises(OSError):
            open_url(str(tmp_path / name) if name[0] == "a" else name)
        assert read_spans([Span(name, 0, 1)])[0].startswith(UNREADABLE)


def test_a_reason_is_a_line(tmp_path):
    assert why(OSError("the disk\n is gone")) == "the disk is gone"
    assert why(KeyError("x" * 999)) == f"KeyError: '{'x' * (MOST - 11)}"
