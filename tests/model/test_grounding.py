import subprocess
import sys

import pytest
import torch

from vessel.model.grounding import best_candidate, build_grounding

APP = """
import hydra
{first}
@hydra.main(version_base="1.3", config_path=None)
def main(config):
    import vessel.model.grounding
    from hydra.core.global_hydra import GlobalHydra
    print("initialised by the app:", GlobalHydra.instance().is_initialized())
main()
"""


@pytest.mark.parametrize("first", ["", "import vessel.model.grounding"])
def test_a_hydra_app_starts_whether_sam2_comes_first_or_last(tmp_path, first):
    app = tmp_path / "app.py"
    app.write_text(APP.format(first=first))
    run = subprocess.run([sys.executable, str(app)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    assert "initialised by the app: True" in run.stdout


def test_dense_position_is_sam2s_own(plan):
    grounding = plan().build().grounding
    assert torch.allclose(grounding._dense_position(), grounding.sam_prompt_encoder.get_dense_pe(), atol=1e-5)


def test_prompt_tokens_are_sam2s_padding_then_the_language(plan):
    """Compare with SAM2's own prompt encoder: without a click it gives what `decode` builds by itself."""
    encoder = plan().build().grounding.sam_prompt_encoder
    points = torch.zeros(1, 1, 2), -torch.ones(1, 1, dtype=torch.int32)
    sparse, dense = encoder(points=points, boxes=None, masks=None)
    assert torch.equal(sparse, encoder.not_a_point_embed.weight[None].expand(1, 2, -1))
    assert torch.equal(dense, encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(dense))


def test_the_candidate_with_the_highest_predicted_iou_is_taken():
    masks = torch.arange(2 * 3 * 4.0).view(2, 3, 2, 2)
    chosen = best_candidate(masks, torch.tensor([[0.1, 0.9, 0.2], [0.5, 0.1, 0.4]]))
    assert torch.equal(chosen, torch.stack([masks[0, 1], masks[1, 0]]))


def test_true_size_is_sam2_hiera_large():
    from vessel.model.grounding import GroundingConfig

    with torch.device("cpu"):
        grounding = build_grounding(GroundingConfig())
    by_part = {
        name: sum(p.numel() for p in getattr(grounding, name).parameters())
        for name in ("image_encoder", "memory_attention", "memory_encoder", "sam_mask_decoder", "obj_ptr_proj")
    }
    assert by_part == {
        "image_encoder": 212_703_280, "memory_attention": 5_922_304, "memory_encoder": 1_384_608,
        "sam_mask_decoder": 4_215_109, "obj_ptr_proj": 197_376,
    }  # fmt: skip
