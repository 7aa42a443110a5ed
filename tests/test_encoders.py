"""Tiny random encoders against transformers in fp32: every head, on every machine and SIMD path.

Texts of several lengths run in one cycle, without padding; transformers gets them one by one.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, DistilBertConfig, RobertaConfig, XLMRobertaConfig

from lmclock import _native
from lmclock.assemble import Assembled, assemble
from lmclock.config.encoder import EncoderConfig
from lmclock.config.sentence import POOLINGS, Sentence
from lmclock.engine import Engine, Request, capacity_for
from lmclock.errors import FileError, UnsupportedError
from lmclock.machines import create
from lmclock.passes import optimise

TOLERANCE = 1e-4
RNG = np.random.default_rng(11)
LENGTHS = (9, 1, 30, 2, 17)
TEXTS = [[int(t) for t in RNG.integers(3, 96, length)] for length in LENGTHS]
TYPES = [[int(at >= length // 2) for at in range(length)] for length in LENGTHS]

SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 40}  # fmt: skip
DISTIL = {"vocab_size": 96, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4,
          "max_position_embeddings": 40}  # fmt: skip
LABELS = {"id2label": {0: "no", 1: "yes", 2: "maybe"},
          "label2id": {"no": 0, "yes": 1, "maybe": 2}}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "Bert": lambda: BertConfig(**SMALL, **LABELS),
    "Roberta": lambda: RobertaConfig(**SMALL, **LABELS, layer_norm_eps=1e-5, type_vocab_size=1),
    "XLMRoberta": lambda: XLMRobertaConfig(**SMALL, **LABELS, hidden_act="gelu_new"),
    "DistilBert": lambda: DistilBertConfig(**DISTIL, **LABELS, activation="relu"),
}
ENDINGS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification",
           "ForQuestionAnswering")  # fmt: skip
ARCHITECTURES = [f"{name}{ending}" for name in CONFIGS for ending in ENDINGS if name[0] != "X"]
ARCHITECTURES += ["BertForPreTraining", "BertForNextSentencePrediction", "XLMRobertaForMaskedLM"]
MACHINES: dict[str, dict[str, Any]] = {
    "numpy": {"name": "array", "namespace": "numpy"},
    "torch": {"name": "array", "namespace": "torch"},
    **{path: {"name": "native", "path": path, "threads": 2} for path in _native.simd_paths()},
}


def random_model(architecture: str, **changes: Any) -> Any:
    """A transformers model with weights that keep what it computes near one."""
    torch.manual_seed(5)
    name = next(name for name in CONFIGS if architecture.startswith(name))
    config = CONFIGS[name]()
    config.update(changes)
    if architecture.endswith("ForQuestionAnswering"):
        config.num_labels = 2
    config._attn_implementation = "eager"
    model = getattr(transformers, architecture)(config).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if weight.ndim == 2 and "embeddings" not in name:
                weight.copy_(noise / weight.shape[1] ** 0.5)
            else:
                scale, centre = (0.2, 0) if weight.ndim == 2 else (0.2, 0 if "bias" in name else 1)
                weight.copy_(scale * noise + centre)
    return model


def reference(model: Any) -> list[np.ndarray]:
    """Per text, what the head of the model gives: a row for the text, or a row for each token."""
    found = []
    for ids, types in zip(TEXTS, TYPES, strict=True):
        given = {"input_ids": torch.tensor([ids])}
        if getattr(model.config, "type_vocab_size", 0) == 2:
            given["token_type_ids"] = torch.tensor([types])
        with torch.no_grad():
            out = model(**given)
        if "start_logits" in out:
            rows = torch.stack([out.start_logits[0], out.end_logits[0]], dim=1)
        else:
            name = next(n for n in ("prediction_logits", "logits", "last_hidden_state") if n in out)
            rows = out[name]
            rows = rows[0] if rows.ndim == 3 else rows
        found.append(rows.numpy())
    return found


def delivered(model: Assembled, machine: dict[str, Any], want: str, level: int = 1) -> list[Any]:
    """Per text, the rows of a value that the engine hands out; all texts run at once."""
    program = optimise(model.program, level, keep=(want,), invariant=True)
    capacity = capacity_for(program, sequences=len(TEXTS), chunk=64)
    with_types = any(i.name == "types" for i in program.inputs)
    options = {key: value for key, value in machine.items() if key != "name"}
    runner = create(machine["name"], **options)
    runner.load(program, model.weights, capacity, keep=(want,))
    engine = Engine(runner, program, capacity=capacity)
    found: list[Any] = [None] * len(TEXTS)
    cycles = 0
    for at, (ids, types) in enumerate(zip(TEXTS, TYPES, strict=True)):

        def receive(first: int, rows: np.ndarray, at: int = at) -> None:
            assert found[at] is None and first == 0
            found[at] = rows

        config = model.config
        assert isinstance(config, EncoderConfig)
        given = {"types": np.array(types)[:, None]} if with_types and config.types == 2 else {}
        engine.add(Request(ids, 0, inputs=given, want={want: receive}))
    while engine.busy:
        cycles += len(engine.step())
    assert cycles == 1
    engine.close()
    return found


def result(model: Assembled) -> str:
    return model.program.section("encode").instructions[-1].outs[0]


def last_rows(model: Assembled) -> str:
    """The value of the last layer's rows, which pooling reads."""
    body = model.program.section("encode").instructions
    return next(i.ins[0] for i in body if i.op == "pool")


def assert_close(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    assert 0.2 < np.concatenate(want).std() < 5
    worst = max(float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True))
    assert worst <= TOLERANCE, worst


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """architecture -> (folder, what transformers gives), each made once."""
    made: dict[str, Any] = {}

    def make(architecture: str, **changes: Any) -> tuple[Path, list[np.ndarray]]:
        key = architecture + str(changes)
        if key not in made:
            path = tmp_path_factory.mktemp(architecture)
            model = random_model(architecture, **changes)
            model.save_pretrained(path)
            made[key] = path, reference(model)
        return made[key]

    return make


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head(architecture: str, machine: str, folder: Any) -> None:
    path, want = folder(architecture)
    model = assemble(path)
    value = last_rows(model) if architecture.endswith("Model") else result(model)
    assert_close(delivered(model, MACHINES[machine], value), want)


def embeddings(config: Sentence, rows: list[np.ndarray], dense: Any = None) -> list[np.ndarray]:
    """What sentence-transformers' pooling makes of each text's rows."""
    ways = {
        "mean": lambda x: x.mean(axis=0),
        "cls": lambda x: x[0],
        "max": lambda x: x.max(axis=0),
        "last": lambda x: x[-1],
        "pooler": lambda x: np.tanh(dense(torch.tensor(x[0])).detach().numpy()),
    }
    whole = [np.concatenate([ways[way](x) for way in config.pooling])[None] for x in rows]
    return [x / np.linalg.norm(x) for x in whole] if config.normalise else whole


@pytest.mark.parametrize("machine", ["numpy", "torch", _native.simd_paths()[0]])
@pytest.mark.parametrize("pooling", [*((p,) for p in POOLINGS), ("mean", "max")])
def test_pooling(pooling: tuple[str, ...], machine: str, folder: Any) -> None:
    path, rows = folder("BertModel")
    dense = random_model("BertModel").pooler.dense
    for normalise in (False, True):
        sentence = Sentence(pooling, normalise)
        model = assemble(path, change=lambda c, s=sentence: replace(c, sentence=s))
        got = delivered(model, MACHINES[machine], result(model))
        for a, b in zip(got, embeddings(sentence, rows, dense), strict=True):
            np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0)


def test_sentence_transformers_folder(folder: Any, tmp_path: Path) -> None:
    path, rows = folder("BertModel")
    shutil.copytree(path, tmp_path / "model")
    path = tmp_path / "model"
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": p, "type": f"sentence_transformers.models.{t}"} for p, t in kinds.items()]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_cls_token": True,
               "pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}  # fmt: skip
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    model = assemble(path)
    sentence = Sentence(("cls", "max"), True, said=True, longest=24)
    assert model.config.sentence == sentence  # type: ignore[attr-defined]
    got = delivered(model, MACHINES["numpy"], result(model))
    for a, b in zip(got, embeddings(sentence, rows), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0)
    (path / "modules.json").write_text(json.dumps([*modules, {"path": "3", "type": "x.Dense"}]))
    with pytest.raises(UnsupportedError, match="Transformer Pooling Normalize Dense"):
        assemble(path)
    (path / "modules.json").write_text(json.dumps([modules[0], modules[1] | {"path": "../x"}]))
    with pytest.raises(FileError, match="not the name of a folder"):
        assemble(path)


def test_names_of_old_files(folder: Any, tmp_path: Path) -> None:
    """Norms called gamma and beta, no `bert.` before the encoder's names, a head of another use."""
    path, want = folder("BertForMaskedLM")
    shutil.copy(path / "config.json", tmp_path)
    old = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        name = name.removeprefix("bert.").replace("Norm.weight", "Norm.gamma")
        old[name.replace("Norm.bias", "Norm.beta")] = tensor
    old["cls.seq_relationship.weight"] = torch.zeros(2, 64)
    save_file(old, tmp_path / "model.safetensors")
    model = assemble(tmp_path)
    assert_close(delivered(model, MACHINES["numpy"], "logits"), want)
    old["embeddings.LayerNorm.weight"] = old["embeddings.LayerNorm.gamma"].clone()
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(FileError, match="twice"):
        assemble(tmp_path)


def test_an_output_matrix_of_its_own(folder: Any) -> None:
    path, want = folder("BertForMaskedLM", tie_word_embeddings=False)
    model = assemble(path)
    assert "output" in model.program.weight_table
    assert_close(delivered(model, MACHINES["numpy"], "logits"), want)


# --- GGUF


GGUF_NAMES = {
    "embeddings.word_embeddings": "token_embd", "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types", "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q", "attention.self.key": "attn_k",
    "attention.self.value": "attn_v", "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm", "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm",
    "classifier.dense": "cls", "classifier.out_proj": "cls.output",
}  # fmt: skip


def write_gguf(path: Path, model: Any, quant: str, pooling: int) -> None:
    """The model as GGUF; `model` gets the weights as they are stored."""
    writer, c = gguf.GGUFWriter(path, "bert"), model.config
    writer.add_block_count(c.num_hidden_layers)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings - 2 * (c.model_type == "roberta"))
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_layer_norm_eps(c.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType(pooling))
    writer.add_token_type_count(c.type_vocab_size)
    for name, weight in model.state_dict().items():
        stem, _, ending = name.removeprefix("roberta.").rpartition(".")
        layer = stem.split(".")[2] if stem.startswith("encoder.") else ""
        known = GGUF_NAMES.get(stem.split(".", 3)[3] if layer else stem)
        if known is None or "position_ids" in name:
            continue
        known = f"blk.{layer}.{known}.{ending}" if layer else f"{known}.{ending}"
        values = weight.numpy()
        if "position_embeddings" in name and c.model_type == "roberta":
            values = values[2:]  # as llama.cpp's converter leaves them
        if quant == "f32" or weight.ndim == 1 or "embeddings" in name or "classifier" in name:
            writer.add_tensor(known, values.copy())
            continue
        kind = gguf.GGMLQuantizationType[quant.upper()]
        stored = gguf.quants.quantize(values.copy(), kind)
        writer.add_tensor(known, stored, raw_dtype=kind)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind)))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                  writer.write_tensors_to_file, writer.close):  # fmt: skip
        write()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("quant", ["f32", "q8_0", "q4_0"])
def test_gguf(quant: str, machine: str, tmp_path: Path) -> None:
    model = random_model("BertModel")
    write_gguf(tmp_path / "bert.gguf", model, quant, gguf.PoolingType.CLS)
    ours = assemble(tmp_path / "bert.gguf")
    assert quant in {w.format for w in ours.program.weights}
    want = [rows[:1] for rows in reference(model)]
    assert_close(delivered(ours, MACHINES[machine], result(ours)), want)
    # With activations rounded, natives do what the reference does.
    rounded = delivered(ours, MACHINES["numpy"], result(ours), level=2)
    got = delivered(ours, MACHINES[machine], result(ours), level=2)
    for a, b, exact in zip(got, rounded, want, strict=True):
        # A sum that lies between two integers may fall either way, so not to the last bit.
        assert ((a - b) ** 2).sum() <= 1e-4 * (b**2).sum()
        off = ((b - exact) ** 2).sum() / (exact**2).sum()
        assert off < 1e-10 if quant == "f32" else 1e-7 < off < 1e-2, off


def test_gguf_classifier_of_pairs(tmp_path: Path) -> None:
    model = random_model("RobertaForSequenceClassification", num_labels=1)
    write_gguf(tmp_path / "rank.gguf", model, "f32", gguf.PoolingType.RANK)
    ours = assemble(tmp_path / "rank.gguf")
    got = delivered(ours, MACHINES["numpy"], "logits")
    np.testing.assert_allclose(
        np.concatenate(got), np.concatenate(reference(model)), atol=TOLERANCE, rtol=0
    )


# --- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_decoder": True}, "is_decoder"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice"),
        ({"id2label": {"0": "a", "2": "b"}}, "number 2 classes"),
        ({"hidden_size": 66}, "split into 4 heads"),
        ({"attention_extra": 3}, "attention_extra=3"),
        ({"problem_type": "ranking"}, "ranking"),
    ],
)
def test_refusals(change: dict[str, Any], message: str, folder: Any, tmp_path: Path) -> None:
    path, _ = folder("BertForSequenceClassification")
    shutil.copy(path / "model.safetensors", tmp_path)
    config = json.loads((path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((FileError, UnsupportedError), match=message):
        assemble(tmp_path)


def test_a_pickle_is_refused(folder: Any, tmp_path: Path) -> None:
    path, _ = folder("BertModel")
    shutil.copy(path / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(FileError, match="convert"):
        assemble(tmp_path)
