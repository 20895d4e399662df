import json

import pytest

from transfusion.data.text import load_text, split_texts


def jsonl(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def test_a_long_document_is_held_out_by_its_end(tmp_path):
    text = "\n".join(f"line {i} of a long document" for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    texts, report = load_text(str(tmp_path / "book.txt"))
    assert texts.train[0] + texts.held_out[0] == text
    assert texts.train[0].endswith("\n")
    assert 0.04 < len(texts.held_out[0]) / len(text) < 0.07
    assert report.kept == 1 and report.skipped == {}


def test_a_long_document_without_a_space_is_cut_anyway(tmp_path):
    (tmp_path / "book.txt").write_text("x" * 10_000)
    texts, _ = load_text(str(tmp_path / "book.txt"))
    assert (len(texts.train[0]), len(texts.held_out[0])) == (9500, 500)


def test_of_a_handful_of_books_each_keeps_most_of_its_text_for_training():
    books = [f"{name} " * 1000 for name in ("one", "two", "three")] + ["a short note"]
    train, held_out = split_texts(books)
    assert len(train) == 4 and len(held_out) == 3
    assert sum(map(len, train)) > 0.9 * sum(map(len, books))
    assert "".join(train) != "" and sorted("".join(train + held_out)) == sorted("".join(books))


def test_many_documents_are_held_out_whole_and_copies_stay_together():
    documents = [f"document {i}" for i in range(2000)]
    train, held_out = split_texts(documents + documents)
    assert 60 < len(set(held_out)) < 140
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(documents + documents)
    assert set(split_texts(documents)[1]) == set(held_out)


@pytest.mark.parametrize("n", [2, 5, 20, 30])
def test_at_least_one_of_several_documents_is_held_out_and_never_all(n):
    train, held_out = split_texts([f"note {i}" for i in range(n)])
    assert held_out and train


def test_one_short_document_or_copies_of_it_are_trained_on():
    assert split_texts(["a note"]) == (["a note"], [])
    assert split_texts(["a note"] * 3) == (["a note"] * 3, [])


def test_a_folder_holds_texts_and_json_lines_at_any_depth(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "deep").mkdir()
    jsonl(tmp_path / "deep" / "b.jsonl", {"text": "three"}, "", {"text": "four", "id": 7})
    (tmp_path / "deep" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no")
    texts, report = load_text(str(tmp_path))
    assert sorted(texts.train + texts.held_out) == ["four", "one\ntwo", "three"]
    assert report.kept == 3 and report.skipped == {}


def test_bad_documents_are_named_under_their_reason(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("wide".encode("utf-16"))
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nowhere")
    jsonl(tmp_path / "c.jsonl", '{"text": "cut', {"txt": "x"}, {"text": None}, [1], {"text": ""}, '{"text": "\\ud800"}')
    texts, report = load_text(str(tmp_path))
    assert texts.train == ["good"] and texts.held_out == [] and report.kept == 1
    assert report.skipped == {
        "empty document": ["blank.txt", "c.jsonl:5", "empty.txt"],
        "file that is not UTF-8": ["latin.txt", "wide.txt"],
        "file that cannot be read": ["dangling.jsonl:0", "dangling.txt"],
        "line that is not JSON": ["c.jsonl:1"],
        'line without "text"': ["c.jsonl:2", "c.jsonl:3"],
        "line that is not a JSON object": ["c.jsonl:4"],
        "line that is not UTF-8 text": ["c.jsonl:6"],
    }


def test_nothing_usable_says_what_was_found_and_what_is_expected(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"no text in .* \(1 files\): give 'shakespeare'.*\n.*\n.*empty\.txt"):
        load_text(str(tmp_path))
    with pytest.raises(ValueError, match="no file or folder"):
        load_text(str(tmp_path / "nowhere"))
    (tmp_path / "book.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match=r"neither \.txt nor \.jsonl"):
        load_text(str(tmp_path / "book.pdf"))
