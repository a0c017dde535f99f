"""Models that transformers builds, from tiny folders with random weights; the extra `hf`."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from attncli.errors import ModelError
from attncli.model import BatchOptions, ModelOptions, load_model, make_batch, run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "heads", "look", "at", "keys"]


def folder(path, name="Bert", kind="Model", dtype=torch.float32, **settings):
    """A tiny model of that family, saved as its authors would."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, "vocab_size": 40, **settings})
    getattr(transformers, f"{name}{kind}")(config).to(dtype).save_pretrained(path)
    return path


def with_words(path):
    """A word tokenizer beside the weights."""
    (path / "vocab.txt").write_text("\n".join(WORDS))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return path


def edit(path, **changes):
    settings = json.loads((path / "config.json").read_text())
    settings.update(changes)
    (path / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))


def load(path, **options):
    return load_model(str(path), ModelOptions(device="cpu", **options))


def refused(path, **options):
    with pytest.raises(ModelError) as error:
        load(path, **options)
    return str(error.value)


def inputs(batch):
    return {name: entry["shape"] for name, entry in batch.inputs.items()}


# --- loading ------------------------------------------------------------------------------------------


def test_a_folder_loads_as_the_class_it_was_saved_from_in_its_own_dtype_in_eval_mode(tmp_path):
    folder(tmp_path, "Llama", "ForCausalLM", torch.bfloat16)
    model = load(tmp_path)
    assert type(model.module).__name__ == "LlamaForCausalLM"
    assert (model.kind, model.dtype, model.notes) == ("huggingface", "bfloat16", ())
    assert model.parameters == sum(p.numel() for p in model.module.parameters())
    assert not model.module.training
    assert model.configs[0][0] == "config.json"
    assert model.configs[0][1]["num_attention_heads"] == 2
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(model.module.model.norm.weight, saved["model.norm.weight"])
    assert run(model, make_batch(model)).logits.shape == (2, 128, 40)


def test_dtype_and_mode_are_the_users(tmp_path):
    model = load(folder(tmp_path), dtype="float64", train_mode=True)
    assert model.dtype == "float64"
    assert model.module.training


def test_the_attention_implementation_of_the_library_is_left_as_it_is(tmp_path):
    folder(tmp_path, "Llama")
    own = transformers.AutoModel.from_pretrained(tmp_path).config._attn_implementation
    assert load(tmp_path).module.config._attn_implementation == own
    assert own != "eager"


def test_nothing_of_the_library_reaches_stdout_or_stderr_and_its_settings_stay(tmp_path, capsys):
    folder(tmp_path)
    capsys.readouterr()
    logging = transformers.utils.logging
    before = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        dict(os.environ),
        torch.get_rng_state(),
    )
    model = load(tmp_path)
    run(model, make_batch(model))
    after = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        dict(os.environ),
        torch.get_rng_state(),
    )
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_progress_is_told_from_none_to_all(tmp_path):
    seen = []
    load_model(str(folder(tmp_path)), ModelOptions(device="cpu"), lambda *step: seen.append(step))
    assert seen == [("loading model", 0, 1), ("loading model", 1, 1)]


def test_parameters_that_the_checkpoint_lacks_are_said_and_the_same_on_every_run(tmp_path, capfd):
    folder(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    gone = {name: saved.pop(name) for name in list(saved) if name.startswith("pooler")}
    save_file({**saved, "stray": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    capfd.readouterr()
    first = load(tmp_path)
    torch.rand(1)
    second = load(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert len(gone) == 2
    assert first.notes[0].startswith(
        "2 parameters are not in the checkpoint and have random values: pooler.dense"
    )
    assert first.notes[1] == "1 tensors of the checkpoint have no place in BertModel"
    assert torch.equal(first.module.pooler.dense.weight, second.module.pooler.dense.weight)


def test_weights_of_another_model_are_an_error(tmp_path):
    folder(tmp_path)
    save_file({"stray": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    text = refused(tmp_path)
    assert "parameters are not in its checkpoint" in text
    assert "These are weights of another model. --no-strict" in text
    assert load(tmp_path, strict=False).notes


def test_device_map_places_the_model_through_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    folder(tmp_path / "model")
    model = load(tmp_path / "model", device_map="auto", offload_folder=str(tmp_path / "off"))
    assert run(model, make_batch(model)).last_hidden_state.shape == (2, 128, 16)
    assert "--offload-folder works with --device-map only" in refused(tmp_path / "model", offload_folder="x")


# --- what goes wrong ----------------------------------------------------------------------------------


def test_code_in_the_folder_runs_only_where_it_is_trusted(tmp_path):
    folder(tmp_path)
    (tmp_path / "own.py").write_text(
        "from transformers import BertConfig, BertModel\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    edit(
        tmp_path,
        model_type="own",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},
    )
    text = refused(tmp_path)
    assert "names code of its own (own.OwnConfig, own.OwnModel), which attncli does not run." in text
    assert "pass --trust-remote-code" in text
    assert not [name for name in sys.modules if name.endswith(".own")]


def test_a_folder_with_code_for_a_known_type_runs_the_librarys_and_says_so(tmp_path):
    folder(tmp_path)
    edit(tmp_path, auto_map={"AutoModel": "gone.BertModel"})
    assert load(tmp_path).notes == (
        "the folder's own code was not run: transformers' code for this model_type was",
    )


def test_a_missing_model_type_is_taken_from_the_architecture(tmp_path):
    folder(tmp_path)
    edit(tmp_path, model_type=...)
    assert type(load(tmp_path).module).__name__ == "BertModel"
    edit(tmp_path, architectures=["Nothing"])
    assert "its config.json has no model_type" in refused(tmp_path)


def test_folders_that_hold_no_model_say_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "it holds no config.json, so nothing says what to build" in refused(tmp_path / "empty")
    assert f"it holds no config.json itself. Models may lie in: {tmp_path}/inner" in refused_inner(tmp_path)
    folder(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    assert "it holds a config.json, but no weights." in refused(tmp_path / "bare")
    edit(tmp_path / "bare", model_type="unheard_of")
    assert "knows no model_type 'unheard_of'. Update transformers" in refused(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text("{")
    assert "this is no valid JSON" in refused(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text('{"_diffusers_version": "1", "_class_name": "UNet"}')
    assert "a part of a diffusers pipeline (UNet)" in refused(tmp_path / "bare")


def refused_inner(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").write_text("{}")
    return refused(tmp_path)


def test_damaged_weights_are_told(tmp_path):
    folder(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "loading it failed" in refused(tmp_path)


def test_an_adapter_without_its_base_says_to_merge(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    text = refused(tmp_path)
    assert "this is an adapter" in text
    assert "Merge it first (merge_and_unload, save_pretrained) and give the merged folder" in text


def test_without_transformers_the_error_says_what_to_install(tmp_path, monkeypatch):
    folder(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refused(tmp_path).endswith(
        "transformers, which is not installed. Install it: pip install attncli[hf]."
    )


# --- text ---------------------------------------------------------------------------------------------


def test_texts_are_tokenised_and_padded_as_one_batch(tmp_path):
    model = load(with_words(folder(tmp_path)))
    batch = make_batch(model, BatchOptions(text=("the heads look", "keys")))
    assert batch.kind == "text"
    assert batch.tokens[1] == ("[CLS]", "keys", "[SEP]", "[PAD]", "[PAD]")
    assert batch.kwargs["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    run(model, batch)


def test_one_text_needs_no_mask(tmp_path):
    batch = make_batch(load(with_words(folder(tmp_path))), BatchOptions(text=("the heads",)))
    assert "attention_mask" not in batch.kwargs
    assert batch.kwargs["input_ids"].tolist() == [[2, 5, 6, 3]]


def test_a_long_text_is_cut_to_what_the_model_has_room_for(tmp_path):
    model = load(with_words(folder(tmp_path, max_position_embeddings=6)))
    batch = make_batch(model, BatchOptions(text=("keys " * 20,)))
    assert inputs(batch)["input_ids"] == [1, 6]
    assert batch.notes == ("text cut to 6 tokens",)
    assert inputs(make_batch(model, BatchOptions(text=("keys " * 20,), seq_len=4)))["input_ids"] == [1, 4]


def test_a_decoder_gets_the_same_text_one_token_later(tmp_path):
    with_words(
        folder(tmp_path, "Bart", d_model=16, encoder_layers=1, decoder_layers=1, decoder_start_token_id=3)
    )
    model = load(tmp_path)
    batch = make_batch(model, BatchOptions(text=("the heads",)))
    assert batch.kwargs["decoder_input_ids"].tolist() == [[3, 2, 5, 6]]
    run(model, batch)


def test_a_tokenizer_without_padding_gets_one(tmp_path):
    folder(tmp_path, "GPT2", n_embd=16, n_layer=1, n_head=2)
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]").save_pretrained(
        tmp_path
    )
    batch = make_batch(load(tmp_path), BatchOptions(text=("the heads", "keys")))
    assert batch.tokens == (("the", "heads"), ("keys", "[SEP]"))
    assert batch.notes == ("padded with [SEP]: the tokenizer has no padding token",)


def test_text_without_a_tokenizer_or_for_a_model_of_pixels_is_told(tmp_path):
    model = load(folder(tmp_path / "bert"))
    with pytest.raises(
        ModelError, match=r"--text needs a tokenizer, and the folder holds none\. Copy tokenizer\.json"
    ):
        make_batch(model, BatchOptions(text=("a",)))
    model = load(folder(tmp_path / "vit", "ViT", image_size=32, patch_size=8))
    with pytest.raises(ModelError, match=r"the model takes no text: forward takes pixel_values"):
        make_batch(model, BatchOptions(text=("a",)))
    model = load(with_words(folder(tmp_path / "words")))
    with pytest.raises(ModelError, match="--batch-size is 3, and --text is given 1 times"):
        make_batch(model, BatchOptions(text=("a",), batch_size=3))


# --- synthetic ----------------------------------------------------------------------------------------

TOWER = {**SMALL, "image_size": 32, "patch_size": 8}
FAMILIES = [
    ("Bert", {}, {"input_ids": [2, 128]}),
    ("Roberta", {"max_position_embeddings": 34, "pad_token_id": 1}, {"input_ids": [2, 32]}),
    ("GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}, {"input_ids": [2, 20]}),
    (
        "T5",
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
        {"input_ids": [2, 128], "decoder_input_ids": [2, 128]},
    ),
    ("LayoutLM", {"max_2d_position_embeddings": 1024}, {"input_ids": [2, 128], "bbox": [2, 128, 4]}),
    ("ViT", {"image_size": 32, "patch_size": 8}, {"pixel_values": [2, 3, 32, 32]}),
    (
        "Whisper",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "max_source_positions": 30, "max_target_positions": 12,
         "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 3},
        {"input_features": [2, 8, 60], "decoder_input_ids": [2, 12]},
    ),
    (
        "Wav2Vec2",
        {"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (4, 2), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        {"input_values": [2, 129 * 8]},
    ),
    (
        "CLIP",
        {"text_config": {**SMALL, "vocab_size": 40, "max_position_embeddings": 16}, "vision_config": TOWER,
         "projection_dim": 8},
        {"input_ids": [2, 16], "pixel_values": [2, 3, 32, 32]},
    ),
    (
        "Llava",
        {"text_config": {**SMALL, "vocab_size": 40, "model_type": "llama"},
         "vision_config": {**TOWER, "model_type": "clip_vision_model"}, "image_token_index": 39},
        {"input_ids": [2, 128], "pixel_values": [2, 3, 32, 32]},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "expected"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_the_synthetic_batch_is_what_the_family_asks_for(tmp_path, name, settings, expected):
    model = load(folder(tmp_path, name, **settings))
    batch = make_batch(model)
    assert inputs(batch) == expected
    assert batch.notes == ()
    run(model, batch)
    if "decoder_input_ids" in expected:
        assert set(batch.kwargs["decoder_input_ids"][:, 0].tolist()) == {settings["decoder_start_token_id"]}
    assert all(torch.equal(value, make_batch(model).kwargs[key]) for key, value in batch.kwargs.items())


def test_an_image_stands_in_the_text_with_as_many_tokens_as_its_features(tmp_path):
    name, settings, _ = FAMILIES[-1]
    batch = make_batch(load(folder(tmp_path, name, **settings)))
    assert (batch.kwargs["input_ids"] == 39).sum(dim=1).tolist() == [16, 16]


def test_special_ids_are_not_drawn(tmp_path):
    folder(tmp_path, bos_token_id=2, eos_token_id=[3, 4], vocab_size=9, pad_token_id=0)
    ids = make_batch(load(tmp_path)).kwargs["input_ids"]
    assert set(ids.flatten().tolist()) == {1, 5, 6, 7, 8}


def test_a_length_beyond_the_models_positions_is_told_before_it_runs(tmp_path):
    model = load(folder(tmp_path, max_position_embeddings=8))
    with pytest.raises(ModelError, match=r"--seq-len 9: the model has room for 8 positions\."):
        make_batch(model, BatchOptions(seq_len=9))
    run(model, make_batch(model, BatchOptions(seq_len=8)))
