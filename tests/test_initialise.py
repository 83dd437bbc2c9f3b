"""Starting weights from an ImageNet ViT and from BERT, on small files made here."""

from pathlib import Path

import pytest
import timm
import torch
from transformers import BertConfig, BertForMaskedLM

from lavis_lite.registry import registry

MED = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "max_positions": 64}
VIT = {"width": 24, "depth": 2, "num_heads": 3}


def build(**settings: str) -> torch.nn.Module:
    section = {"vit_type": "tiny", "image_size": 48, "vit": VIT, "med": MED, "tokenizer": "shapes", "queue_size": 8}
    return registry.get_model_class("blip_pretrain").from_config({**section, **settings})


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A small BERT with two tokens fewer than BLIP's tokenizer, as BERT-base has."""
    vocabulary = len(build().tokenizer) - 2
    config = BertConfig(vocab_size=vocabulary, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=64)  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_text_transformers_start_as_bert(bert: Path) -> None:
    model, source = build(init_text=str(bert)), BertForMaskedLM.from_pretrained(bert)
    words = source.bert.embeddings.word_embeddings.weight
    assert torch.equal(model.text_encoder.embeddings.word_embeddings.weight[: len(words)], words)
    for mine in (model.text_encoder, model.text_decoder.bert, model.text_encoder_m):
        theirs = source.bert.encoder.layer[1]
        assert torch.equal(mine.encoder.layer[1].attention.self.query.weight, theirs.attention.self.query.weight)
        assert torch.equal(mine.encoder.layer[1].output.dense.weight, theirs.output.dense.weight)
    assert torch.equal(model.text_decoder.cls.predictions.bias[: len(words)], source.cls.predictions.bias)


def test_image_encoder_starts_as_a_timm_file(tmp_path: Path) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    source = timm.create_model("vit_tiny_patch16_224", **sizes)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    model = build(init_vit=str(tmp_path / "vit.pth"))
    assert torch.equal(model.visual_encoder.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert torch.equal(model.visual_encoder_m.norm.weight, source.norm.weight)
    assert torch.equal(model.visual_encoder.pos_embed[:, 0], source.pos_embed[:, 0])
    assert model.visual_encoder.pos_embed.shape == (1, 37, 24)


def test_other_sizes_are_an_error(bert: Path) -> None:
    with pytest.raises(ValueError, match="choose a source of the same sizes"):
        build(init_text=str(bert), med={**MED, "intermediate_size": 48})


def test_complete_weights_need_no_start(tmp_path: Path) -> None:
    """Trained weights are evaluated where what they started from is gone; a start may still be finetuned from."""
    torch.save({"model": build().state_dict()}, tmp_path / "trained.pth")
    gone = {"init_text": str(tmp_path / "gone"), "init_vit": str(tmp_path / "gone.pth")}
    for kind in ("checkpoint", "finetuned"):
        build(**gone, **{kind: str(tmp_path / "trained.pth")})
    with pytest.raises(FileNotFoundError, match="gone"):
        build(**gone, pretrained=str(tmp_path / "trained.pth"))
