"""Starting weights from an ImageNet ViT and from BERT, on small files made here."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from lavis_lite.cli import main as cli
from lavis_lite.common import checkpoint
from lavis_lite.common.registry import registry
from lavis_lite.models import load_model
from lavis_lite.models.tokenizers import PACKAGED, load_tokenizer

SHAPES = PACKAGED / "shapes"
TEXTS = ["a red circle left of a blue star", "yes"]
MED = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "max_positions": 64}
VIT = {"width": 24, "depth": 2, "num_heads": 3}


def build(**settings: Any) -> torch.nn.Module:
    section = {"vit_type": "tiny", "image_size": 48, "vit": VIT, "med": MED, "tokenizer": "shapes", "queue_size": 8}
    return registry.get_model_class("blip_pretrain").from_config({**section, **settings})


def build_blip2(**settings: Any) -> torch.nn.Module:
    section = {
        "vit_model": "eva_tiny",
        "vit_weights": "random",
        "image_size": 48,
        "qformer": MED,
        "tokenizer": "shapes",
    }
    return registry.get_model_class("blip2").from_config({**section, "num_query_token": 3, **settings})


def save_bert(folder: Path, kind: Any = BertForMaskedLM, **sizes: Any) -> Path:
    """A small BERT with the tokens of BLIP's tokenizer but those that BLIP adds; its token types are far from zero."""
    settings = {"vocab_size": load_tokenizer("shapes").vocab_size, "hidden_size": 16, "num_hidden_layers": 2,
                "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}  # fmt: skip
    model = kind(BertConfig(**{**settings, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        getattr(model, "bert", model).embeddings.token_type_embeddings.weight.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save_bert(tmp_path / "bert")


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


def test_layers_and_heads_of_an_image_encoder_are_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_classes": 0}
    source = timm.create_model("vit_tiny_patch16_224", **sizes, num_heads=4)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    build(init_vit=str(tmp_path / "vit.pth"))
    assert "vit.pth: layers 2-3 of its 4 will not be used, as the model has only 2" in caplog.text
    monkeypatch.setattr(timm, "create_model", lambda name, *, pretrained: source)
    with pytest.raises(ValueError, match=r"init_vit.* 4 .*model\.vit\.num_heads is 3"):
        build(init_vit="vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_225.*vit_tiny_patch16_224"):
        build(init_vit="vit_tiny_patch16_225")


def test_other_sizes_are_an_error(bert: Path) -> None:
    with pytest.raises(ValueError, match=r"intermediate.*\(32.*\(48|intermediate_size is 32.*48"):
        build(init_text=str(bert), med={**MED, "intermediate_size": 48})


def test_complete_weights_need_no_start(tmp_path: Path) -> None:
    """Trained weights are evaluated where what they started from is gone; a start may still be finetuned from."""
    torch.save({"model": build().state_dict()}, tmp_path / "trained.pth")
    gone = {"init_text": str(tmp_path / "gone"), "init_vit": str(tmp_path / "gone.pth")}
    for kind in ("checkpoint", "finetuned"):
        build(**gone, **{kind: str(tmp_path / "trained.pth")})
    with pytest.raises(FileNotFoundError, match="gone"):
        build(**gone, pretrained=str(tmp_path / "trained.pth"))


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertModel])
def test_states_are_berts(kind: Any, tmp_path: Path) -> None:
    """Of both readers of text, with BERT's embedding of token type 0; without it as LAVIS, which dropped it."""
    folder = save_bert(tmp_path / "bert", kind)
    theirs = BertModel.from_pretrained(folder).eval()
    blip, blip2 = (make(init_text=str(folder)).eval() for make in (build, build_blip2))
    ids, mask = blip.tokenize(TEXTS)
    with torch.no_grad():
        expected = theirs(ids, mask).last_hidden_state
        states = [blip.text_encoder(ids, mask)[0], blip2.text_states(ids, mask)]
        theirs.embeddings.token_type_embeddings.weight.zero_()
        without = theirs(ids, mask).last_hidden_state
        dropped = [
            build(init_text=str(folder), init_text_token_type=False).eval().text_encoder(ids, mask)[0],
            build_blip2(init_text=str(folder), init_text_token_type=False).eval().text_states(ids, mask),
        ]
    for actual, wanted in ((states, expected), (dropped, without)):
        for mine in actual:
            torch.testing.assert_close(mine[mask.bool()], wanted[mask.bool()], rtol=0, atol=1e-5)
    assert (expected - without)[mask.bool()].abs().max() > 0.1
    assert not any("token_type" in name for name in (*blip.state_dict(), *blip2.state_dict()))


def test_an_old_file_names_its_norms_otherwise(bert: Path, tmp_path: Path) -> None:
    """bert-base-uncased, as it lies on the hub, has gamma and beta, and heads that nobody uses."""
    model = BertForMaskedLM.from_pretrained(bert)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in model.state_dict().items()
        if "decoder" not in name
    }
    old |= {"bert.pooler.dense.weight": torch.randn(16, 16), "cls.seq_relationship.weight": torch.randn(2, 16)}
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(bert / "config.json", folder)
    torch.save(old, folder / "pytorch_model.bin")
    first, second = (build(init_text=str(place)) for place in (bert, folder))
    norm = model.bert.encoder.layer[1].output.LayerNorm.weight
    assert torch.equal(second.text_encoder.encoder.layer[1].output.LayerNorm.weight, norm)
    for name, tensor in first.text_decoder.state_dict().items():
        if "crossattention" not in name and tensor.shape[:1] != (len(first.tokenizer),):
            assert torch.equal(tensor, second.text_decoder.state_dict()[name]), name


def test_missing_language_head_stays_random(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """An encoder-only BERT has no language-model head; transformers makes one up, and says odd things about it."""
    folder = save_bert(tmp_path / "bert", BertModel)
    with caplog.at_level(logging.INFO):
        model = build(init_text=str(folder))
    assert not model.text_decoder.cls.predictions.bias.any()
    assert torch.equal(model.text_decoder.cls.predictions.transform.LayerNorm.weight, torch.ones(16))
    (line,) = [record.message for record in caplog.records if "start from" in record.message]
    encoder = {p for name, p in model.text_encoder.named_parameters() if "crossattention" not in name}
    encoder |= set(model.text_decoder.parameters()) - set(model.text_encoder.parameters())
    head = {p for name, p in model.text_decoder.cls.named_parameters() if p.shape[:1] != (len(model.tokenizer),)}
    head |= {model.text_decoder.cls.predictions.bias}
    total = {*model.text_encoder.parameters(), *model.text_decoder.parameters()}
    assert line.startswith(
        f"{len(encoder - head)} of the {len(total)} tensors of text_encoder, text_decoder start from"
    )
    assert line.endswith("random: cls, crossattention")
    assert "corrupted" not in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize("make", [build, build_blip2])
@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_attention_heads": 4}, r"num_attention_heads is 4, model\.(med|qformer)\.num_heads is 2"),
        ({"layer_norm_eps": 1e-5}, r"layer_norm_eps is 1e-05, model\.\w+\.layer_norm_eps is 1e-12"),
        ({"hidden_act": "gelu_new"}, r"hidden_act is 'gelu_new', the model's 'gelu'"),
        ({"vocab_size": 100}, r"vocab_size is 100, the tokenizer has 209 tokens"),
        ({"vocab_size": 1000}, r"vocab_size is 1000, the tokenizer has 209 tokens"),
        ({"hidden_size": 32, "intermediate_size": 48}, r"hidden_size is 32.*; intermediate_size is 48"),
        ({"max_position_embeddings": 32}, r"max_position_embeddings is 32, model\.\w+\.max_positions is 64"),
    ],
)
def test_sizes_that_shapes_do_not_show_are_compared(
    make: Any, sizes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = save_bert(tmp_path / "bert", **sizes)
    with pytest.raises(ValueError, match=words):
        make(init_text=str(folder))


def test_other_classes_and_vocabularies_are_named(bert: Path, tmp_path: Path) -> None:
    tokens = (SHAPES / "vocab.txt").read_text().split()
    tokens[107], tokens[108] = tokens[108], tokens[107]
    (bert / "vocab.txt").write_text("\n".join(tokens))
    with pytest.raises(ValueError, match=f"init_text.*107.*'{tokens[107]}'"):
        build(init_text=str(bert))
    shutil.copy(SHAPES / "vocab.txt", bert)
    build(init_text=str(bert))
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "model_type": "roberta"}))
    with pytest.raises(ValueError, match=r"model_type is 'roberta'.*'bert'"):
        build(init_text=str(bert))
    (bert / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        build(init_text=str(bert))
    (bert / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        build(init_text=str(bert))


def test_a_padded_vocabulary_gives_no_row_to_added_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save_bert(tmp_path / "bert", vocab_size=256)
    torch.manual_seed(1)
    model = build(init_text=str(folder))
    theirs = BertModel.from_pretrained(folder).embeddings.word_embeddings.weight
    assert torch.equal(model.text_encoder.embeddings.word_embeddings.weight[:209], theirs[:209])
    assert model.text_encoder.embeddings.word_embeddings.weight[209:].abs().max() < 0.2
    assert theirs[209:211].abs().max() > 0.2


@pytest.mark.parametrize("make", [build, build_blip2])
@pytest.mark.parametrize(
    ("theirs", "line"),
    [
        (5, "{folder}: layers 2-4 of its 5 will not be used, as the model has only 2"),
        (3, "{folder}: layer 2 of its 3 will not be used, as the model has only 2"),
        (1, "{folder}: layer 1 of the model's 2 start at random, as it has only 1"),
        (2, None),
    ],
)
def test_unused_and_random_layers_are_logged(
    make: Any, theirs: int, line: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_bert(tmp_path / "bert", num_hidden_layers=theirs)
    make(init_text=str(folder))
    found = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [message for message in found if "layer" in message] == ([line.format(folder=folder)] if line else [])


@pytest.mark.parametrize("make", [build, build_blip2])
def test_pickled_code_is_refused(make: Any, bert: Path, tmp_path: Path) -> None:
    (bert / "model.safetensors").unlink()
    torch.save({"bert.embeddings.LayerNorm.weight": Path("/etc")}, bert / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .*PosixPath"):
        make(init_text=str(bert))


def dry_run(tmp_path: Path, *options: str) -> int:
    import cli_helpers

    path = cli_helpers.project(tmp_path, "pretrain")
    argv = ["--cfg-path", str(path), "--dry-run", "--options", *options]
    return cli.main(cli.parser(description=""), argv)


@pytest.mark.usefixtures("shapes_data")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model.init_text=/nowhere/bert"], "model.init_text: folder /nowhere/bert does not exist"),
        (["model.init_text={bert}"], "does not fit the model: hidden_size is 16"),
        (["model.init_vit=nowhere/vit.pth"], "model.init_vit: no file nowhere/vit.pth"),
        (["model.init_text={bert}", "model.checkpoint={trained}"], None),  # complete weights need no start
        (["model.init_text=owner/bert"], None),  # nobody is asked
    ],
)
def test_dry_run_checks_initial_weights(
    options: list[str], words: str | None, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = checkpoint.save({"model": {"a": torch.zeros(1)}}, tmp_path / "trained.pth")
    code = dry_run(tmp_path, *[option.format(bert=bert, trained=trained) for option in options])
    assert code == (2 if words else 0)
    assert (words or "") in capsys.readouterr().err


def test_a_start_needs_a_model_that_takes_one() -> None:
    with pytest.raises(ValueError, match=r"model\.vit_model"):
        build_blip2(init_vit="vit_base_patch16_224")


def test_a_checkpoint_without_a_qformer_says_what_it_has(tmp_path: Path) -> None:
    path = checkpoint.save({"model": load_model("blip_caption", "tiny").state_dict()}, tmp_path / "caption.pth")
    with pytest.raises(ValueError, match=r"caption\.pth holds no tensor that Blip2"):
        load_model("blip2", "tiny", init_text=str(path))
