import numpy as np
import pytest
from PIL import Image

from vessel.training.callbacks.mask_panels import MaskPanels


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "panels").iterdir())


def test_the_same_images_at_every_nth_validation(tmp_path, trainer, toy_task, batches):
    trainer(MaskPanels(images=1, every_n_validations=2), max_epochs=4).fit(toy_task(), batches(1), batches())
    assert names(tmp_path) == ["step_000001_p0_v0_000.png", "step_000003_p0_v0_000.png"]
    with Image.open(tmp_path / "panels" / names(tmp_path)[0]) as image:
        assert np.asarray(image.convert("RGB")).std() > 10


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (2, {"p0_v0_000", "p1_v1_000"}),
        (4, {"p0_v0_000", "p1_v1_000", "p2_v2_000", "p0_v0_001"}),
        (9, {f"p{v}_v{v}_00{i}" for v in range(3) for i in range(2)}),
    ],
)
def test_different_videos_come_first(tmp_path, trainer, toy_task, batches, images, expected):
    trainer(MaskPanels(images=images)).validate(toy_task(), batches(), verbose=False)
    assert {name.removeprefix("step_000000_").removesuffix(".png") for name in names(tmp_path)} == expected


def test_nothing_is_drawn_in_sanity_checking_or_test(tmp_path, trainer, toy_task, batches):
    run = trainer(MaskPanels(), num_sanity_val_steps=1, check_val_every_n_epoch=5)
    run.fit(toy_task(), batches(1), batches())
    run.test(toy_task(), batches(), verbose=False)
    assert not (tmp_path / "panels").exists()
