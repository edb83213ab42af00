"""Identifiers that are found in a text that is about to leave, and texts without any. All names are invented."""

import base64
import io
import json
import random
import re
import time
from os import sep

import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from tests.privacy.conftest import ID, write_mapping

from vessel.data.mapping import mapping_folder
from vessel.errors import VesselError
from vessel.privacy.scanner import Scanner
from vessel.privacy.texts import texts_of


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


def test_refusals_name_the_source_the_identifier_and_the_operation(scanner):
    assert scanner.require_clean([("a", "x"), ("b", "y")], doing="the export") == 2
    with pytest.raises(VesselError, match=r"^README\.md .*\(ana bell\): the export "):
        scanner.require_clean([("a", "x"), ("README.md", "by Ana Bell")], doing="the export")


def test_names_are_those_beside_the_data_set_or_beside_the_one_it_links_to(tmp_path):
    write_mapping(mapping_folder(tmp_path / "set"), names=["Ana Bell"])
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
    scanner = Scanner(write_mapping(tmp_path / "m", names=names, stems=stems))
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
    """Make a page like a report: numbers, hashes, drawings by matplotlib, pictures as base64."""
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
    scanner = Scanner(write_mapping(tmp_path / "m", names=names, patients=numbers, stems=stems))
    results = tmp_path / "results"
    results.mkdir()
    page = report_page(draw)
    (results / "report.html").write_text(page)
    counts = {"bins": [{"n": int(number), "low": 0.1} for number in [*numbers, 1234567890]], "size": 4567890123}
    (results / "metrics.json").write_text(json.dumps(counts))
    assert scanner.require_clean(texts_of(results), doing="the report") == 2
    for planted in ("<b>una o&#39;dwyer</b>", "<!-- vex quillon_marsh -->", numbers[0], stems[0], ID):
        (results / "report.html").write_text(page.replace("</table>", f"</table>{planted}"))
        with pytest.raises(VesselError, match=r"^report\.html "):
            scanner.require_clean(texts_of(results), doing="the report")


def test_two_thousand_patients_and_five_megabytes_take_two_seconds(tmp_path):
    draw = random.Random(0)
    syllables = [c + v for c in "bcdfghjklmnpqrstvwxz" for v in "aeiou"]

    def word():
        return "".join(draw.choices(syllables, k=3))

    people = [f"{word()} {word()} {word()}" for _ in range(2000)]
    stems = [f"{person}_{n:010d}_frame_{frame:06d}" for n, person in enumerate(people) for frame in range(10)]
    keys = [f"{n:010d}" for n in range(2000)]
    kept = write_mapping(tmp_path / "m", names=people, patients=keys, stems=stems)
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
