"""Language models behind one interface, against transformers: generation and forward passes; what loading refuses."""

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference_case import REFERENCE
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    OPTConfig,
    PegasusConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
)

from lavis_lite.datasets.shapes.language import vocabulary
from lavis_lite.datasets.shapes.questions import question_words
from lavis_lite.nn.attention import KeyValueCache
from lavis_lite.nn.decoding import DecodingConfig, GenerationConfig, decode
from lavis_lite.nn.llm import LLMAdapter
from lavis_lite.nn.llm_loading import load_language_model
from lavis_lite.nn.llm_masks import full_lengths, known_padding
from lavis_lite.nn.llm_sources import PACKAGED
from lavis_lite.nn.quantization import quantized_layers, saved_by_quantization

TINY = REFERENCE / "tiny_hf"
START, END, PAD, VOCABULARY = 2, 3, 1, 60
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64}
BART = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
        {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "lfm2": Lfm2Config(**SIZES, num_key_value_heads=2, layer_types=["full_attention", "conv"]),
    "t5": T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "bart": BartConfig(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=64, **BART, scale_embedding=True),
    "pegasus": PegasusConfig(
        vocab_size=VOCABULARY, d_model=32, max_position_embeddings=64, **BART, scale_embedding=True
    ),
}
FAMILIES = sorted(CONFIGS)


def random_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A small model whose weights are large enough for its texts to differ."""
    config = type(CONFIGS[family]).from_dict(CONFIGS[family].to_dict())
    config.bos_token_id, config.eos_token_id, config.pad_token_id = START, END, PAD
    config.decoder_start_token_id = START
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.25)
    settings = model.generation_config
    settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = START, END, PAD
    settings.decoder_start_token_id, settings.forced_eos_token_id, settings.forced_bos_token_id = START, None, None
    return model


def adapter(model: PreTrainedModel) -> LLMAdapter:
    return LLMAdapter(model, start_id=START, end_id=END, pad_id=PAD)


def inputs(lm: LLMAdapter, *, in_front: bool = False) -> tuple[Tensor, Tensor]:
    """Embeddings and mask of four samples, of which three are padded."""
    lengths, longest = (9, 5, 7, 3), 9
    embeds = torch.randn(4, longest, lm.width, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(4, longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, longest - length if in_front else 0 : longest if in_front else length] = 1
    return embeds, mask


def trimmed(ids: Tensor, end: int = END) -> list[list[int]]:
    """Rows up to the end token, without padding."""
    rows = [row[1:] if row[0] == START else row for row in ids.tolist()]
    rows = [row[: row.index(end)] if end in row else row for row in rows]
    return [row[: max((i + 1 for i, token in enumerate(row) if token != PAD), default=0)] for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 4])
def test_generation_is_that_of_transformers(family: str, beams: int) -> None:
    model = random_model(family)
    lm = adapter(model)
    embeds, mask = inputs(lm, in_front=not lm.is_encoder_decoder)
    ours = lm.generate(embeds, mask, lm.decoding(GenerationConfig(max_length=11, num_beams=beams, length_penalty=0.0)))
    theirs = model.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=10, num_beams=beams, length_penalty=0.0,
        do_sample=False,
    )  # fmt: skip
    assert trimmed(ours.ids) == trimmed(theirs)
    assert len(set(map(tuple, trimmed(ours.ids)))) > 1


@pytest.mark.parametrize(("family", "penalty"), [("opt", 1.0), ("t5", 1.7)])
def test_minimum_length_and_repetition_penalty_are_those_of_transformers(family: str, penalty: float) -> None:
    """Today's transformers leave a decoder's start token, which it never reads, out of the penalty."""
    model = random_model(family)
    lm = adapter(model)
    embeds, mask = inputs(lm, in_front=not lm.is_encoder_decoder)
    plain = lm.generate(embeds, mask, lm.decoding(GenerationConfig(max_length=9)))
    lm.end_id = int(plain.ids[0, 3])  # a text that would end early
    ours = lm.generate(
        embeds, mask, lm.decoding(GenerationConfig(max_length=9, min_length=6, repetition_penalty=penalty))
    )
    theirs = model.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=8, min_new_tokens=5, repetition_penalty=penalty,
        eos_token_id=lm.end_id, do_sample=False,
    )  # fmt: skip
    assert trimmed(ours.ids, lm.end_id) == trimmed(theirs, lm.end_id)
    assert trimmed(ours.ids, lm.end_id) != trimmed(plain.ids, lm.end_id)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sample_is_read_as_if_alone(family: str) -> None:
    lm = adapter(random_model(family))
    embeds, mask = inputs(lm)
    config = lm.decoding(GenerationConfig(max_length=9, num_beams=3))
    together = trimmed(lm.generate(embeds, mask, config).ids)
    order = torch.tensor([2, 0, 3, 1])
    assert trimmed(lm.generate(embeds[order], mask[order], config).ids) == [together[i] for i in order.tolist()]
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        one = slice(row, row + 1)
        assert trimmed(lm.generate(embeds[one, :length], mask[one, :length], config).ids) == [together[row]]
        alone = lm.prefix(embeds[one, :length], mask[one, :length]).logits
        torch.testing.assert_close(lm.prefix(embeds, mask).logits[one], alone, rtol=1e-4, atol=1e-4)


def test_padding_between_queries_and_prompt_changes_nothing() -> None:
    """[queries, pads, prompt], as LAVIS pads."""
    lm = adapter(random_model("opt"))
    embeds, _ = inputs(lm)
    padded = torch.cat([embeds[:1, :4], torch.full((1, 3, lm.width), 7.0), embeds[:1, 4:]], dim=1)
    mask = torch.tensor([[1] * 4 + [0] * 3 + [1] * 5])
    config = lm.decoding(GenerationConfig(max_length=9, num_beams=3))
    expected = lm.generate(embeds[:1], torch.ones(1, 9, dtype=torch.long), config).ids
    assert torch.equal(lm.generate(padded, mask, config).ids, expected)


@pytest.mark.parametrize("step_bytes", [1, 150_000, 4 << 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_candidate_losses_are_those_of_whole_passes(
    family: str, step_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(family)
    lm = adapter(model)
    monkeypatch.setattr("lavis_lite.nn.llm.STEP_BYTES", step_bytes)
    embeds, mask = inputs(lm)
    ids = torch.randint(4, VOCABULARY, (4, 5, 3), generator=torch.Generator().manual_seed(2))
    counts = torch.ones_like(ids)
    counts[:, 1, 1:] = counts[:, 3, 2:] = counts[3, 0] = 0
    actual = lm.candidate_losses(lm.prefix(embeds, mask), ids, counts)
    assert (actual == torch.inf).nonzero().tolist() == [[3, 0]]
    for row, candidate in ((0, 0), (1, 1), (2, 3), (3, 4)):
        length, num_tokens = int(mask[row].sum()), int(counts[row, candidate].sum())
        text = ids[row, candidate, :num_tokens]
        given = embeds[row : row + 1, :length]
        if lm.is_encoder_decoder:
            before = torch.cat([torch.tensor([START]), text[:-1]])[None]
            logits = model(inputs_embeds=given, decoder_input_ids=before).logits[0]
        else:
            whole = torch.cat([given, model.get_input_embeddings()(text[None])], dim=1)
            logits = model(inputs_embeds=whole).logits[0, length - 1 : -1]
        expected = F.cross_entropy(logits, text, reduction="sum")
        torch.testing.assert_close(actual[row, candidate], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_inputs_are_read_once_for_all_beams(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(family)
    lm, shapes = adapter(model), []
    stack = model.get_encoder() if lm.is_encoder_decoder else model.model
    forward = stack.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["inputs_embeds"].shape[:2]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(stack, "forward", counted)
    embeds, mask = inputs(lm)
    lm.generate(embeds, mask, lm.decoding(GenerationConfig(max_length=5, min_length=5, num_beams=3)))
    assert shapes == [(4, 9)] + ([] if lm.is_encoder_decoder else [(12, 1)] * 3)


def test_cached_prefix_can_be_expanded_twice() -> None:
    lm = adapter(random_model("llama"))
    prefix = lm.prefix(*inputs(lm))
    first, second = prefix.cache.expand(2), prefix.cache.expand(3)
    ids = torch.arange(4, 8)[:, None]
    expected, _ = lm.extend(first, ids.repeat_interleave(2, 0))
    actual, _ = lm.extend(second, ids.repeat_interleave(3, 0))
    torch.testing.assert_close(actual[::3], expected[::2])


def test_nucleus_of_one_token_is_greedy_and_captions_are_side_by_side() -> None:
    lm = adapter(random_model("opt"))
    embeds, mask = inputs(lm)
    greedy = lm.generate(embeds, mask, lm.decoding(GenerationConfig(max_length=8)))
    drawn = lm.generate(
        embeds, mask, lm.decoding(GenerationConfig(max_length=8, use_nucleus_sampling=True, top_p=1e-6, num_captions=2))
    )
    assert trimmed(drawn.ids) == [row for row in trimmed(greedy.ids) for _ in range(2)]


def test_texts_of_padding_alone_do_not_fail() -> None:
    """A T5 may start with, and write, its padding token only."""
    logits = torch.zeros(1, 5)
    logits[0, 0] = 9.0

    def step(new_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        state = torch.zeros(len(new_ids), 1, 1, 1)
        return logits.expand(len(new_ids), -1), KeyValueCache(((state, state),))

    config = DecodingConfig(eos_id=1, pad_id=0, max_length=4, num_beams=2)
    assert decode(step, torch.zeros(1, 1, dtype=torch.long), config).ids.tolist() == [[0]]


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_loss_is_the_mean_over_labels_and_reaches_the_inputs_only(family: str) -> None:
    model = random_model(family).requires_grad_(False)
    lm = adapter(model)
    embeds, mask = inputs(lm, in_front=not lm.is_encoder_decoder)
    embeds.requires_grad_(True)
    labels = torch.tensor([[5, 6, -100], [7, -100, -100], [8, 9, 10], [-100, 11, -100]])
    loss = lm.loss(embeds, mask, labels)
    losses = []
    for row, length in enumerate([9, 9, 9, 9]):
        given, own = embeds[row : row + 1, :length], labels[row]
        if lm.is_encoder_decoder:
            before = torch.cat([torch.tensor([START]), own[:-1].clamp(min=PAD)])[None]
            logits = model(
                inputs_embeds=given, attention_mask=mask[row : row + 1], decoder_input_ids=before,
                decoder_attention_mask=(own != -100).long()[None],
            ).logits[0]  # fmt: skip
        else:
            logits = model(inputs_embeds=given, attention_mask=mask[row : row + 1]).logits[0, -4:-1]
        losses += [F.cross_entropy(logits[t], own[t]) for t in range(3) if own[t] >= 0]
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)
    loss.backward()
    assert (embeds.grad.norm(dim=(1, 2)) > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_only_labels_are_scored(family: str) -> None:
    """What follows the output layer, such as a bias or a soft cap, stays."""
    lm = adapter(random_model(family))
    rows: list[int] = []
    lm.model.get_output_embeddings().register_forward_hook(lambda _, args, out: rows.append(args[0].shape[1]))
    embeds, mask = inputs(lm, in_front=not lm.is_encoder_decoder)
    labels = torch.tensor([[5, 6, -100], [7, -100, -100], [8, 9, 10], [-100, 11, -100]])
    with torch.no_grad():
        loss = lm.loss(embeds, mask, labels)
        assert rows == [7]
        logits = lm.logits(embeds, mask, labels)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_a_frozen_model_keeps_its_precision_under_autocast() -> None:
    model = random_model("llama").requires_grad_(False)
    lm = adapter(model)
    embeds, mask = inputs(lm, in_front=True)
    labels = torch.tensor([[5, 6]] * 4)
    expected = lm.logits(embeds, mask, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lm.logits(embeds, mask, labels), expected)
        model.requires_grad_(True)  # a trained one computes as the run says
        assert not torch.equal(lm.logits(embeds, mask, labels), expected)


def test_bf16_reads_padded_inputs_and_gives_float32() -> None:
    lm = adapter(random_model("llama").to(torch.bfloat16))
    embeds, mask = inputs(lm)
    prefix = lm.prefix(embeds, mask)
    assert prefix.logits.dtype == torch.float32
    assert prefix.logits.isfinite().all()
    assert lm.loss(embeds, mask, torch.tensor([[5, 6]] * 4)).dtype == torch.float32


def test_inputs_beyond_the_context_are_refused() -> None:
    lm = adapter(random_model("opt"))
    embeds, mask = torch.zeros(1, 60, lm.width), torch.ones(1, 60, dtype=torch.long)
    lm.generate(embeds, mask, lm.decoding(GenerationConfig(max_length=5)))
    with pytest.raises(ValueError, match=r"64 .*65"):
        lm.generate(embeds, mask, lm.decoding(GenerationConfig(max_length=6)))
    with pytest.raises(ValueError, match="64"):
        lm.loss(torch.zeros(1, 65, lm.width), torch.ones(1, 65, dtype=torch.long), torch.tensor([[5]]))


def test_texts_beyond_the_context_of_a_decoder_are_refused() -> None:
    """What an encoder-decoder writes has 64 positions too, of which the start token takes one; the last is not read."""
    lm = adapter(random_model("bart"))
    (embeds, mask), text = inputs(lm), torch.full((4, 64), 5)
    assert lm.generate(embeds, mask, lm.decoding(GenerationConfig(max_length=65, min_length=65))).ids.shape == (4, 65)
    assert lm.loss(embeds, mask, text).isfinite()
    assert lm.candidate_losses(lm.prefix(embeds, mask), text[None], torch.ones_like(text)[None]).isfinite().all()
    longer = torch.full((4, 65), 5)
    with pytest.raises(ValueError, match=r"64 .*65"):
        lm.generate(embeds, mask, lm.decoding(GenerationConfig(max_length=66)))
    with pytest.raises(ValueError, match="64"):
        lm.loss(embeds, mask, longer)
    with pytest.raises(ValueError, match="64"):
        lm.candidate_losses(lm.prefix(embeds, mask), longer[None], torch.ones_like(longer)[None])


@pytest.mark.parametrize("family", ["bart", "pegasus", "t5"])
def test_ids_are_embedded_as_the_model_does(family: str) -> None:
    model = random_model(family)
    lm = adapter(model)
    ids, labels = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10]])
    ours = lm.logits(lm.embed(ids), torch.ones_like(ids), labels)
    theirs = model(input_ids=ids, decoder_input_ids=torch.tensor([[START, 9]])).logits
    torch.testing.assert_close(ours, theirs)


# loading


@pytest.mark.parametrize("name", ["tiny_opt", "tiny_t5", "tiny_vicuna"])
def test_packaged_models(name: str) -> None:
    model, tokenizer = load_language_model(name, dtype=torch.float32)
    assert sum(path.stat().st_size for path in (PACKAGED / name).iterdir()) < 60_000
    assert max(tokenizer.get_vocab().values()) < model.config.vocab_size
    words = sorted({*vocabulary(), *question_words(), "Question", "Answer", "What", "photo"})
    for word in [*words, "0", "9"]:
        (row,) = tokenizer([word], add_special_tokens=False).input_ids
        assert len(row) == (1 if word.isalnum() else len(row)), word
        assert tokenizer.decode(row).strip() == word
    text = "Question: what color is the shape to the left of the red circle? Answer: blue"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("zebra!", add_special_tokens=False).input_ids.count(tokenizer.unk_token_id) == 0
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    assert len(newline) == 1
    assert tokenizer("a red circle\n", add_special_tokens=False).input_ids[-1:] == newline
    specials = {"tiny_opt": (2, 2, 1), "tiny_t5": (None, 1, 0), "tiny_vicuna": (1, 2, 2)}[name]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == specials


def test_weights_are_those_of_the_file_in_the_precision_asked_for() -> None:
    from safetensors.torch import load_file

    for folder in ("opt", "t5", "llama"):
        model, _ = load_language_model(TINY / folder, dtype=torch.bfloat16)
        state = model.state_dict()
        for name, tensor in load_file(TINY / folder / "model.safetensors").items():
            assert torch.equal(state[name], tensor.to(torch.bfloat16)), name


def test_an_untied_t5_stays_untied(tmp_path: Path) -> None:
    """Loaded, built at random, and saved and loaded again."""
    model, tokenizer = load_language_model(TINY / "t5", dtype=torch.float32)
    fresh, _ = load_language_model("tiny_t5", dtype=torch.float32)
    for each in (model, fresh):
        assert each.lm_head.weight is not each.shared.weight
        assert each.encoder.embed_tokens.weight is each.shared.weight
        assert not each.config.scale_decoder_outputs
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_language_model(tmp_path, dtype=torch.float32)
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("folder", ["opt", "t5"])
def test_the_language_model_of_a_blip2_of_transformers(folder: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, Blip2Config, Blip2ForConditionalGeneration

    small = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={"hidden_size": 24, "image_size": 24, "patch_size": 8, **small},
        qformer_config={"hidden_size": 32, "encoder_hidden_size": 24, **small},
        text_config=AutoConfig.from_pretrained(TINY / folder).to_dict(),
    )
    whole = Blip2ForConditionalGeneration(config)
    if folder == "t5":
        whole.language_model.lm_head.weight = torch.nn.Parameter(torch.randn(128, 32))
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY / folder).save_pretrained(tmp_path)
    model, _ = load_language_model(tmp_path, dtype=torch.float32)
    for (name, ours), theirs in zip(
        model.state_dict().items(), whole.language_model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = without(tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["model.decoder.layers.1.fc1.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.decoder\.layers\.1\.fc1\.weight"):
        load_language_model(folder, dtype=torch.float32)


def test_t5_uses_the_exact_gelu() -> None:
    """As LAVIS does; the config file says gelu_new."""
    model, _ = load_language_model(TINY / "t5", dtype=torch.float32)
    x = torch.linspace(-3, 3, 50)
    act = model.encoder.block[0].layer[1].DenseReluDense.act
    torch.testing.assert_close(act(x), x * 0.5 * (1 + torch.erf(x / 2**0.5)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("folder", ["opt", "t5"])
def test_a_frozen_model_drops_nothing_out(folder: str) -> None:
    config = json.loads((TINY / folder / "config.json").read_text())
    assert config.get("dropout", config.get("dropout_rate")) == 0.1
    for frozen in (True, False):
        model, _ = load_language_model(TINY / folder, dtype=torch.float32, frozen=frozen)
        lm = adapter(model.train())
        embeds, mask = inputs(lm)
        first, second = (lm.logits(embeds, mask, torch.tensor([[5, 6]] * 4)) for _ in range(2))
        assert torch.equal(first, second) == frozen
        assert any(parameter.requires_grad for parameter in model.parameters()) != frozen


@pytest.mark.parametrize("folder", ["opt", "t5"])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(folder: str) -> None:
    gradients, passes = [], []
    for grad_checkpoint in (False, True):
        model, _ = load_language_model(TINY / folder, dtype=torch.float32, frozen=True, grad_checkpoint=grad_checkpoint)
        lm, count = adapter(model.train()), []
        part = model.decoder.block[0].layer[0] if lm.is_encoder_decoder else model.model.decoder.layers[0].self_attn
        part.register_forward_hook(lambda *_, count=count: count.append(1))
        embeds, mask = inputs(lm)
        embeds.requires_grad_(True)
        lm.loss(embeds, mask, torch.tensor([[5, 6]] * 4)).backward()
        gradients.append(embeds.grad)
        passes.append(len(count))
    torch.testing.assert_close(*gradients)
    assert passes == [1, 2]


def test_nothing_is_loaded_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, tokenizer = load_language_model(
            TINY / "llama",
            dtype=torch.bfloat16,
            overrides={"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32000, "head_dim": 128},
            pad_token="[PAD]",
        )
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight.shape == (32001, 4096)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (512, 4096)
    assert model.dtype == torch.bfloat16
    assert tokenizer.pad_token == "[PAD]"


def test_the_padding_token_is_added_once(tmp_path: Path) -> None:
    model, tokenizer = load_language_model("tiny_vicuna", dtype=torch.float32, pad_token="[PAD]")
    size = json.loads((PACKAGED / "tiny_vicuna" / "config.json").read_text())["vocab_size"]
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == size + 1
    assert tokenizer.pad_token_id <= size
    for layer in (model.get_input_embeddings(), model.lm_head):
        torch.testing.assert_close(layer.weight[size], layer.weight[:size].mean(dim=0))
        assert layer.weight.requires_grad
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_language_model(tmp_path, dtype=torch.float32, pad_token="[PAD]")
    assert again.get_input_embeddings().num_embeddings == size + 1


def without(tmp_path: Path, *names: str, **config: Any) -> Path:
    """A copy of the tiny OPT without some files, and with other values in its config."""
    folder = shutil.copytree(TINY / "opt", tmp_path / "llm")
    for name in names:
        (folder / name).unlink()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


@pytest.fixture
def no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong must be found before."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        monkeypatch.setattr(auto, "from_pretrained", refuse)
        monkeypatch.setattr(auto, "from_config", refuse)
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")


@pytest.mark.usefixtures("no_weights_are_read")
class TestRefused:
    """Mistakes, found before any weights are read."""

    def load(self, source: Path | str, **settings: Any) -> None:
        load_language_model(source, dtype=torch.float32, **settings)

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no_such .*tiny_opt, tiny_t5, tiny_vicuna"):
            self.load(tmp_path / "no_such")

    def test_a_hub_id_without_a_network(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"config\.json .*no-such/model"):
            self.load("no-such/model")

    def test_a_folder_without_tokenizer(self, tmp_path: Path) -> None:
        files = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
            self.load(without(tmp_path, *files))

    def test_a_class_that_transformers_lacks(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"config.json: .*'megabrain'"):
            self.load(without(tmp_path, model_type="megabrain"))

    def test_a_class_that_writes_no_text(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"a vit .* choose another"):
            self.load(without(tmp_path, model_type="vit"))

    def test_a_class_that_reads_from_both_sides(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"a bert .* choose another"):
            self.load(without(tmp_path, model_type="bert"))

    def test_a_class_without_keys_and_values(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"MambaForCausalLM.*past_key_values.* choose another"):
            self.load(without(tmp_path, model_type="mamba"))

    @pytest.mark.parametrize("model_type", ["fsmt", "prophetnet"])
    def test_a_class_that_only_seems_to_fit(self, model_type: str, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(ValueError, match=rf"a {model_type} .* choose another language model"):
            self.load(tmp_path)

    def test_a_tokenizer_of_another_model(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"380 .*300"):
            self.load(without(tmp_path, vocab_size=300))

    def test_an_unknown_size(self) -> None:
        with pytest.raises(ValueError, match="hidden_sise"):
            self.load(TINY / "opt", overrides={"hidden_sise": 3})

    def test_an_unknown_quantization(self) -> None:
        with pytest.raises(ValueError, match=r"llm_quantization: .*'int7'"):
            self.load(TINY / "opt", quantization="int7")

    @pytest.mark.parametrize(
        ("package", "settings"), [("bitsandbytes", {"quantization": "int8"}), ("peft", {"lora": {"r": 4}})]
    )
    def test_a_package_that_is_not_installed(
        self, package: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=f"pip install {package}"):
            self.load(TINY / "opt", **settings)


def test_a_model_without_weights_is_not_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lavis_lite.nn.llm_loading._check_extras", lambda *_: None)
    with pytest.raises(ValueError, match="llm_quantization: tiny_opt"):
        load_language_model("tiny_opt", dtype=torch.bfloat16, quantization="int8")


@pytest.mark.slow
def test_lora_trains_adapters_alone() -> None:
    model, _ = load_language_model(TINY / "opt", dtype=torch.bfloat16, lora={"r": 4, "lora_alpha": 8})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    lm = adapter(model.train())
    embeds, mask = inputs(lm)
    plain, _ = load_language_model(TINY / "opt", dtype=torch.bfloat16, frozen=True)
    labels = torch.tensor([[5, 6]] * 4)
    loss = lm.loss(embeds, mask, labels)
    torch.testing.assert_close(loss, adapter(plain).loss(embeds, mask, labels))  # adapters start at zero
    loss.backward()
    assert any(p.grad is not None and p.grad.norm() > 0 for p in trained.values())
    with pytest.raises(ValueError, match=r"llm_lora\.ranks: unknown key"):
        load_language_model(TINY / "opt", dtype=torch.bfloat16, lora={"ranks": 4})


WIDE = {
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128},
    "t5": {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
}
"""Sizes that bitsandbytes' CPU kernels take: 4-bit weights are in blocks of 64."""


@pytest.fixture(scope="module", params=sorted(WIDE))
def wide_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model, wide enough, as transformers saves it."""
    folder = tmp_path_factory.mktemp("wide") / request.param
    shutil.copytree(TINY / request.param, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = AutoConfig.from_pretrained(TINY / request.param, **WIDE[request.param])
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("quantization", "stored"), [("int8", torch.int8), ("int4", torch.uint8)])
def test_quantized_weights_answer_nearly_alike(quantization: str, stored: torch.dtype, wide_folder: Path) -> None:
    """On the CPU too; 8 bits a weight, or two weights a byte, and logits near those of the whole weights."""
    pytest.importorskip("bitsandbytes")
    settings = {"dtype": torch.bfloat16, "frozen": True}
    whole, model = (
        adapter(load_language_model(wide_folder, **settings, **more)[0].eval())
        for more in ({}, {"quantization": quantization})
    )
    assert stored in {parameter.dtype for parameter in model.model.parameters()}
    embeds, mask = inputs(whole)
    labels = torch.tensor([[5, 6]] * 4)
    expected, found = (lm.logits(embeds, mask, labels) for lm in (whole, model))
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < (0.1 if quantization == "int8" else 0.3) * expected.norm()
    assert model.generate(embeds, mask, model.decoding(GenerationConfig(max_length=4, num_beams=2))).ids.shape[0] == 4


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_bytes_are_counted_without_quantizing(quantization: str, wide_folder: Path) -> None:
    """On the meta device, as the dry run does, against what bitsandbytes stores."""
    pytest.importorskip("bitsandbytes")
    settings = {"dtype": torch.bfloat16, "frozen": True, "quantization": quantization}
    with torch.device("meta"):
        sketch, _ = load_language_model(wide_folder, **settings, lora={"r": 2, "target_modules": "all-linear"})
    whole, _ = load_language_model(wide_folder, dtype=torch.bfloat16, frozen=True)
    found, _ = load_language_model(wide_folder, **settings)
    stored = 0
    for parameter in found.parameters():
        stored += parameter.numel() * parameter.element_size()
        if parameter.dtype == torch.uint8:
            stored += parameter.quant_state.absmax.nbytes
        elif parameter.dtype == torch.int8:
            stored += parameter.SCB.nbytes
    size = sum(parameter.numel() * parameter.element_size() for parameter in whole.parameters())
    assert size - saved_by_quantization(whole, quantization) == stored
    assert saved_by_quantization(sketch, quantization) == saved_by_quantization(whole, quantization)
    assert len(quantized_layers(sketch)) == len(quantized_layers(whole)) > 0


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_adapters_on_quantized_weights_are_trained(quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {"quantization": quantization, "lora": {"r": 4, "target_modules": ["q_proj"]}}
    model, _ = load_language_model(TINY / "opt", dtype=torch.bfloat16, **settings)
    lm = adapter(model.train())
    embeds, mask = inputs(lm)
    lm.loss(embeds, mask, torch.tensor([[5, 6]] * 4)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert all("lora_" in name and gradient is not None for name, gradient in gradients.items())


# masks of known padding


GPU = torch.device("cuda", 0)
"""Of a device whose values take a wait to read: known padding then replaces them, also for these CPU tensors."""


def masked_loss(lm: LLMAdapter, *, is_padded: bool) -> Tensor:
    embeds, mask, labels = torch.randn(3, 7, lm.width), torch.ones(3, 7, dtype=torch.long), torch.arange(12).view(3, 4)
    mask[1, -2:] = 0 if is_padded else 1
    return lm.loss(embeds, mask, labels + 4)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_known_padding_give_the_same_loss(family: str, is_padded: bool) -> None:
    lm = adapter(random_model(family))
    torch.manual_seed(2)
    expected = masked_loss(lm, is_padded=is_padded)
    torch.manual_seed(2)
    with known_padding({7: not is_padded, 4: True}, GPU):
        torch.testing.assert_close(masked_loss(lm, is_padded=is_padded), expected)


@pytest.mark.parametrize("family", ["opt", "llama", "t5"])
def test_known_padding_is_believed_on_a_gpu_and_read_on_a_cpu(family: str) -> None:
    lm, found = adapter(random_model(family)), []
    for device in (None, torch.device("cpu"), GPU):
        torch.manual_seed(2)
        with contextlib.nullcontext() if device is None else known_padding(True, device):
            found.append(masked_loss(lm, is_padded=True).item())
    plain, on_cpu, on_gpu = found
    assert on_cpu == plain
    assert on_gpu != pytest.approx(plain, rel=1e-4)


def test_lengths_that_two_masks_share_are_full_if_both_are() -> None:
    full, padded = torch.ones(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert full_lengths((full, 3), (padded, 0)) == {7: True, 4: False}
    assert full_lengths((full, 0), (padded, 0)) == {4: False}
