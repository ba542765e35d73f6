"""Pieces: the same items give the same objects however they arrive, and come back in order."""

from __future__ import annotations

import itertools
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.data import pieces
from elastic_lm.data.pieces import PieceWriter, read_pieces
from elastic_lm.storage import Storage

folders = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pieces")


@given(num_items=st.integers(0, 40), piece_bytes=st.integers(1, 40), data=st.data())
@settings(max_examples=40)
def test_pieces_do_not_depend_on_how_items_arrive(
    folder: Path, num_items: int, piece_bytes: int, data: st.DataObject
) -> None:
    items = np.arange(num_items, dtype="<u4")
    cuts = data.draw(st.lists(st.integers(0, num_items), max_size=6))
    out = Storage.open(str(folder / str(next(folders))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        writer = PieceWriter(out, "items", "<u4")
        for start, stop in pairwise([0, *sorted(cuts), num_items]):
            writer.add(items[start:stop])
        assert writer.close() == num_items
        found = list(read_pieces(out, "items", "<u4", num_items))
    per_piece = max(1, piece_bytes // 4)
    assert [piece.tolist() for piece in found] == [
        items[start : start + per_piece].tolist() for start in range(0, num_items, per_piece)
    ]
    assert len(out.list()) == len(found)
