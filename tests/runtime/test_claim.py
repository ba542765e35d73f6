"""A run's birth: the same for all its coordinators, another for a run that gets the folder of one that was deleted."""

from __future__ import annotations

from elastic_lm.runtime.claim import birth_of
from elastic_lm.storage import Storage


def test_birth_is_drawn_once(folder_url: str) -> None:
    storage = Storage.open(folder_url)
    assert birth_of(storage) == birth_of(storage) != ""


def test_run_that_is_begun_again_in_an_emptied_folder_has_another(folder_url: str) -> None:
    storage = Storage.open(folder_url)
    before = birth_of(storage)
    for name in storage.list():
        storage.delete(name)
    assert birth_of(storage) != before


class Slow(Storage):
    """Somebody else draws between our look and our draw."""

    theirs = ""

    def child(self, path: str) -> Storage:
        return Slow(super().child(path).url)

    def create(self, path: str, data: bytes) -> None:
        Slow.theirs = birth_of(Storage.open(self.url.removesuffix("/owner")))
        super().create(path, data)


def test_of_two_that_draw_at_once_one_counts(folder_url: str) -> None:
    assert birth_of(Slow(folder_url)) == Slow.theirs != ""
