"""What people keep is theirs: marks, tags and notes, whoever else is there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locally.errors import UsageError
from locally.page.people import TAGS, Kept, Kind, People, tag_of
from locally.page.store import Store
from locally.page.tags import tag_filter


@pytest.fixture
def people() -> People:
    return People(Store())


@pytest.fixture
def ada(people):
    return people.welcome("cookie:a")


def test_a_person_is_met_once(people, ada):
    assert people.welcome("cookie:a") == ada
    assert people.known(key="cookie:a") == people.known(number=ada.id) == ada
    assert people.known(key="cookie:b") is None
    people.rename(ada, "  Ada \n Lovelace ")
    assert people.known(number=ada.id).name == "Ada Lovelace"
    with pytest.raises(UsageError, match="letter or a digit"):
        people.rename(ada, " ​ ")


def test_marks_are_set_once_and_taken_back(people, ada):
    mary = people.welcome("cookie:m")
    assert people.mark(ada, "p", Kind.VOTE, True) == 1
    assert people.mark(ada, "p", Kind.VOTE, True) == 1
    assert people.mark(mary, "p", Kind.VOTE, True) == 2
    assert people.votes() == people.votes(["p", "q"]) == {"p": 2}
    assert people.mark(ada, "p", Kind.VOTE, False) == 1
    assert people.belongings(ada).of("p") == Kept()
    assert people.belongings(mary).of("p").kinds == {"vote"}


def test_what_is_read_waits_no_longer(people, ada):
    people.mark(ada, "p", Kind.LATER, True)
    people.mark(ada, "p", Kind.READ, True)
    assert people.belongings(ada).of("p").kinds == {"read"}


def test_tags_are_one_persons(people, ada):
    people.tag(ada, "p", "Optics, to  cite,, optics")
    assert people.belongings(ada).of("p").tags == ("optics", "to-cite")
    assert people.belongings(people.welcome("cookie:m")).of("p").tags == ()
    people.tag(ada, "p", "optics", on=False)
    assert people.belongings(ada).of("p").tags == ("to-cite",)
    with pytest.raises(UsageError, match=f"{TAGS} tags"):
        people.tag(ada, "p", ",".join(f"t{i}" for i in range(TAGS)))
    assert people.belongings(ada).of("p").tags == ("to-cite",)


@pytest.mark.parametrize("bad", ["and", "-x", "a(b", "a|b", "x" * 41, "<b>", "#"])
def test_what_cannot_stand_in_a_filter_is_no_tag(people, ada, bad):
    with pytest.raises(UsageError, match="cannot be a tag"):
        people.tag(ada, "p", bad)


def test_notes_are_private_and_an_empty_one_goes_away(people, ada):
    people.note(ada, "p", " see\r\nsection 2 ")
    assert people.note_of(ada, "p") == "see\nsection 2"
    assert people.note_of(people.welcome("cookie:m"), "p") == ""
    people.note(ada, "p", "  ")
    assert people.note_of(ada, "p") == ""


class TestFilters:
    @pytest.mark.parametrize(
        ("text", "tags", "fits"),
        [
            ("", set(), True),
            ("a b", {"a", "b"}, True),
            ("a AND b", {"a"}, False),
            ("a or b and c", {"a"}, True),
            ("(a or b) c", {"a"}, False),
            ("not a", set(), True),
            ("-a", {"a"}, False),
            ("not not a", {"a"}, True),
            ("a -(b or c)", {"a", "c"}, False),
            ("a|b", {"b"}, True),
            ("to-cite", {"to-cite"}, True),
        ],
    )
    def test_and_or_not(self, text, tags, fits):
        assert tag_filter(text)(tags) is fits

    @pytest.mark.parametrize("text", ["(a", "a)", "or", "a or", "not", "()", "a and or b", "((((" * 200])
    def test_what_is_no_filter_is_told(self, text):
        with pytest.raises(UsageError, match="filter of tags"):
            tag_filter(text)

    @given(st.text("ab-()|& ornt", max_size=40))
    def test_no_text_breaks_it(self, text):
        try:
            wanted = tag_filter(text)
        except UsageError:
            return
        assert wanted({"a"}) in (True, False)

    @given(st.text(max_size=20))
    def test_every_tag_can_be_asked_for(self, text):
        try:
            tag = tag_of(text)
        except UsageError:
            return
        assert tag_filter(tag)({tag})
        assert not tag_filter(f"-{tag}")({tag})
