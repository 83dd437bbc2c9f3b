"""Trainings of every family at tiny size on `shapes`, for tests that walk them."""

from typing import Any

STEPS = 20
SIZES = {"model_type": "tiny"}
MED = {
    "vit": {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 16},
    "med": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 64},
}
MOMENTUM = {"embed_dim": 16, "queue_size": 48}
SHAPES = {"num_train": 48, "num_val": 8, "num_test": 8, "colors": 4, "shapes": 3, "max_objects": 2, "gallery_size": 8}
RUN = {
    "runner": "runner_iter",
    "max_iters": STEPS,
    "iters_per_inner_epoch": 10,
    "batch_size_train": 4,
    "batch_size_eval": 4,
    "init_lr": 1e-3,
    "num_workers": 0,
    "log_freq": 1,
    "valid_splits": ["val"],
    "test_splits": ["test"],
    "tensorboard": False,
}
CAPTION = {"task": "captioning", "metrics": ["bleu", "cider"], "max_len": 12}
VQA = {"task": "vqa", "inference_method": "generate", "max_len": 5}
RANK = {"task": "vqa", "inference_method": "rank", "num_ans_candidates": 6}
PRETRAIN = {"task": "image_text_pretrain", "valid_splits": [], "test_splits": []}
RETRIEVAL = {"task": "retrieval", "k_test": 4}
ASK = "Question: {} Short answer:"
INSTRUCT_SETS = ["caption", "color", "count", "yesno", "options", "statement"]
PHOTO = {"text_processor": {"train": {"name": "blip_caption", "prompt": "a picture of "}}}
# name: model, datasets, run
TRAININGS: dict[str, tuple[dict[str, Any], list[str] | dict[str, Any], dict[str, Any]]] = {
    "blip_pretrain": ({"arch": "blip_pretrain", **MED, **MOMENTUM}, ["pairs"], PRETRAIN),
    "blip_pretrain_concat": (
        {"arch": "blip_pretrain", **MED, **MOMENTUM},
        ["pairs", "caption"],
        {**PRETRAIN, "train_dataset_mixing": "concat"},
    ),
    "blip_caption": ({"arch": "blip_caption", **MED}, {"caption": PHOTO}, CAPTION),
    "blip_caption_nucleus": (
        {"arch": "blip_caption", **MED},
        {"caption": PHOTO},
        {**CAPTION, "use_nucleus_sampling": True, "top_p": 0.8},
    ),
    "blip_caption_bf16": ({"arch": "blip_caption", **MED}, {"caption": PHOTO}, {**CAPTION, "precision": "bf16"}),
    "blip_vqa_rank": ({"arch": "blip_vqa", **MED}, ["vqa"], RANK),
    "blip_vqa_generate": ({"arch": "blip_vqa", **MED}, ["vqa"], VQA),
    "blip_retrieval": (
        {"arch": "blip_retrieval", "negative_all_rank": True, **MED, **MOMENTUM},
        ["retrieval"],
        RETRIEVAL,
    ),
    "blip_nlvr": ({"arch": "blip_nlvr", **MED}, ["nlvr"], {"task": "multimodal_classification"}),
    "blip2_stage1": ({"arch": "blip2"}, ["pairs"], PRETRAIN),
    "blip2_per_step": ({"arch": "blip2"}, ["pairs", "caption"], {**PRETRAIN, "train_dataset_mixing": "per_step"}),
    "blip2_retrieval": ({"arch": "blip2", "freeze_vit": False}, ["retrieval"], RETRIEVAL),
    "blip2_checkpointing": (
        {"arch": "blip2", "freeze_vit": False, "use_grad_checkpoint": True},
        ["retrieval"],
        {**RETRIEVAL, "lr_layer_decay": 0.9},
    ),
    "blip2_opt": ({"arch": "blip2_opt"}, ["caption"], CAPTION),
    "blip2_opt_prompt": ({"arch": "blip2_opt", "prompt": "a photo of", "freeze_vit": False}, ["caption"], CAPTION),
    "blip2_opt_vqa": ({"arch": "blip2_opt"}, ["vqa"], {**VQA, "prompt": ASK}),
    "blip2_opt_rank": ({"arch": "blip2_opt"}, ["vqa"], {**RANK, "prompt": ASK}),
    "blip2_t5": ({"arch": "blip2_t5"}, ["caption"], CAPTION),
    "blip2_t5_vqa": ({"arch": "blip2_t5", "qformer_text_input": True}, ["vqa"], {**VQA, "prompt": ASK}),
    "blip2_t5_rank": ({"arch": "blip2_t5"}, ["vqa"], {**RANK, "prompt": ASK}),
    "blip2_vicuna": ({"arch": "blip2_vicuna"}, ["vqa"], {**VQA, "prompt": ASK}),
    "blip2_llm": ({"arch": "blip2_llm"}, ["caption"], CAPTION),
    "blip2_llm_bf16": ({"arch": "blip2_llm"}, ["caption"], {**CAPTION, "precision": "bf16"}),
    "blip2_t5_instruct": (
        {"arch": "blip2_t5_instruct"},
        [f"instruct_{name}" for name in INSTRUCT_SETS],
        {"task": "instruct"},
    ),
    "blip2_vicuna_instruct": (
        {"arch": "blip2_vicuna_instruct"},
        ["instruct_options", "instruct_color"],
        {"task": "instruct", "train_dataset_sampling": "sqrt"},
    ),
    "blip2_lora": (
        {"arch": "blip2_vicuna_instruct", "llm_lora": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1}},
        ["instruct_options"],
        {"task": "instruct"},
    ),
}
