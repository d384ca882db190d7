"""The glyph set: what is in it, that nothing leaks into the test, the cache, and the sampler."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("platformdirs")

from metafast.demo import glyphs as module
from metafast.demo.glyphs import TEST_ALPHABETS, TRAIN_ALPHABETS, Glyphs, TaskSampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "glyphs"  # shared with test_demo, so that letters are drawn once


@pytest.fixture(scope="module")
def glyphs(folder: Path) -> Glyphs:
    return module.load(folder=folder)


def make(letters: int = 40, faces: int = 8, alphabet: str = "GREEK") -> Glyphs:
    """A small set whose images say where they are: image i holds i % 251 in every pixel."""
    variants = module.VARIANTS
    count = letters * faces * variants
    images = (torch.arange(count) % 251).to(torch.uint8).view(-1, 1, 1).expand(-1, 28, 28).contiguous()
    return Glyphs(
        images=images,
        letters=tuple(chr(0x3B1 + i) for i in range(letters)),
        alphabets=(alphabet,) * letters,
        first=torch.arange(letters) * faces * variants,
        faces=torch.full((letters,), faces),
        variants=variants,
        tally=module.Tally(letters, 0, 0, 0, 0, 0),
    )


# ---- what is in the set


def test_sizes_agree(glyphs: Glyphs) -> None:
    assert glyphs.images.shape[1:] == (28, 28)
    assert glyphs.images.dtype == torch.uint8
    assert int((glyphs.faces * glyphs.variants).sum()) == len(glyphs.images)
    assert int(glyphs.faces.min()) >= module.MIN_FACES
    assert len(set(glyphs.letters)) == len(glyphs.letters)
    assert all(unicodedata.category(c).startswith("L") for c in glyphs.letters)


def test_every_image_has_ink_and_background(glyphs: Glyphs) -> None:
    share = glyphs.images.flatten(1).float().mean(1) / 255
    assert float(share.min()) > 0.001
    assert float(share.max()) < 0.6


def test_there_is_enough_of_it(glyphs: Glyphs) -> None:
    """The fonts of matplotlib 3.6 to 3.11 have 1 965 letters in six faces or more; others may have more."""
    assert glyphs.tally.letters >= 1900
    assert len(glyphs.classes(TRAIN_ALPHABETS)) >= 1000
    assert len(glyphs.classes(TEST_ALPHABETS)) >= 400
    for alphabet in TRAIN_ALPHABETS + TEST_ALPHABETS:
        assert alphabet in glyphs.alphabets


def test_counts_add_up(glyphs: Glyphs) -> None:
    tally = glyphs.tally
    assert tally.letters - tally.other_scripts - tally.repeated - tally.leaking == len(glyphs.letters)
    assert 0 < tally.identical <= tally.leaking


def test_no_alphabet_is_on_both_sides() -> None:
    assert not set(TRAIN_ALPHABETS) & set(TEST_ALPHABETS)


@pytest.mark.parametrize("letter", ["Α", "Β", "Ε", "ο", "Ρ", "Τ"])
def test_letters_that_look_latin_are_not_tested(glyphs: Glyphs, letter: str) -> None:
    assert unicodedata.name(letter).startswith("GREEK")
    assert letter not in glyphs.letters


@pytest.mark.parametrize("letter", ["Ω", "Ψ", "λ", "Ֆ", "ჯ"])
def test_letters_of_their_own_are_tested(glyphs: Glyphs, letter: str) -> None:
    assert letter in glyphs.letters


def test_no_test_letter_has_the_pixels_of_a_training_letter(glyphs: Glyphs) -> None:
    """Drawn afresh here, face by face, and compared byte by byte: independent of how lookalikes are found."""
    charted = {c: p for c, p in module.letters_by_face().items() if c in glyphs.letters}
    clean, _ = module._render_all(charted, None)
    sides = dict(zip(glyphs.letters, (a in TEST_ALPHABETS for a in glyphs.alphabets), strict=True))
    for face in {face for drawings in clean.values() for face in drawings}:
        seen: tuple[set[bytes], set[bytes]] = (set(), set())
        for letter, drawings in clean.items():
            if face in drawings:
                seen[sides[letter]].add(drawings[face].tobytes())
        assert not seen[0] & seen[1], face


def test_lookalikes() -> None:
    """Test letter that equals a training letter in one face of two: leaks; twins on one side: the later one goes."""
    rng = np.random.default_rng(0)
    a, b, c, d = (rng.integers(0, 2, (4, 56, 56)) * 255).astype(np.uint8)
    clean = {
        "a": {"sans": a, "serif": b},  # Latin
        "b": {"sans": a, "serif": c},  # its twin in half of the faces
        "α": {"sans": d, "serif": b},  # Greek, like a in the serif face
        "β": {"sans": b, "serif": a},  # like a in another face: not the same picture in any
    }
    kept, repeated, leaking, identical = module._drop_lookalikes(clean)
    assert kept == ["a", "β"]
    assert (repeated, leaking, identical) == (1, 1, 1)


def test_jitter_stays_near_the_clean_picture() -> None:
    clean = np.zeros((1, 56, 56), np.uint8)
    clean[0, 16:40, 20:36] = 255
    drawn = module._jitter(clean, 64, torch.Generator().manual_seed(0))
    assert drawn.shape == (64, 28, 28)
    rows = (drawn.astype(float) * np.arange(28)[:, None]).sum((1, 2)) / drawn.sum((1, 2))
    assert np.abs(rows - 13.5).max() < 2.5
    assert np.abs(drawn.astype(int) - drawn[:1]).max() > 100  # and they differ


def test_unknown_alphabet() -> None:
    with pytest.raises(ValueError, match="no alphabet KLINGON; there are GREEK"):
        make().classes(["KLINGON"])


# ---- the cache


def test_second_load_draws_nothing(glyphs: Glyphs, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "draw", lambda progress: pytest.fail("drawn again"))
    again = module.load(folder=folder)
    assert torch.equal(again.images, glyphs.images)
    assert again.letters == glyphs.letters
    assert again.tally == glyphs.tally


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_cache_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    small = {
        "images": np.zeros((6 * module.VARIANTS, 28, 28), np.uint8),
        "code_points": np.array([0x3B1]),
        "faces": np.array([6]),
        "tally": np.arange(6),
    }
    calls = []
    monkeypatch.setattr(module, "draw", lambda progress: calls.append(1) or small)
    module.load(folder=tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    middle = len(good) // 2
    bad = {"cut": good[:-1], "flip": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :], "empty": b""}
    path.write_bytes(bad[damage])
    with pytest.warns(UserWarning, match="damaged"):
        loaded = module.load(folder=tmp_path)
    assert loaded.letters == ("α",)
    assert len(calls) == 2
    assert path.read_bytes() == good
    module.load(folder=tmp_path)
    assert len(calls) == 2
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no half-written file is left


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    monkeypatch.setattr(module, "_read_checked", lambda path: None)
    monkeypatch.setattr(module, "draw", lambda progress: {
        "images": np.zeros((6 * module.VARIANTS, 28, 28), np.uint8),
        "code_points": np.array([0x3B1]),
        "faces": np.array([6]),
        "tally": np.arange(6),
    })  # fmt: skip
    with pytest.warns(UserWarning, match="METAFAST_CACHE"):
        assert module.load(folder=blocker / "below").letters == ("α",)


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFAST_CACHE", str(tmp_path))
    assert module.cache_folder() == tmp_path
    monkeypatch.delenv("METAFAST_CACHE")
    assert "metafast" in str(module.cache_folder())


def test_no_fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match="pip install --force-reinstall matplotlib"):
        module.font_files()


# ---- the sampler


def test_shapes_and_range() -> None:
    (x, y), (xq, yq) = TaskSampler(make(), ["GREEK"], ways=5, shots=2, queries=3).sample(4)
    assert x.shape == (4, 10, 1, 28, 28)
    assert xq.shape == (4, 15, 1, 28, 28)
    assert y.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]] * 4
    assert yq.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]] * 4
    assert x.dtype == torch.float32
    assert float(x.min()) >= 0 and float(x.max()) <= 1
    assert y.dtype == torch.int64


def test_seed_decides_and_the_global_state_does_not() -> None:
    def first(seed: int) -> torch.Tensor:
        return TaskSampler(make(), ["GREEK"], 5, 1, 5, seed).sample(3)[0][0]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = first(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first(7), a)
    assert not torch.equal(first(8), a)


def where(x: torch.Tensor, glyphs: Glyphs) -> torch.Tensor:
    """Index of each example, read back from its pixels (sets of at most 251 images)."""
    assert len(glyphs.images) <= 251
    return (x[..., 0, 0, 0] * 255).round().long()


def test_support_and_query_share_no_face_and_no_example() -> None:
    glyphs = make(letters=8, faces=8)
    (x, _), (xq, _) = TaskSampler(glyphs, ["GREEK"], ways=5, shots=3, queries=15).sample(50)
    support, query = (where(t, glyphs).view(50, 5, -1) for t in (x, xq))
    per_letter = 8 * glyphs.variants
    assert torch.equal(support // per_letter, (support // per_letter)[..., :1].expand_as(support))  # one letter a row
    assert torch.equal(query // per_letter, (support // per_letter)[..., :1].expand_as(query))
    for task in range(50):
        letters = (support[task, :, 0] // per_letter).tolist()
        assert len(set(letters)) == 5
        for way in range(5):
            shown, asked = support[task, way].tolist(), query[task, way].tolist()
            assert len(set(shown)) == 3
            assert len(set(asked)) == 15
            assert not {i // glyphs.variants for i in shown} & {i // glyphs.variants for i in asked}


def test_every_letter_face_and_variant_comes_up() -> None:
    glyphs = make(letters=6, faces=8)
    (x, _), (xq, _) = TaskSampler(glyphs, ["GREEK"], ways=5, shots=1, queries=5).sample(300)
    assert len(where(x, glyphs).unique()) == len(glyphs.images)
    assert len(where(xq, glyphs).unique()) == len(glyphs.images)


def test_letters_tells_what_comes_next() -> None:
    sampler = TaskSampler(make(letters=8), ["GREEK"], ways=3, shots=1, queries=2)
    letters = sampler.letters(2)
    (x, _), _ = sampler.sample(2)
    found = where(x, sampler.glyphs) // (8 * sampler.glyphs.variants)
    assert [[sampler.glyphs.letters[i] for i in row] for row in found.tolist()] == letters


def test_too_much_is_asked() -> None:
    with pytest.raises(ValueError, match="41 ways, but only 40 of 40 letters"):
        TaskSampler(make(), ["GREEK"], ways=41, shots=1, queries=5)
    with pytest.raises(ValueError, match="only 0 of 40 letters of GREEK have faces enough for 7 shots and 5 queries"):
        TaskSampler(make(), ["GREEK"], ways=5, shots=7, queries=5)
    with pytest.raises(ValueError, match="each must be at least 1"):
        TaskSampler(make(), ["GREEK"], ways=5, shots=0, queries=5)
