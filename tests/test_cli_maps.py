"""`attncli entropy MODEL --maps LAYER[:HEAD]`, from the words of the option to tokens beside the picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Command, Result
from measured_reports import call, layer, report
from torch import Tensor, nn

from attncli import api
from attncli.api.maps import MOST_HEADS, Wanted, maps_to_draw, wanted_maps, with_maps
from attncli.errors import UsageError
from attncli.records import AttentionMap, LayerTensor, Report
from attncli.trace import Maps
from attncli.trace.maps import Drawn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "heads", "look", "at", "keys"]


@pytest.fixture
def attncli_run(attncli_run: Command) -> Command:
    """`attncli entropy …`."""
    return lambda *arguments: attncli_run("entropy", *arguments)


def folder(path: Path, name: str = "Bert", **settings: Any) -> Path:
    """A tiny random model with a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, "vocab_size": 40, **settings})
    getattr(transformers, f"{name}Model")(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return path


def maps_of(path: Path, *maps: str, **options: Any) -> Report:
    return api.measure_model("entropy", str(path), maps=maps, **options)


# --- LAYER[:HEAD] -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pattern", "heads"),
    [
        ("3", "3", None),
        ("3:0", "3", [0]),
        ("3:0,5-7", "3", [0, 5, 6, 7]),
        (" 3 : 2 - 4 , 1 ", "3", [2, 3, 4, 1]),
        ("h.*.attn:11", "h.*.attn", [11]),
        ("h.[0-3].attn", "h.[0-3].attn", None),
        ("encoder:x", "encoder:x", None),
        ("model.py:12", "model.py:12", None),  # attention outside any module goes by its line
        ("model.py:12:1", "model.py:12", [1]),
        ("3:0-999999999", "3", list(range(12))),
    ],
)
def test_layers_and_heads_are_told_apart(text: str, pattern: str, heads: list[int] | None) -> None:
    (one,) = wanted_maps([text])
    assert one.pattern == pattern
    assert one.heads_of(12) == (list(range(12)) if heads is None else heads)


def test_without_heads_the_first_sixteen_are_drawn() -> None:
    (one,) = wanted_maps(["3"])
    assert one.heads_of(40) == list(range(MOST_HEADS)) == list(range(16))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it names no layer."),
        ("  ", "it names no layer."),
        (":3", "it names no layer."),
        ("3:", "'' is no head."),
        ("3:1,,2", "'' is no head."),
        ("3:-1", "'-1' is no head."),
        ("3:1-", "'1-' is no head."),
        ("3:7-5", "7-5 runs backwards."),
        ("3:٣", "'٣' is no head."),
        ("3:9999999999", "'9999999999' is no head."),
    ],
)
def test_what_is_no_layer_and_head_is_refused_with_the_form(text: str, problem: str) -> None:
    with pytest.raises(UsageError) as error:
        wanted_maps([text])
    assert error.value.problem == problem
    assert error.value.remedy == "Write LAYER[:HEAD], such as 3, 3:0,5-7 or 'encoder.layers.*.self_attn:0'."


def test_a_wrong_option_ends_before_the_model_is_loaded(attncli_run: Command) -> None:
    result = attncli_run("./no-such-model", "--maps", "3:x,1", "--maps", "3:1-")
    assert result == Result(
        2,
        "",
        "error: --maps 3:1-: '1-' is no head.\n"
        "  try: Write LAYER[:HEAD], such as 3, 3:0,5-7 or 'encoder.layers.*.self_attn:0'.\n",
    )


# --- a text -------------------------------------------------------------------------------------------


def test_two_texts_give_a_map_each_with_their_own_tokens_and_no_padding(
    tmp_path: Path, attncli_run: Command
) -> None:
    model = folder(tmp_path / "bert")
    texts = ("--text", "the heads look at keys", "--text", "keys")
    result = attncli_run(model, *texts, "--maps", "1:1", "--format", "json")
    assert (result.code, result.err) == (0, "")
    written = json.loads(result.out)
    first, second = written["maps"]
    assert first["layer"] == second["layer"] == written["layers"][1]["id"]
    assert (first["call"], first["head"], first["batch"], second["batch"]) == (1, 1, 0, 1)
    assert first["query_tokens"] == ["[CLS]", "the", "heads", "look", "at", "keys", "[SEP]"]
    assert second["query_tokens"] == second["key_tokens"] == ["[CLS]", "keys", "[SEP]"]
    assert (second["queries"], second["keys"], second["query_starts"]) == (3, 3, [0, 1, 2])
    for row in (*first["probs"], *second["probs"]):
        assert sum(row) == pytest.approx(1, abs=1e-5)
    assert written["notes"] == []


def test_the_table_ends_with_the_picture(tmp_path: Path, attncli_run: Command) -> None:
    model = folder(tmp_path / "bert")
    result = attncli_run(model, "--text", "the heads", "--maps", "0:0")
    assert (result.code, result.err) == (0, "")
    pictured = result.out.split("Attention maps: a line per query, a cell per key\n")[1].splitlines()
    assert [line.split()[:2] for line in pictured[4:8]] == [
        ["0", "[CLS]"],
        ["1", "the"],
        ["2", "heads"],
        ["3", "[SEP]"],
    ]
    assert all("→" in line for line in pictured[4:8])


def test_without_the_option_nothing_is_drawn(tmp_path: Path, attncli_run: Command) -> None:
    result = attncli_run(folder(tmp_path / "bert"), "--text", "the heads", "--format", "json")
    assert json.loads(result.out)["maps"] == []


def test_a_decoder_has_the_tokens_that_it_was_given_and_looks_up_those_of_the_encoder(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_start_token_id": 3}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0}
    found = maps_of(folder(tmp_path / "bart", "Bart", **sizes, **heads), "*:0", text=("the heads look",))
    given = ("[CLS]", "the", "heads", "look", "[SEP]")
    later = ("[SEP]", "[CLS]", "the", "heads", "look")
    calls = {one.index: one for one in found.calls}
    labels = [(calls[one.call].kind, one.query_tokens, one.key_tokens) for one in found.maps]
    decoder = [("self", later, later), ("cross", later, given)]
    assert labels == [("self", given, given)] * 2 + decoder * 2


def test_tokens_of_bytes_are_read_as_text(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*alphabet, "Ġt", "Ã©", "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("Ã", "©")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    model = folder(tmp_path / "gpt", "GPT2", n_embd=16, n_layer=1, n_head=2, vocab_size=300)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (model / name).unlink()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.save_pretrained(model)
    found = maps_of(model, "0:0", text=("é t\n本\x07<|end|>",))
    assert found.maps[0].key_tokens == ("é", "▁t", "\\n", "\\xe6", "\\x9c", "\\xac", "\x07", "<|end|>")


def test_a_long_text_has_the_words_of_each_block(tmp_path: Path) -> None:
    found = maps_of(folder(tmp_path / "bert"), "0:0", text=("keys " * 98,))
    (one,) = found.maps
    assert (one.queries, len(one.query_starts)) == (100, 50)
    assert one.query_tokens[:2] == ("[CLS] keys", "keys keys")
    assert one.query_tokens[-1] == "keys [SEP]"


# --- other batches ------------------------------------------------------------------------------------


def test_of_a_batch_that_is_no_text_the_first_row_is_drawn_without_tokens(tmp_path: Path) -> None:
    found = maps_of(folder(tmp_path / "bert"), "0", seq_len=6, batch_size=3)
    assert [(one.head, one.batch, one.queries) for one in found.maps] == [(0, 0, 6), (1, 0, 6)]
    assert all(one.query_tokens == one.key_tokens == () for one in found.maps)
    assert "maps show the first row of the batch" in found.notes


CODE = """
import math
import torch
from torch import nn

class Heads(nn.Module):
    def __init__(self, normalise):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(40, 40, bias=False) for _ in range(3))
        self.normalise = normalise

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (20, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return (self.normalise(q @ k.transpose(-1, -2) / math.sqrt(2)) @ v).transpose(1, 2).flatten(2)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.soft = Heads(lambda s: s.softmax(-1))
        self.sigmoid = Heads(torch.sigmoid)
        self.linear = Heads(lambda s: s)

    def forward(self, x):
        return self.linear(self.sigmoid(self.soft(x)))

def build():
    torch.manual_seed(0)
    return Model()

def batch():
    return torch.randn(1, 5, 40, generator=torch.Generator().manual_seed(0))
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "code.py").write_text(CODE)
    return f"{tmp_path / 'code.py'}:build"


def of_code(code: str, *maps: str, **options: Any) -> Report:
    return api.measure_model("entropy", code, input=code.replace(":build", ":batch"), maps=maps, **options)


def test_many_heads_are_cut_to_sixteen_and_the_note_names_the_others(code: str) -> None:
    found = of_code(code, "soft")
    assert [one.head for one in found.maps] == list(range(16))
    assert (
        "soft has 20 heads, of which the first 16 are drawn: --maps soft:16-19 draws the others"
        in found.notes
    )
    others = of_code(code, "soft:16-19")
    assert [one.head for one in others.maps] == [16, 17, 18, 19]
    assert not any("heads" in note for note in others.notes)


def test_what_has_no_probabilities_has_no_map_and_a_note(code: str) -> None:
    found = of_code(code, "sigmoid:3", "soft:1", "linear:0")
    assert [(one.layer, one.head) for one in found.maps] == [("soft", 1)]
    assert "no map of sigmoid: its weights are no probabilities (sigmoid)" in found.notes
    assert "no map of linear: it ran no softmax attention" in found.notes


@pytest.mark.parametrize("maps", [("sof",), ("soft:0", "h.*:1"), ("0",)])
def test_a_pattern_that_matches_nothing_is_an_error_with_the_form_of_paths(
    code: str, maps: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as error:
        of_code(code, *maps)
    assert error.value.problem == f"no attention call matches --maps {maps[-1]}."
    assert error.value.remedy == "Layers go by path, glob or number: --maps soft:0, or --maps '*:0'."


def test_a_head_that_is_not_there_is_an_error(code: str) -> None:
    with pytest.raises(UsageError) as error:
        of_code(code, "soft:0,19-20")
    assert error.value.problem == "there is no head 20 for --maps soft:0,19-20: soft has 20 heads."
    assert error.value.remedy == "Heads count from 0 to 19."


def test_layers_that_are_left_out_have_no_maps(code: str) -> None:
    assert len(of_code(code, "soft:0", layers=("soft",)).maps) == 1
    with pytest.raises(UsageError, match="no attention call matches --maps soft:0"):
        of_code(code, "soft:0", layers=("sigmoid",))


def test_a_program_without_modules_is_drawn_by_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.TransformerEncoderLayer(16, 4, 16, batch_first=True) for _ in range(2))).eval()
    x = torch.randn(1, 5, 16)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (x,)), path)
    found = maps_of(path, "1:2")
    assert [(one.layer, one.head) for one in found.maps] == [("1.self_attn", 2)]


# --- records made by hand -----------------------------------------------------------------------------


def drawn_one(head: int, first: int = 0, places: int = 2) -> Drawn:
    starts = tuple(range(places))
    even = (1 / places,) * places
    return Drawn(head, 0, first, first, places, places, starts, starts, (even,) * places)


INPUTS = {"input_ids": (("a", "b", "c"),), "decoder_input_ids": (("x", "y", "z"),)}
ENCODER, DECODER = ("input input_ids",), ("input decoder_input_ids",)


def labels(found: dict[str, Any], *earlier: dict[str, Any], drawn: Drawn | None = None) -> tuple[Any, Any]:
    """The tokens of the queries and keys of the last of these calls, whose inputs are those of `INPUTS`."""
    usual = {"batch": 1, "queries": 3, "keys": 3}
    calls = [call(at, f"h.{at}.attn", **{**usual, **one}) for at, one in enumerate((*earlier, found))]
    made = report("entropy", [(one, []) for one in calls])
    one = drawn or drawn_one(0, places=3)
    draw = Maps(lambda module, parameters, heads: ())
    maps = with_maps(
        made, draw, {len(earlier): [one]}, wanted_maps([f"{len(earlier)}:{one.head}"]), INPUTS, "model"
    ).maps
    return maps[0].query_tokens, maps[0].key_tokens


def test_only_the_heads_that_were_asked_for_are_kept() -> None:
    made = report("entropy", [(call(0, "h.0.attn"), [])])
    draw = Maps(lambda module, parameters, heads: ())
    found = with_maps(made, draw, {0: [drawn_one(5), drawn_one(2)]}, wanted_maps(["0:2"]), {}, "model")
    assert [one.head for one in found.maps] == [2]


def test_a_map_that_begins_behind_padding_has_the_tokens_from_there_on() -> None:
    both = {"query_sources": ENCODER, "key_sources": ENCODER}
    assert labels(both) == (("a", "b", "c"), ("a", "b", "c"))
    assert labels(both, drawn=drawn_one(0, first=1)) == (("b", "c"), ("b", "c"))


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": 4},  # a prefix or a cache stands before the tokens
        {"batch": 2},  # windows, beams
        {"softmax_axis": "heads"},
        {"key_sources": ("input pixel_values",)},
        {"key_sources": (*ENCODER, *DECODER)},  # both, and nothing says how
        {"key_sources": ()},
    ],
)
def test_keys_of_which_it_is_not_certain_what_they_are_have_no_tokens(changes: dict[str, Any]) -> None:
    assert labels({"query_sources": ENCODER, "key_sources": ENCODER, **changes})[1] == ()


def test_a_stream_that_looked_up_another_keeps_its_own_tokens_and_one_where_both_ask_has_none() -> None:
    cross = {"kind": "cross", "query_sources": DECODER, "key_sources": ENCODER}
    back = {"kind": "cross", "query_sources": ENCODER, "key_sources": DECODER}
    stream = (*ENCODER, *DECODER, "call 0")
    after = {"query_sources": stream, "key_sources": stream}
    assert labels(after, cross) == (("x", "y", "z"),) * 2
    assert labels(after, back) == (("a", "b", "c"),) * 2
    stream = (*stream, "call 1")
    assert labels({"query_sources": stream, "key_sources": stream}, cross, back) == ((), ())


def test_a_program_without_modules_draws_the_layers_whose_weights_project_q_or_k() -> None:
    parts = [LayerTensor("q", f"h.{at}.q", (4, 4), "float32", "") for at in range(2)]
    layers = [layer(f"h.{at}", tensors=(part,)) for at, part in enumerate(parts)]
    maps = maps_to_draw(wanted_maps(["1:0,3"]), [lambda module: True], layers, 1)
    assert maps.heads("", {"q": "h.1.q"}, 4) == [0, 3]
    assert maps.heads("", {"q": "h.0.q"}, 4) == []
    assert maps.heads("", {}, 2) == [0]


def drawn_by(found: Report, *maps: str, **settings: Any) -> Report:
    drawn = settings.pop("drawn", Maps(lambda module, parameters, heads: ()))
    return with_maps(found, drawn, {}, wanted_maps(maps), {}, "model")


def test_a_call_that_was_not_observed_has_no_map_and_says_why() -> None:
    blind = call(0, "h.0.attn", heads=0, explained=False, reason="it ran inside one operator")
    found = drawn_by(report("entropy", [(blind, [])]), "0:3")
    assert found.maps == ()
    assert found.notes[-1] == "no map of h.0.attn: it was not observed (it ran inside one operator)"


def test_maps_beyond_the_limit_are_counted() -> None:
    drawn = Maps(lambda module, parameters, heads: (), most=4, left_out=7)
    found = drawn_by(report("entropy", [(call(0, "h.0.attn"), [])]), "0:3", drawn=drawn)
    assert found.notes[-1] == "7 maps beyond the first 4 were left out: name fewer heads"


def test_a_head_that_only_some_layers_have_is_drawn_where_it_is() -> None:
    calls = [(call(0, "h.0.attn", heads=4), []), (call(1, "h.1.attn", heads=12), [])]
    drawn_by(report("entropy", calls), "h.*:7")
    with pytest.raises(UsageError, match=r"there is no head 12 for --maps h\.\*:12: h\.\* has 12 heads"):
        drawn_by(report("entropy", calls), "h.*:12")


@pytest.mark.parametrize("name", ["", "\x1b[2J", "[", "*" * 200, "\ud800"])
def test_hostile_patterns_are_patterns(name: str) -> None:
    if name:
        assert wanted_maps([name]) == (Wanted(name, name, None),)
        found = report("entropy", [(call(0, "h.0.attn"), [])])
        if not name.startswith("*"):
            with pytest.raises(UsageError):
                drawn_by(found, name)


def test_the_record_of_a_map_is_what_the_schema_says() -> None:
    one = AttentionMap("h.0.attn", 0, 1, 0, 1, 2, (0,), (0, 1), ((float("nan"), 1.0),))
    written = report("entropy", [(call(0, "h.0.attn"), [])], maps=(one,)).to_dict()["maps"]
    assert written[0]["probs"] == [["nan", 1.0]]
    assert json.loads(json.dumps(written)) == written


def test_the_model_gives_what_it_gives_without_maps(tmp_path: Path) -> None:
    from attncli.trace import trace

    model = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))

    def result(maps: Maps | None) -> Tensor:
        with torch.no_grad():
            out: Tensor = trace(model, lambda: model(x, x, x), (x, x, x), maps=maps).result[0]
        return out

    assert torch.equal(result(None), result(Maps(lambda module, parameters, heads: range(heads))))
