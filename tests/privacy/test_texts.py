"""Texts of the files of a folder, each of which is searched. All names are invented."""

import json
import re

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from tests.privacy.conftest import ID

from vessel.errors import VesselError
from vessel.plotting.panels import panel_figure, sweep_figure
from vessel.privacy.texts import texts_of


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
    with pytest.raises(VesselError, match=rf"^{re.escape(file)} .*the export "):
        scanner.require_clean(texts_of(export), doing="the export")


def write_picture(kind, file):
    """Write a picture with a name in its metadata."""
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
def test_guard_D11_metadata_of_pictures_is_searched(tmp_path, scanner, kind):
    (tmp_path / "results").mkdir()
    write_picture(kind, tmp_path / "results/panel.png")
    with pytest.raises(VesselError, match=r"^panel\.png .*quillon marsh vex"):
        scanner.require_clean(texts_of(tmp_path / "results"), doing="the report")


def test_metadata_of_our_figures_name_the_library_only(tmp_path):
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
