"""Language models behind one interface, against transformers' own generation and forward passes; loading refusals."""

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference_case import REFERENCE
from torch import Tensor
from transformers import (
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

from lavis_lite.nn.attention import KeyValueCache
from lavis_lite.nn.decoding import DecodingConfig, GenerationConfig, decode
from lavis_lite.nn.llm import LLMAdapter
from lavis_lite.nn.llm_masks import full_lengths, known_padding

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

    def step(new_ids: Tensor, cache: Any, length: int) -> tuple[Tensor, Any]:
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
