"""A choice of papers behaves as the list of its keys, though it writes out only what is looked at."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from locally.page.library import Chosen

KEYS = [f"card-{i}" for i in range(5)] + [f"26.{i}" for i in range(20)]
AT = {key: i for i, key in enumerate(KEYS)}
places = st.lists(st.integers(0, len(KEYS) - 1), unique=True)


def choice(chosen: list[int]) -> Chosen:
    return Chosen(KEYS, AT, np.array(chosen, dtype=np.int64), 5)


@given(places, st.slices(30))
def test_it_reads_like_a_list(chosen, part):
    keys, made = [KEYS[i] for i in chosen], choice(chosen)
    assert list(made) == keys
    assert made[part] == keys[part]
    assert len(made) == len(keys)
    assert made.cards == [key for key in keys if key.startswith("card")]
    assert made.fetched == len(keys) - len(made.cards)


@given(places, st.lists(st.sampled_from(KEYS[:5]), unique=True), st.booleans())
def test_only_some_of_the_cards(chosen, cards, fetched):
    wanted = [KEYS[i] for i in chosen if (KEYS[i] in cards if i < 5 else fetched)]
    assert list(choice(chosen).only(cards, fetched=fetched)) == wanted


@given(places, st.lists(st.sampled_from([*KEYS, "unheard of"]), unique=True))
def test_in_an_order_of_somebody_elses(chosen, order):
    keys = {KEYS[i] for i in chosen}
    assert list(choice(chosen).ordered(order)) == [key for key in order if key in keys]
