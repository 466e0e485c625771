"""Writing a page: data that nothing breaks out of, in order, taken one by one, whole or not at all."""

import json
import os

import pytest

from grcsf_fast.data.page import in_address, write_page

NASTY = ["</script>", "<!--", "]]>", "&lt;", "\u2028", '"', "\\", "{{b}}", "\ud800", "ü", os.fsdecode(b"\xf6")]


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "template.html"
    path.write_text("<p>ü</p><script>{{a}}</script><script>{{b}}</script>", encoding="utf-8")
    return path


def test_data_stays_where_it_is_put(tmp_path, template):
    written = write_page(tmp_path / "page.html", template, {"a": NASTY, "b": {"x": float("nan"), "y": (1, 2.5)}})
    text = written.read_text(encoding="utf-8")
    before, *scripts = text.split("<script>")
    assert before == "<p>ü</p>"
    assert text.count("<") == 6
    assert [json.loads(script.removesuffix("</script>")) for script in scripts] == [NASTY, {"x": None, "y": [1, 2.5]}]


def test_items_are_taken_one_by_one(tmp_path, template):
    """The second block is read when the first one's items are through, so that it may be what they added up to."""
    met = []

    def items():
        for number in range(3):
            met.append(number)
            yield {"number": number}

    text = write_page(tmp_path / "page.html", template, {"a": items(), "b": met}).read_text(encoding="utf-8")
    assert '{"number":0},\n{"number":1}' in text
    assert "<script>[0,1,2]</script>" in text
    text = write_page(tmp_path / "page.html", template, {"a": iter(()), "b": []}).read_text(encoding="utf-8")
    assert text.count("<script>[]</script>") == 2


def test_what_is_shared_is_inside(tmp_path):
    template = tmp_path / "template.html"
    template.write_text("{{head}}<style>{{style}}</style>{{body}}<script>{{script}}</script>")
    text = write_page(tmp_path / "page.html", template, {}).read_text(encoding="utf-8")
    assert "Content-Security-Policy" in text
    assert '<input type="search"' in text
    assert "@media print" in text
    assert "const page =" in text
    assert "{{" not in text


def test_whole_or_not_at_all(tmp_path, template):
    target = tmp_path / "page.html"
    target.write_text("former")

    def failing():
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_page(target, template, {"a": failing(), "b": 0})
    assert target.read_text() == "former"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "template.html"]
    target.unlink()
    target.mkdir()
    with pytest.raises(OSError, match=r"page\.html: could not be written: .*found a folder"):
        write_page(target, template, {"a": 0, "b": 0})


def test_addresses():
    assert in_address("a b/ü?#:%") == "a%20b%2F%C3%BC%3F%23%3A%25"
    assert in_address(os.fsdecode(b"\xf6.png")) == "%F6.png"
