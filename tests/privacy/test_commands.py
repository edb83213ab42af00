"""Names of patients in image files, settings and runs, which no command lets out. All names are invented."""

import json
import shutil
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from tests.commands import changed, score, vessel

from vessel.errors import VesselError

pytestmark = pytest.mark.slow


def jpeg_with_iptc(file, name):
    """Write a JPEG whose EXIF, XMP, comment and IPTC by-line hold a name."""
    exif = Image.Exif()
    exif[0x010E], exif[0x9C9D] = name, name.encode("utf-16-le")
    xmp = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'><dc:creator>{name}</dc:creator></x:xmpmeta>".encode()
    noise(1).save(file, exif=exif, xmp=xmp, comment=name.encode())
    line = b"\x1c\x02\x50" + struct.pack(">H", len(name)) + name.encode()
    resource = b"Photoshop 3.0\x008BIM\x04\x04\x00\x00" + struct.pack(">I", len(line)) + line + b"\0" * (len(line) % 2)
    data = file.read_bytes()
    file.write_bytes(data[:2] + b"\xff\xed" + struct.pack(">H", len(resource) + 2) + resource + data[2:])


def png_with_texts(file, name):
    """Write a PNG with the name in plain, compressed and international text, in EXIF, and in text after its pixels."""
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
    """List the kinds of the chunks of a PNG."""
    data, at, kinds = png.read_bytes(), 8, set()
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        kinds.add(kind)
        at += 12 + length
    assert at == len(data), "nothing after the last chunk"
    return kinds


def test_guard_D11_no_metadata_of_image_files_is_imported(tmp_path):
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
        content = file.relative_to(tmp_path / "set").as_posix().encode() + b"\n" + file.read_bytes()
        for word in (name, "Quillon", "ana bell", "bo carr", "cy dale", "ana_bell"):
            for coding in ("utf-8", "utf-16-le"):
                assert word.lower().encode(coding) not in content.lower(), (file.name, word)
        assert file.stat().st_mtime > begin - 2, "times of the source files date an examination"
        if file.suffix == ".png":
            assert chunks(file) <= {b"IHDR", b"IDAT", b"IEND", b"PLTE"}, file.name


@pytest.fixture(scope="module")
def named_set(oct_set, tmp_path_factory):
    """Copy the synthetic data set, with a mapping beside it that holds one name."""
    folder = tmp_path_factory.mktemp("named") / "set"
    shutil.copytree(oct_set, folder)
    folder.with_name("set.identity").mkdir()
    kept = {"patients": {}, "files": {}, "names": ["Quillon Marsh Vex"]}
    folder.with_name("set.identity").joinpath("mapping.json").write_text(json.dumps(kept))
    return folder


EXITS = {
    "configuration": "configuration",
    "wandb": "configuration",
    "wandb_environment": "WANDB_NOTES",
    "report": r"metrics\.json|report\.html",
    "export": r"vessel\.json",
    "card": r"README\.md",
    "push": "repository",
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
            monkeypatch.setenv("WANDB_NOTES", f"of {name}" if way == "wandb_environment" else "")
            options = {
                "configuration": [f"name={name}"],
                "wandb": ["logger=wandb", f"+logger.wandb.tags=[{name}]"],
                "wandb_environment": ["logger=wandb"],
            }[way]
            train_tiny(made, f"data.root={named_set}", *options)

    with pytest.raises(VesselError, match=rf"({EXITS[way]}) .*\({name}"):
        leave()
    assert not [path for path in made.rglob("*") if path.is_file()]
    assert not [path for path in tmp_path.iterdir() if path.name not in ("made", "run")]
