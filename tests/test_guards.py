"""What was lost by hand, provoked through the commands. All names are invented."""

import csv
import html
import json
import re
import shutil
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from tests.conftest import _configuration

from vessel.checkpoints.reading import find_checkpoint
from vessel.cli.options import typed
from vessel.data.catalog import Catalog
from vessel.data.masks import write_mask
from vessel.data.preparation import PrepareOptions, prepare
from vessel.errors import BadItemsError, VesselError
from vessel.evaluation.command import evaluate
from vessel.evaluation.options import EvaluateOptions
from vessel.inference.loading import load_model
from vessel.model.sa2va import Sa2VA
from vessel.publishing.command import ExportOptions, export

pytestmark = pytest.mark.slow
COMMANDS = {
    "prepare": (PrepareOptions, prepare),
    "evaluate": (EvaluateOptions, evaluate),
    "export": (ExportOptions, export),
}
ID = "0012345678"


def vessel(verb, *options, default=()):
    """A command with options as a user types them, in this process."""
    schema, function = COMMANDS[verb]
    return function(typed(_configuration(verb, list(options)), schema, f"vessel.{verb}"), *default)


def score(run, *options, out):
    """`vessel.evaluate` on the CPU; what it has written is in `out`."""
    return vessel("evaluate", f"ckpt={run}", f"out={out}", f"run={out}", "device=cpu", *options, default=[out])


def changed(run, folder, edit):
    """A copy of a run whose checkpoint went through `edit`."""
    shutil.copytree(run, folder)
    file = find_checkpoint(folder)
    checkpoint = torch.load(file, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, file)
    return folder


def texts(folder):
    """Every text of a results folder by its name."""
    return {file.name: html.unescape(file.read_text()) for file in folder.iterdir() if file.is_file()}


# --- data


def paint(folder, stems, *, empty=()):
    """Noise with masks of noise, and no mask for the stems in `empty`."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for seed, stem in enumerate(stems):
        draw = np.random.default_rng(seed)
        Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(folder / f"images/{stem}.png")
        if stem not in empty:
            write_mask(folder / f"masks/{stem}_mask.png", draw.random((24, 32)) < 0.3)
    return folder


def test_guard_D9_frames_of_one_patient_are_parted_by_name_only_and_every_report_says_so(tmp_path, train_tiny, capsys):
    painted = ("source=synthetic", f"out={tmp_path}/set", "synthetic.patients=1", "synthetic.frames=8", "workers=1")
    with pytest.raises(VesselError, match="split=frame"):
        vessel("prepare", *painted, "synthetic.size=64")
    assert not (tmp_path / "set").exists()
    note = vessel("prepare", *painted, "synthetic.size=64", "split=frame", "folds=2").split.note
    assert "say nothing about new patients" in note
    train_tiny(tmp_path / "run", f"data.root={tmp_path}/set", "data.phrases=lumen", "trainer.max_steps=2")
    capsys.readouterr()
    report = score(tmp_path / "run", out=tmp_path / "results")
    assert report["unit"] == "frame"
    assert note in " ".join(capsys.readouterr().out.split())
    made = texts(tmp_path / "results")
    for name in ("metrics.json", "report.html", "report.md"):
        assert note in made[name], name


def test_guard_D10_three_spellings_of_a_patient_are_one_in_one_part(tmp_path):
    spellings = (f"Quillon Marsh Vex({ID})_1-2_003", f"QUILLON_MARSH_VEX__{ID}__1-3_004", "quillon marsh vex")
    others = ("ana bell", "bo carr", "una o'dwyer")
    paint(tmp_path / "raw", [f"{video}_frame_{n:06d}" for video in (*spellings, *others) for n in (1, 2)])
    catalog = vessel("prepare", f"source={tmp_path}/raw", f"out={tmp_path}/set", "workers=1", "folds=0")
    assert (catalog.manifest["n_patients"], catalog.manifest["n_videos"]) == (4, 6)
    files = json.loads((tmp_path / "set.identity/mapping.json").read_text())["files"]
    own = {frame_id for stem, frame_id in files.items() if "marsh" in stem.lower()}
    assert len(own) == 6
    assert [len(own & set(ids)) for ids in catalog.split.parts.values() if own & set(ids)] == [6]


def test_guard_D12_missing_masks_stop_it_and_empty_ones_are_scored_by_a_stated_rule(tmp_path, train_tiny):
    stems = [f"{patient}_frame_{n:06d}" for patient in ("ana", "bo", "cy", "di") for n in (1, 2)]
    paint(tmp_path / "raw", stems, empty=[stem for stem in stems if stem.endswith("1")])
    asked = (f"source={tmp_path}/raw", f"out={tmp_path}/set", "workers=1", "folds=0")
    with pytest.raises(BadItemsError, match="4 bad item") as caught:
        vessel("prepare", *asked)
    assert all("has no annotation" in problem.reason for problem in caught.value.problems)
    assert not (tmp_path / "set").exists()
    catalog = vessel("prepare", *asked, "missing=empty")
    assert sum(frame.masks["blood vessel"] is None for frame in catalog.frames.values()) == 4
    train_tiny(tmp_path / "run", f"data.root={tmp_path}/set", "data.phrases=blood vessel", "trainer.max_steps=2")
    report = score(tmp_path / "run", out=tmp_path / "results")
    dice = report["summary"]["blood vessel"]["dice"]
    assert (dice["n_images"], dice["n_present"]) == (report["n_ok"], report["n_ok"] // 2)
    assert all(metric["rule"] for metric in report["metrics"].values())
    assert report["metrics"]["dice"]["rule"] in texts(tmp_path / "results")["report.md"]


# --- names


def jpeg_with_iptc(file, name):
    """A JPEG whose EXIF, XMP, comment and IPTC by-line hold a name."""
    exif = Image.Exif()
    exif[0x010E], exif[0x9C9D] = name, name.encode("utf-16-le")
    xmp = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'><dc:creator>{name}</dc:creator></x:xmpmeta>".encode()
    noise(1).save(file, exif=exif, xmp=xmp, comment=name.encode())
    line = b"\x1c\x02\x50" + struct.pack(">H", len(name)) + name.encode()
    resource = b"Photoshop 3.0\x008BIM\x04\x04\x00\x00" + struct.pack(">I", len(line)) + line + b"\0" * (len(line) % 2)
    data = file.read_bytes()
    file.write_bytes(data[:2] + b"\xff\xed" + struct.pack(">H", len(resource) + 2) + resource + data[2:])


def png_with_texts(file, name):
    """A PNG with the name in plain, compressed and international text, in EXIF, and in text after its pixels."""
    exif, info = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x010E] = name
    info.add_text("Patient", name)
    info.add_text("Comment", name, zip=True)
    info.add_itxt("Author", name, zip=True)
    noise(2).save(file, pnginfo=info, exif=exif)
    late = b"tEXtPatient\0" + name.encode()
    late = struct.pack(">I", len(late) - 4) + late + struct.pack(">I", zlib.crc32(late))
    data = file.read_bytes()
    file.write_bytes(data[:-12] + late + data[-12:])


def tiff_with_tags(file, name):
    noise(3).save(file, tiffinfo={270: name, 315: name})


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8))


def chunks(png):
    """Kinds of the chunks of a PNG."""
    data, at, kinds = png.read_bytes(), 8, set()
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        kinds.add(kind)
        at += 12 + length
    assert at == len(data), "nothing after the last chunk"
    return kinds


def test_guard_D11_nothing_that_image_files_say_beside_their_pixels_is_imported(tmp_path):
    name, folder = "Quillon Marsh Vex", tmp_path / "raw/images"
    folder.mkdir(parents=True)
    (tmp_path / "raw/masks").mkdir()
    makers = {
        "ana bell": (jpeg_with_iptc, ".jpg"),
        "bo carr": (png_with_texts, ".png"),
        "cy dale": (tiff_with_tags, ".tif"),
    }
    for seed, (patient, (make, suffix)) in enumerate(makers.items()):
        stem = f"{patient}_frame_000001"
        make(folder / f"{stem}{suffix}", name)
        assert name.encode() in (folder / f"{stem}{suffix}").read_bytes()
        mask = Image.fromarray((np.random.default_rng(seed).random((24, 32)) < 0.3).astype(np.uint8) * 255)
        info = PngImagePlugin.PngInfo()
        info.add_text("Patient", name)
        mask.save(tmp_path / f"raw/masks/{stem}_mask.png", pnginfo=info)
    begin = time.time()
    vessel("prepare", f"source={tmp_path}/raw", f"out={tmp_path}/set", "workers=1", "folds=0")
    files = [path for path in (tmp_path / "set").rglob("*") if path.is_file()]
    assert sum(file.suffix == ".png" for file in files) == 7  # three images, three masks, the contact sheet
    for file in files:
        told = file.relative_to(tmp_path / "set").as_posix().encode() + b"\n" + file.read_bytes()
        for word in (name, "Quillon", "ana bell", "bo carr", "cy dale", "ana_bell"):
            for coding in ("utf-8", "utf-16-le"):
                assert word.lower().encode(coding) not in told.lower(), (file.name, word)
        assert file.stat().st_mtime > begin - 2, "times of the source tell when a patient was seen"
        if file.suffix == ".png":
            assert chunks(file) <= {b"IHDR", b"IDAT", b"IEND", b"PLTE"}, file.name


@pytest.fixture(scope="module")
def named_set(oct_set, tmp_path_factory):
    """The painted data set, with a mapping beside it that knows one name."""
    folder = tmp_path_factory.mktemp("named") / "set"
    shutil.copytree(oct_set, folder)
    folder.with_name("set.identity").mkdir()
    kept = {"patients": {}, "files": {}, "names": ["Quillon Marsh Vex"]}
    folder.with_name("set.identity").joinpath("mapping.json").write_text(json.dumps(kept))
    return folder


EXITS = {
    "configuration": "the configuration holds",
    "wandb": "the configuration holds",
    "wandb_environment": "WANDB_NOTES holds",
    "report": r"metrics\.json holds|report\.html holds",
    "export": r"vessel\.json holds",
    "card": r"README\.md holds",
    "push": "the name of the repository holds",
}


@pytest.mark.parametrize("way", EXITS)
def test_guard_D11_a_planted_name_is_caught_at_every_exit(way, tiny_run, named_set, train_tiny, tmp_path, monkeypatch):
    name, made = "vex_quillon_marsh", tmp_path / "made"

    def title(checkpoint):
        checkpoint["vessel"]["name"] = f"run of {name}"

    def setting(checkpoint):
        checkpoint["vessel"]["config"]["optimizer"]["comment"] = name

    def leave():
        if way == "report":
            score(changed(tiny_run, tmp_path / "run", title), f"data.root={named_set}", out=made)
        elif way in ("export", "card", "push"):
            run = (
                tiny_run if way == "push" else changed(tiny_run, tmp_path / "run", title if way == "card" else setting)
            )
            push = [f"push=me/{name}"] if way == "push" else []
            vessel("export", f"ckpt={run}", f"out={made}", f"mapping={named_set}.identity", *push)
        else:
            monkeypatch.setenv("WANDB_NOTES", f"seen: {name}" if way == "wandb_environment" else "")
            said = {
                "configuration": [f"name={name}"],
                "wandb": ["logger=wandb", f"+logger.wandb.tags=[{name}]"],
                "wandb_environment": ["logger=wandb"],
            }[way]
            train_tiny(made, f"data.root={named_set}", *said)

    with pytest.raises(VesselError, match=f"({EXITS[way]}) what looks like a patient's name or id") as caught:
        leave()
    assert name in str(caught.value)
    assert not [path for path in made.rglob("*") if path.is_file()]
    assert not [path for path in tmp_path.iterdir() if path.name not in ("made", "run")]


# --- evaluation


def test_guard_I1_I7_what_cannot_be_read_or_is_too_large_for_the_memory_is_listed_and_never_scored(
    tiny_run, oct_set, tmp_path
):
    root, results = tmp_path / "set", tmp_path / "results"
    shutil.copytree(oct_set, root)
    cut, large = Catalog.open(root).part("test")[1:3]
    (root / cut.image).write_bytes((root / cut.image).read_bytes()[:500])

    def small_memory(module, arguments):
        if isinstance(module, Sa2VA) and large.id in arguments[0].ids:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(small_memory)
    try:
        report = score(tiny_run, f"data.root={root}", out=results)
    finally:
        hook.remove()
    assert (report["n_ok"], report["n_failed"]) == (2, 2)
    assert report["summary"]["all"]["dice"]["n_images"] == 2
    with (results / "per_image.csv").open() as stream:
        scored = {row["id"] for row in csv.DictReader(stream)}
    assert len(scored) == 2
    assert not scored & {cut.id, large.id}
    reasons = {"cannot be read as an image": cut, "out of memory": large}
    made = {name: " ".join(text.split()) for name, text in texts(results).items()}
    for failure, (reason, frame) in zip(report["failures"], reasons.items(), strict=True):
        assert (failure["id"], failure["file"]) == (frame.id, frame.image)
        assert reason in failure["reason"]
        assert not list((results / "panels").glob(f"*{frame.id}*"))
        assert all(reason in made[name] and frame.id in made[name] for name in ("report.html", "report.md"))


def test_guard_I8_I10_results_say_whose_they_are_and_keep_their_place(tiny_run, tmp_path):
    def heavier(checkpoint):
        name = next(iter(checkpoint["state_dict"]))
        checkpoint["state_dict"][name] = checkpoint["state_dict"][name] + 1

    other = changed(tiny_run, tmp_path / "other", heavier)
    score(tiny_run, out=tmp_path / "results")
    before = texts(tmp_path / "results")
    with pytest.raises(VesselError, match=r"holds the results of other weights.*overwrite=true"):
        score(other, out=tmp_path / "results")
    with pytest.raises(VesselError, match=r"holds the results of other weights.*split test"):
        score(tiny_run, "split=val", out=tmp_path / "results")
    assert texts(tmp_path / "results") == before
    fingerprint = load_model(str(tiny_run)).manifest.fingerprint
    for file in ("metrics.json", "report.html", "report.md"):
        assert fingerprint in before[file], file
        assert re.search(r"\btiny\b", before[file]), file
    assert load_model(str(other)).manifest.fingerprint != fingerprint
