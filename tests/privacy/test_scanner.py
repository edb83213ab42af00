"""What is found in text that is about to leave, and what is not. All names are invented."""

import base64
import io
import json
import random
import re
import time
from os import sep

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from PIL import Image, PngImagePlugin

from vessel.data.mapping import mapping_folder
from vessel.errors import VesselError
from vessel.plotting.panels import panel_figure, sweep_figure
from vessel.privacy.scanner import Scanner
from vessel.privacy.texts import texts_of

ID = "0012345678"
NAMES = ("Quillon Marsh Vex", "ana bell", "j_d", "O'Dwyer Una", "Zoë Müller", "홍보기", "Invented")
PATIENTS = (ID, "anabell", "7654321", "001")
STEMS = (
    "inventa_0001",
    "001_1_095",
    "scan (7) left",
    "case (8)",
    "5_1_12",
    f"Quillon Marsh Vex^({ID})_1-2_003_frame_000042",
)


def keep(folder, *, names=(), patients=(), stems=()):
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"patients": dict.fromkeys(patients, "p1"), "files": dict.fromkeys(stems, "p1_v1_000001")}
    (folder / "mapping.json").write_text(json.dumps({**kept, "names": list(names)}))
    return folder


@pytest.fixture
def scanner(tmp_path):
    return Scanner(keep(tmp_path / "set.identity", names=NAMES, patients=PATIENTS, stems=STEMS))


@pytest.mark.parametrize(
    "text",
    [
        f"run of patient {ID}",
        f"({ID})_1-2",
        f"x_{ID}__1",
        "seen in QUILLON-MARSH-VEX today",
        "quillon_marsh_vex",
        "quillonmarsh vex",
        "Vex, Quillon Marsh",
        "Quillon^Marsh^Vex",
        "frame of j_d, late",
        "panel ana bell_frame_000005.png",
        "AnaBell",
        "una o'dwyer",
        "zoë müller",
        "Zoe Muller",
        "Zoe\u0308 Mu\u0308ller",  # the same letters, decomposed
        "홍보기, 2회",
        "(invented)",
        "image 001_1_095.jpg",
        "file SCAN (7) LEFT.png",
        "case (8).png",
        "patient 7654321 again",
    ],
)
def test_guard_D11_raw_identifiers_are_found(scanner, text):
    assert scanner.find(text)


@pytest.mark.parametrize(
    "text",
    [
        "p7f3a91c2_v1_000012",
        "loss 0.1234567890",
        "sha 91234567890ab",
        "time 1763650000.25",
        "2026-11-21T17:53:28+00:00, 20261121_175328",
        "12345678901",
        "mm^2 adjusted, x^2 + y^2, [^ab]",
        "dice 0.001, image 001",
        "0.7654321 and 7654321.5 and .7654321",
        "at 5 1 12, 5,1,12 and 5_1_120",
        "001 1 095",
        "jd; j, d; Anabella; an abell; Marsh Quillon Vex",
        "uninvented, 17654321",
        "https://example.org/home/page",
    ],
)
def test_harmless_text_may_leave(scanner, text):
    assert scanner.find(text) == []


def test_guard_D11_patterns_alone_find_ids_caret_names_and_home_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/data/people/una")
    text = (
        f"x_{ID}__1, Bell^Ana, {sep}home/una/oct, file://{sep}Users/Una/x, ..{sep}home/una, "
        "C:\\Users\\una\\oct /data/people/una/x"
    )
    found = [f"{sep}Users/Una", "/data/people/una", f"{sep}home/una", ID, "Bell^Ana", "C:\\Users\\una"]
    assert Scanner().find(text) == sorted(found)
    assert Scanner().find("ana bell, /data/people/unable") == []


def test_refusals_name_the_place_what_was_found_and_what_was_stopped(scanner):
    assert scanner.require_clean([("a", "x"), ("b", "y")], doing="the export") == 2
    with pytest.raises(VesselError, match=r"^README\.md holds .*patient's name or id.*\(ana bell\): the export was"):
        scanner.require_clean([("a", "x"), ("README.md", "by Ana Bell")], doing="the export")


def test_names_are_those_beside_the_data_set_or_beside_the_one_it_links_to(tmp_path):
    keep(mapping_folder(tmp_path / "set"), names=["Ana Bell"])
    (tmp_path / "set").mkdir()
    (tmp_path / "link").symlink_to("set")
    for root in ("set", "link"):
        assert Scanner.beside(tmp_path / root).find("ana bell") == ["ana bell"]
    assert Scanner.beside(tmp_path / "other").mapping is None
    assert Scanner.beside(None).find("ana bell") == []


def naive(names, stems, text):
    """One expression a name, one search a stem."""
    found = set()
    for name in names:
        parts = [re.escape(part) for part in re.split(r"[\W_]+", name) if part]
        for turn in range(len(parts)):
            pattern = r"[\W_]*".join(parts[turn:] + parts[:turn])
            found |= {m[0].lower() for m in re.finditer(rf"(?<![^\W_]){pattern}(?![^\W_])", text, re.IGNORECASE)}
    return found | {s for s in stems if re.search(rf"(?<![^\W_]){re.escape(s)}(?![^\W_])", text, re.IGNORECASE)}


def test_the_tree_finds_what_one_search_a_name_finds(tmp_path):
    draw = random.Random(0)
    words = [draw.choice("bcdfgh") + draw.choice("aeiou") + draw.choice("lmnrst") + "x" * (n % 3) for n in range(30)]
    names = {" ".join(draw.sample(words, draw.choice([2, 3]))) for _ in range(40)}
    stems = {"_".join([*draw.sample(words, 2), f"{n:02d}"]) for n in range(40)}
    scanner = Scanner(keep(tmp_path / "m", names=names, stems=stems))
    hits = 0
    for _ in range(300):
        chosen = draw.choices(words, k=8) + [draw.choice(sorted(names))] * draw.choice([0, 1])
        chosen += [draw.choice(sorted(stems))] * draw.choice([0, 1])
        draw.shuffle(chosen)
        text = "".join(draw.choice(["", " ", "_", ", ", "-"]) + draw.choice([w, w.upper()]) for w in chosen)
        expected = naive(names, stems, text)
        found = set(scanner.find(text))
        # Of two names that share words an expression shows the one; the tree shows both.
        assert expected <= found, text
        assert all(naive(names, stems, each) for each in found), text
        hits += bool(found)
    assert 100 < hits < 300


def report_page(draw: random.Random) -> str:
    """What a report is made of: numbers, hashes, drawings by matplotlib, pictures as base64."""
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([draw.random() for _ in range(2000)])
    axes.add_collection(PathCollection([axes.patch.get_path()] * 3))
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    cells = "".join(f"<td>{draw.random():.9f}</td><td>p{draw.getrandbits(32):08x}_v1_000012</td>" for _ in range(2000))
    hashes = " ".join(f"{draw.getrandbits(256):064x} {draw.getrandbits(64):016x}" for _ in range(2000))
    points = " ".join(f"{draw.uniform(0, 900):.6f},{draw.uniform(0, 900):.7f}" for _ in range(4000))
    picture = base64.b64encode(draw.randbytes(500_000)).decode()
    return (
        f"<html><style>:root{{--a:#0072b2}} td{{width:12.3456789em}}</style><table><tr>{cells}</tr></table>"
        f"<p>2026-11-21T17:53:28+00:00 {hashes}</p><svg><path d='M {points} z'/></svg>{svg.getvalue()}"
        f'<use href="#C0_0_1234567890"/><img alt="p1" src="data:image/png;base64,{picture}"></html>'
    )


def test_a_report_is_not_taken_for_identifiers_and_a_name_in_it_is_found(tmp_path):
    draw = random.Random(0)
    numbers = [str(draw.randrange(10**6, 10**8)) for _ in range(1000)]
    stems = [f"{n:03d}_1_{draw.randrange(1000):03d}" for n in range(1000)]
    names = ["Quillon Marsh Vex", "O'Dwyer Una"]
    scanner = Scanner(keep(tmp_path / "m", names=names, patients=numbers, stems=stems))
    results = tmp_path / "results"
    results.mkdir()
    page = report_page(draw)
    (results / "report.html").write_text(page)
    counts = {"bins": [{"n": int(number), "low": 0.1} for number in [*numbers, 1234567890]], "size": 4567890123}
    (results / "metrics.json").write_text(json.dumps(counts))
    assert scanner.require_clean(texts_of(results), doing="the report") == 2
    for planted in ("<b>una o&#39;dwyer</b>", "<!-- vex quillon_marsh -->", numbers[0], stems[0], ID):
        (results / "report.html").write_text(page.replace("</table>", f"</table>{planted}"))
        with pytest.raises(VesselError, match=r"report\.html holds"):
            scanner.require_clean(texts_of(results), doing="the report")


def test_two_thousand_patients_and_five_megabytes_take_two_seconds(tmp_path):
    draw = random.Random(0)
    syllables = [c + v for c in "bcdfghjklmnpqrstvwxz" for v in "aeiou"]

    def word():
        return "".join(draw.choices(syllables, k=3))

    people = [f"{word()} {word()} {word()}" for _ in range(2000)]
    stems = [f"{person}_{n:010d}_frame_{frame:06d}" for n, person in enumerate(people) for frame in range(10)]
    keys = [f"{n:010d}" for n in range(2000)]
    kept = keep(tmp_path / "m", names=people, patients=keys, stems=stems)
    report = report_page(draw).replace("1234567890", "")
    prose = " ".join(f"{word()} {draw.random()}" for _ in range(10_000))
    text = ((report + prose) * 10)[:5_000_000]
    assert len(text) == 5_000_000
    begin = time.process_time()
    scanner = Scanner(kept)
    assert scanner.find(text + " " + people[-1].upper()) == [people[-1]]
    # Two seconds are the promise; a machine that eight share is given some more.
    assert time.process_time() - begin < 4


@pytest.mark.parametrize("text", ["ab " * 400_000, "ab^" * 30_000, "data:image/png;base64," * 20_000, "_" * 10**6])
def test_long_texts_of_one_kind_take_no_quadratic_time(scanner, text):
    begin = time.process_time()
    scanner.find(text)
    assert time.process_time() - begin < 2  # seconds; a quadratic search takes minutes


@pytest.fixture
def export(tmp_path):
    """Files of an export: card, weights, tokenizer."""
    made = tmp_path / "made"
    made.mkdir()
    (made / "README.md").write_text("# oct\n")
    (made / "model.safetensors").write_bytes(b"\xff\xfe weights")
    # The size of a network of some gigabytes has ten digits.
    (made / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 8123456789}}))
    (made / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {"vocab": {"invented": 3}}}))
    (made / "vocab.json").write_text(json.dumps({"invented": 3}))
    (made / "tokenizer.model").write_bytes(b"\xff\xfeinvented")
    return made


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("README.md", "Trained on Invented."),
        ("README.md", r"Trained on inventa\_0001."),
        ("vessel.json", '{"name": "0123456789"}'),
        ("vessel.json", '{"name": "Ana \\u0042ell"}'),
        ("config.json", '{"_name_or_path": "/data/inventa_0001"}'),
        ("tokenizer_config.json", '{"name_or_path": "/data/invented/Sa2VA"}'),
        ("tokenizer.json", '{"added_tokens": [{"content": "Invented"}], "model": {}}'),
        ("special_tokens_map.json", '{"eos_token": "INVENTED"}'),
        ("broken.json", '{"eos_token": "INVENTED"'),
        ("modeling_sa2va_chat.py", "# by Doe^John\n"),
        ("inventa_0001.txt", ""),
        ("vocab/Invented/vocab.json", "{}"),
        ("deeper/notes.txt", "Invented"),
        ("per_image.csv", f"id,patient\n1,{ID}\n"),
    ],
)
def test_guard_D11_every_text_of_a_folder_is_searched(export, scanner, file, text):
    assert scanner.require_clean(texts_of(export), doing="the export") == 6
    (export / file).parent.mkdir(exist_ok=True, parents=True)
    (export / file).write_text(text)
    with pytest.raises(VesselError, match=rf"^{file} holds what looks like a patient's name or id"):
        scanner.require_clean(texts_of(export), doing="the export")


def planted(kind, file):
    """A picture that says Quillon Marsh Vex somewhere beside its pixels."""
    picture, name = Image.fromarray(np.zeros((4, 4, 3), np.uint8)), "Quillon Marsh Vex"
    if kind == "text chunk":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("Author", name)
        picture.save(file, pnginfo=info)
    elif kind == "EXIF":
        exif = Image.Exif()
        exif[0x010E] = name
        picture.save(file, exif=exif)
    elif kind == "comment":
        picture.save(file, format="JPEG", comment=name.encode())


@pytest.mark.parametrize("kind", ["text chunk", "EXIF", "comment"])
def test_guard_D11_what_a_picture_says_beside_its_pixels_is_searched(tmp_path, scanner, kind):
    (tmp_path / "results").mkdir()
    planted(kind, tmp_path / "results/panel.png")
    with pytest.raises(VesselError, match=r"panel\.png holds .*quillon marsh vex"):
        scanner.require_clean(texts_of(tmp_path / "results"), doing="the report")


def test_figures_of_ours_say_what_drew_them_and_nothing_else(tmp_path):
    curve = {name: [0.1, 0.2] for name in ("threshold", "dice", "iou", "precision", "recall")}
    sweep_figure(curve, 0.1).savefig(tmp_path / "sweep.png")
    masks = np.zeros((1, 8, 8), bool)
    panel = panel_figure(
        np.zeros((8, 8, 3), np.uint8), masks, masks.astype(np.float32), threshold=0.5, labels=["lumen"], title="p1"
    )
    panel.savefig(tmp_path / "panel.png")
    for file in tmp_path.iterdir():
        with Image.open(file) as picture:
            picture.load()
            assert picture.info.keys() <= {"Software", "dpi"}
            assert picture.info["Software"].startswith("Matplotlib")
