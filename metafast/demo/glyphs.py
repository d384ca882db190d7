"""A few-shot set of letters, drawn from the fonts that matplotlib brings along.

A *class* is a letter, an *example* one drawing of it: a face (one font file) under a small random affine map. Letters
are split by alphabet, so that the test alphabets hold no letter, and no picture, of the training ones.

    faces ─render→ clean pictures (56×56, centred) ─drop_lookalikes→ letters ─jitter→ examples (28×28) ─→ cache file
                                                                                                          └→ TaskSampler
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pictures = npt.NDArray[np.uint8]
Batch = tuple[Tensor, Tensor]
Progress = Callable[[int, int], None]

SIZE = 28
"""Height and width of an example, in pixels."""

TRAIN_ALPHABETS = ("LATIN", "CYRILLIC", "LAO")
TEST_ALPHABETS = ("GREEK", "ARMENIAN", "GEORGIAN")

FORMAT = 1  # raise when anything below changes what is drawn: old cache files are then left alone and redrawn
MAGIC = b"metafast glyphs"
MIN_FACES = 6
VARIANTS = 3
CANVAS = 2 * SIZE  # clean pictures have twice the resolution, so that the affine map can sample them without aliasing
EM = 48  # font size on the canvas: capitals come out 18 pixels high in the example
INK_BOX = 48  # letters wider or taller than this are shrunk, which leaves room for the shift
LOOKALIKE = 0.02  # ‖a−b‖² as a fraction of the ink; 0 is pixel-identical, Ф and Փ 0.004, n and ո 0.06
SEED = 0x676C79

# Symbol encodings, building blocks of tall brackets, private-use areas, and a font of placeholder boxes that claims
# every code point: none of these draws the letter that its character map promises.
NOT_LETTERS = ("LastResort", "STIXSiz", "STIXNonUni", "cmex", "cmsy")
ASCII_ONLY = ("cm",)  # the TeX fonts put other letters at the code points of Latin-1


@dataclass(frozen=True)
class Tally:
    """What became of the letters of the fonts, for the report.

    **Fields**: `letters` that have at least six faces; `other_scripts` of these that belong to none of the six
    alphabets (modifiers, mathematical letters); `repeated` letters that look like another one of the same side of the
    split; `leaking` test letters that look like a training letter in at least one face, and `identical`, those of
    them that match it pixel by pixel; `boxes`, drawings left out because they are empty or the font's placeholder.
    """

    letters: int
    other_scripts: int
    repeated: int
    leaking: int
    identical: int
    boxes: int


@dataclass(frozen=True)
class Glyphs:
    """Letters and their examples, all in memory.

    **Fields**: `images` (examples, 28, 28) uint8, ink 255, letter by letter, face by face, variant by variant;
    `letters` and `alphabets` (letters,); `first` (letters,) int64, where a letter's examples begin in `images`;
    `faces` (letters,) int64, how many faces it has, each with `variants` examples; `tally`.
    """

    images: Tensor
    letters: tuple[str, ...]
    alphabets: tuple[str, ...]
    first: Tensor
    faces: Tensor
    variants: int
    tally: Tally

    def classes(self, alphabets: Sequence[str]) -> Tensor:
        """Indices of the letters of `alphabets`: (n,) int64. **Raises** ValueError for one that is not there."""
        unknown = sorted(set(alphabets) - set(self.alphabets))
        if unknown:
            there = ", ".join(sorted(set(self.alphabets)))
            raise ValueError(f"glyphs: no alphabet {', '.join(unknown)}; there are {there}")
        return torch.tensor([i for i, name in enumerate(self.alphabets) if name in alphabets])


@dataclass
class TaskSampler:
    """Draws few-shot tasks from some letters, reproducibly and without touching the global random state.

    A task has `ways` letters with `shots` support and `queries` query examples each. Within a letter no example comes
    twice, and no query is in a face that the support shows: a task asks for the letter, not for the typeface. Letters
    that have too few faces for this are left out.

    **Raises** ValueError when fewer than `ways` letters are left.
    """

    glyphs: Glyphs
    alphabets: Sequence[str]
    ways: int
    shots: int
    queries: int
    seed: int = 0
    classes: Tensor = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        if min(self.ways, self.shots, self.queries) < 1:
            raise ValueError(
                f"TaskSampler: ways {self.ways}, shots {self.shots}, queries {self.queries}; each must be at least 1"
            )
        every = self.glyphs.classes(self.alphabets)
        room = (self.glyphs.faces[every] - self.shots) * self.glyphs.variants
        self.classes = every[room >= self.queries]
        if len(self.classes) < self.ways:
            raise ValueError(
                f"TaskSampler: {self.ways} ways, but only {len(self.classes)} of {len(every)} letters of "
                f"{', '.join(self.alphabets)} have faces enough for {self.shots} shots and {self.queries} queries; "
                "ask for fewer of them"
            )
        self.generator = torch.Generator().manual_seed(self.seed)

    def sample(self, tasks: int) -> tuple[Batch, Batch]:
        """Support and query of `tasks` tasks.

        **Returns** `((x, y), (x, y))` with x: (tasks, ways·shots, 1, 28, 28) float32, ink 1 on 0, and y: (tasks,
        ways·shots) int64, letter by letter; the same with `queries` for the query. Costs about 1 µs an example: it
        only indexes.
        """
        label = torch.rand(tasks, len(self.classes), generator=self.generator).argsort(1)[:, : self.ways]
        letter = self.classes[label]  # (tasks, ways)
        order = self._shuffled_faces(letter)  # (tasks, ways, most faces)
        start = torch.randint(self.glyphs.variants, order.shape, generator=self.generator)
        rest = (self.glyphs.faces[letter] - self.shots)[..., None]
        turn = torch.arange(self.queries).expand(*letter.shape, -1)
        position = torch.cat([torch.arange(self.shots).expand(*letter.shape, -1), self.shots + turn % rest], -1)
        face = order.gather(-1, position)
        lap = torch.cat([torch.zeros(*letter.shape, self.shots, dtype=torch.int64), turn // rest], -1)
        variant = (start.gather(-1, face) + lap) % self.glyphs.variants
        example = self.glyphs.first[letter][..., None] + face * self.glyphs.variants + variant
        return self._batch(example[..., : self.shots]), self._batch(example[..., self.shots :])

    def letters(self, tasks: int) -> list[list[str]]:
        """The letters of the next `tasks` tasks, in label order, without drawing them (for tests and pictures)."""
        state = self.generator.get_state()
        label = torch.rand(tasks, len(self.classes), generator=self.generator).argsort(1)[:, : self.ways]
        self.generator.set_state(state)
        return [[self.glyphs.letters[i] for i in row] for row in self.classes[label].tolist()]

    def _shuffled_faces(self, letter: Tensor) -> Tensor:
        most = int(self.glyphs.faces.max())
        key = torch.rand(*letter.shape, most, generator=self.generator)
        absent = torch.arange(most) >= self.glyphs.faces[letter][..., None]
        return key.masked_fill(absent, 2.0).argsort(-1)

    def _batch(self, example: Tensor) -> Batch:
        tasks, ways, count = example.shape
        x = self.glyphs.images[example.flatten()].to(torch.float32).div_(255.0)
        y = torch.arange(ways).repeat_interleave(count).expand(tasks, -1).contiguous()
        return x.view(tasks, ways * count, 1, SIZE, SIZE), y


# ---------------------------------------------------------------------------------------------- the cache


def load(progress: Progress | None = None, folder: Path | None = None) -> Glyphs:
    """The glyph set, from the cache, or drawn anew (seconds) where the cache has none or a damaged one.

    **Arguments**: `progress(done, total)` is called while drawing; `folder` of the cache file, by default
    `$METAFAST_CACHE` or the user's cache folder.
    A file is trusted only if the SHA-256 at its head is that of its content. It is written under another name first,
    so that a reader never sees half of it. A folder that cannot be written costs a warning and the time to draw.
    """
    path = (folder or cache_folder()) / f"glyphs-{_key()}.bin"
    content = _read_checked(path)
    if content is None:
        arrays = draw(progress)
        _write_checked(path, _pack(arrays))
    else:
        arrays = _unpack(content)
    return _assemble(arrays)


def cache_folder() -> Path:
    """`$METAFAST_CACHE` where it is set, else the folder that the platform keeps caches in."""
    override = os.environ.get("METAFAST_CACHE")
    if override:
        return Path(override)
    import platformdirs

    return Path(platformdirs.user_cache_dir("metafast", appauthor=False))


def _key() -> str:
    """Names everything that decides what is drawn: this file's constants and the content of every font."""
    digest = hashlib.sha256(repr((FORMAT, CANVAS, EM, INK_BOX, LOOKALIKE, VARIANTS, SEED, MIN_FACES)).encode())
    digest.update(repr((TRAIN_ALPHABETS, TEST_ALPHABETS, NOT_LETTERS, unicodedata.unidata_version)).encode())
    for path in font_files():
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _read_checked(path: Path) -> bytes | None:
    try:
        head, _, content = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        warnings.warn(f"glyph cache {path}: cannot be read ({error}); drawing the letters again", stacklevel=3)
        return None
    if head == MAGIC + b" " + hashlib.sha256(content).hexdigest().encode():
        return content
    warnings.warn(
        f"glyph cache {path}: damaged (its checksum is not that of its content); drawing the letters again",
        stacklevel=3,
    )
    return None


def _write_checked(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
            try:
                file.write(MAGIC + b" " + hashlib.sha256(content).hexdigest().encode() + b"\n")
                file.write(content)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                file.close()
                os.unlink(file.name)
                raise
    except OSError as error:
        warnings.warn(
            f"glyph cache {path}: cannot be written ({error}); the letters will be drawn again next time. "
            "Set METAFAST_CACHE to a folder that can.",
            stacklevel=3,
        )


def _pack(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    buffer = io.BytesIO()
    named: dict[str, Any] = dict(arrays)
    np.savez(buffer, **named)
    return buffer.getvalue()


def _unpack(content: bytes) -> dict[str, npt.NDArray[Any]]:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _assemble(arrays: Mapping[str, npt.NDArray[Any]]) -> Glyphs:
    letters = tuple(map(chr, arrays["code_points"].tolist()))
    faces = torch.from_numpy(arrays["faces"])
    examples = faces * VARIANTS
    return Glyphs(
        images=torch.from_numpy(arrays["images"]),
        letters=letters,
        alphabets=tuple(map(alphabet_of, letters)),
        first=examples.cumsum(0) - examples,
        faces=faces,
        variants=VARIANTS,
        tally=Tally(*arrays["tally"].tolist()),
    )


# ---------------------------------------------------------------------------------------------- drawing


def draw(progress: Progress | None = None) -> dict[str, npt.NDArray[Any]]:
    """Draw every letter of the six alphabets in every face and keep those that can be told apart.

    **Returns** the arrays of the cache file: `images` (examples, 28, 28) uint8, `code_points` and `faces` (letters,)
    int64, `tally` (6,) int64. The same fonts give the same letters; jitter comes from a fixed seed.
    """
    charted = letters_by_face()
    chosen = sorted(
        (c for c in charted if alphabet_of(c) in TRAIN_ALPHABETS + TEST_ALPHABETS),
        key=lambda c: (alphabet_of(c) in TEST_ALPHABETS, ord(c)),
    )
    clean, boxes = _render_all({c: charted[c] for c in chosen}, progress)
    clean = {c: drawings for c, drawings in clean.items() if len(drawings) >= MIN_FACES}
    kept, repeated, leaking, identical = _drop_lookalikes(clean)
    stacked = np.concatenate([np.stack(list(clean[c].values())) for c in kept])
    return {
        "images": _jitter(stacked, VARIANTS, torch.Generator().manual_seed(SEED)),
        "code_points": np.array([ord(c) for c in kept]),
        "faces": np.array([len(clean[c]) for c in kept]),
        "tally": np.array([len(charted), len(charted) - len(chosen), repeated, leaking, identical, boxes]),
    }


def alphabet_of(letter: str) -> str:
    """First word of the letter's Unicode name: LATIN, GREEK, ..."""
    return unicodedata.name(letter, "?").split()[0]


def font_files() -> list[Path]:
    """The fonts that draw letters, by name. **Raises** RuntimeError when matplotlib has lost its fonts."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = sorted(path for path in folder.glob("*.ttf") if not path.stem.startswith(NOT_LETTERS))
    if len(files) < MIN_FACES:
        raise RuntimeError(
            f"glyphs: {len(files)} fonts in {folder}, at least {MIN_FACES} are needed; this matplotlib was installed "
            "without its fonts, as some distributions do: pip install --force-reinstall matplotlib"
        )
    return files


def letters_by_face() -> dict[str, list[Path]]:
    """Every letter (Unicode category L) that at least six faces chart, with these faces."""
    from matplotlib.ft2font import FT2Font

    charted: dict[str, list[Path]] = {}
    for path in font_files():
        for code_point in FT2Font(str(path)).get_charmap():
            if code_point > 127 and path.stem.startswith(ASCII_ONLY):
                continue
            if unicodedata.category(chr(code_point)).startswith("L"):
                charted.setdefault(chr(code_point), []).append(path)
    return {letter: paths for letter, paths in charted.items() if len(paths) >= MIN_FACES}


def _render_all(
    charted: Mapping[str, Sequence[Path]], progress: Progress | None
) -> tuple[dict[str, dict[str, Pictures]], int]:
    """Clean pictures by letter and face, and how many drawings were no letter."""
    from PIL import ImageFont

    paths = sorted({path for found in charted.values() for path in found})
    fonts = {p: ImageFont.truetype(str(p), EM, layout_engine=ImageFont.Layout.BASIC) for p in paths}
    placeholder = {path: _render(fonts[path], "\U0010ffff") for path in paths}
    clean: dict[str, dict[str, Pictures]] = {}
    boxes = 0
    for done, (letter, found) in enumerate(charted.items()):
        drawings = clean.setdefault(letter, {})
        for path in found:
            picture = _render(fonts[path], letter)
            if picture is None or _same(picture, placeholder[path]):
                boxes += 1
            else:
                drawings[path.stem] = picture
        if progress:
            progress(done + 1, len(charted))
    return clean, boxes


def _same(a: Pictures, b: Pictures | None) -> bool:
    return b is not None and bool(np.array_equal(a, b))


def _render(font: Any, letter: str) -> Pictures | None:
    """One letter, its ink centred on the canvas: (56, 56), or None where there is no ink."""
    from PIL import Image

    mask = font.getmask(letter, mode="L")
    ink = np.array(mask, dtype=np.uint8).reshape(mask.size[1], mask.size[0])
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if len(rows) == 0:
        return None
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if max(ink.shape) > INK_BOX:
        height, width = (max(1, round(n * INK_BOX / max(ink.shape))) for n in ink.shape)
        ink = np.array(Image.fromarray(ink).resize((width, height), Image.Resampling.BOX))
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)
    top, left = (CANVAS - ink.shape[0]) // 2, (CANVAS - ink.shape[1]) // 2
    canvas[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return canvas


def _drop_lookalikes(clean: Mapping[str, Mapping[str, Pictures]]) -> tuple[list[str], int, int, int]:
    """The letters that can be told apart, in the order given (training alphabets first), and three counts.

    A test letter goes when it looks like a training letter in *any* face: A, Α and А are one picture, and a net that
    has trained on it has seen the test. Of two letters on the same side the later one goes when they look alike in
    at least half of the faces that both have: nobody could tell them apart (I and l in a sans serif alone may stay).
    """
    alike = _lookalikes(clean)
    is_test = {letter: alphabet_of(letter) in TEST_ALPHABETS for letter in clean}
    leaking = {b for (a, b) in alike if is_test[b] and not is_test[a]}
    identical = {b for (a, b), d in alike.items() if b in leaking and not is_test[a] and min(d) == 0.0}
    kept: list[str] = []
    repeated = 0
    for letter in clean:
        if letter in leaking:
            continue
        twins = (other for other in kept if is_test[other] == is_test[letter] and (other, letter) in alike)
        if any(2 * len(alike[t, letter]) >= len(clean[t].keys() & clean[letter].keys()) for t in twins):
            repeated += 1
        else:
            kept.append(letter)
    return kept, repeated, len(leaking), len(identical)


def _lookalikes(clean: Mapping[str, Mapping[str, Pictures]]) -> dict[tuple[str, str], list[float]]:
    """Pairs (earlier, later) of letters that look alike in some face, with the distance in each such face."""
    alike: dict[tuple[str, str], list[float]] = {}
    for face in sorted({face for drawings in clean.values() for face in drawings}):
        letters = [c for c in clean if face in clean[c]]
        pictures = torch.from_numpy(np.stack([clean[c][face] for c in letters]))
        for i, j, distance in _close_pairs(pictures):
            alike.setdefault((letters[i], letters[j]), []).append(distance)
    return alike


def _close_pairs(pictures: Tensor) -> Iterator[tuple[int, int, float]]:
    """Pairs i < j of pictures at most LOOKALIKE apart at the resolution of the examples; 0.0 means the same pixels."""
    x = torch.nn.functional.avg_pool2d(pictures[:, None].double() / 255, 2).flatten(1)
    product = x @ x.T
    ink = product.diagonal()
    distance = (ink[:, None] + ink - 2 * product) / torch.maximum(ink[:, None], ink)
    for i, j in torch.triu(distance <= LOOKALIKE, 1).nonzero().tolist():
        yield i, j, 0.0 if torch.equal(pictures[i], pictures[j]) else max(float(distance[i, j]), 1e-12)


def _jitter(clean: Pictures, variants: int, generator: torch.Generator) -> Pictures:
    """Each clean picture under `variants` random affine maps: (n, 56, 56) → (n·variants, 28, 28), picture by picture.

    Rotation ±12°, shear ±0.15, scale 0.85 to 1.05, shift ±1.5 pixels, all uniform.
    """
    out = []
    for part in torch.split(torch.from_numpy(clean), 2048):
        maps = _affine_maps(len(part) * variants, generator)
        smooth = torch.nn.functional.avg_pool2d(part[:, None].float(), 3, stride=1, padding=1)
        grid = torch.nn.functional.affine_grid(maps, [len(maps), 1, SIZE, SIZE], align_corners=False)
        sampled = torch.nn.functional.grid_sample(smooth.repeat_interleave(variants, 0), grid, align_corners=False)
        out.append((sampled[:, 0] * 1.3).round_().clamp_(0, 255).to(torch.uint8))  # the smoothing thins the strokes
    return torch.cat(out).numpy()


def _affine_maps(count: int, generator: torch.Generator) -> Tensor:
    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, shear = uniform(-0.21, 0.21), uniform(-0.15, 0.15)
    zoom_x, zoom_y = 1 / uniform(0.85, 1.05), 1 / uniform(0.85, 1.05)
    shift = torch.stack([uniform(-1.5, 1.5), uniform(-1.5, 1.5)], -1) * (2 / SIZE)
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([cos * zoom_x, (shear * cos - sin) * zoom_y, sin * zoom_x, (shear * sin + cos) * zoom_y], -1)
    return torch.cat([rows.view(count, 2, 2), shift[..., None]], -1)
