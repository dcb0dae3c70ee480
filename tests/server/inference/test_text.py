from __future__ import annotations

from fwdllama_server.inference.text import TextStream
from hypothesis import given
from hypothesis import strategies as st

LETTERS = st.text("ab\n\u00e9\u20ac\U0001f600", max_size=30)
STOPS = st.lists(st.text("ab\n\u00e9", min_size=1, max_size=4), max_size=4)


@given(LETTERS, STOPS, st.data())
def test_text_is_that_before_the_first_stop_however_the_bytes_come(text: str, stops: list[str], data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=10)))
    stream = TextStream(stops)
    sent = ""
    for begin, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        sent += stream.feed(raw[begin:end])
        assert text.startswith(sent), "what was sent is never taken back"
    sent += stream.finish()
    ends = [text.index(stop) for stop in stops if stop in text]
    if stream.stopped:
        assert not any(stop in sent for stop in stops)
        assert any(text.startswith(sent + stop) for stop in stops)
    else:
        assert not ends
        assert sent == text


def test_of_stops_that_come_with_one_token_the_first_counts() -> None:
    stream = TextStream(["cd", "b"])
    assert stream.feed(b"abcd") == "a"
    assert stream.stopped


def test_what_may_become_a_stop_is_held_back_and_sent_when_it_does_not() -> None:
    stream = TextStream(["###"])
    assert [stream.feed(piece) for piece in (b"a#", b"#", b"b", b"##")] == ["a", "", "##b", ""]
    assert stream.finish() == "##"


def test_a_character_that_the_last_token_cut_in_two_is_left_out() -> None:
    stream = TextStream()
    assert stream.feed("a\u20ac".encode()[:-1]) == "a"
    assert stream.finish() == ""


def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    assert TextStream().feed(b"a\xff\xffb") == "a\ufffd\ufffdb"
