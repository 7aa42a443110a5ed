"""LSTM language model, LSTM classifier and feed-forward net against torch.nn in fp32, from files of
a torch module's state dict: whole, token by token, forked, several at once.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lmclock
from lmclock import _native
from lmclock.assemble import Assembled, assemble
from lmclock.batch import Batch, Rows
from lmclock.config import from_hf
from lmclock.errors import FileError, OptionError, UnsupportedError
from lmclock.machines import Capacity, create
from lmclock.passes import optimise
from lmclock.text import from_folder
from lmclock.verify import verify
from tests.helpers import Runner, stored

TOLERANCE = 1e-4
PATHS = [path for path in ("avx512", "avx2", "scalar") if path in _native.simd_paths()]
MACHINES: dict[str, tuple[str, dict[str, Any]]] = {
    "numpy": ("array", {"namespace": "numpy"}),
    "torch": ("array", {"namespace": "torch"}),
    **{path: ("native", {"path": path, "threads": 2}) for path in PATHS},
}
on_all = pytest.mark.parametrize("machine", MACHINES)
IDS = [int(t) for t in np.random.default_rng(3).integers(0, 50, 19)]


class Generator(nn.Module):
    """The usual language model of PyTorch's examples, under names of its own."""

    def __init__(self, layers: int, embedding: int, hidden: int, bias: bool, tied: bool) -> None:
        super().__init__()
        self.encoder = nn.Embedding(50, embedding)
        self.rnn = nn.LSTM(embedding, hidden, layers, bias=bias, batch_first=True)
        self.decoder = nn.Linear(hidden, 50, bias=bias)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, ids: Any) -> Any:
        return self.decoder(self.rnn(self.encoder(ids))[0])


class Classifier(nn.Module):
    """Pretrained vectors, an LSTM, one row for each text, a linear layer."""

    def __init__(self, layers: int, both: bool, pooling: str, vectors: Any) -> None:
        super().__init__()
        self.pooling = pooling
        self.embedding = nn.Embedding.from_pretrained(vectors, freeze=True)
        width = vectors.shape[1]
        self.lstm = nn.LSTM(width, 17, layers, batch_first=True, bidirectional=both)
        self.output = nn.Linear(17 * (1 + both), 3)

    def forward(self, ids: Any) -> Any:
        rows, (h, _) = self.lstm(self.embedding(ids))
        pooled = {
            "last": lambda: torch.cat([*h[-1 - self.lstm.bidirectional :]], dim=1),
            "last_row": lambda: rows[:, -1],
            "mean": lambda: rows.mean(dim=1),
            "max": lambda: rows.amax(dim=1),
        }[self.pooling]()
        return self.output(pooled)


def saved(folder: Path, module: nn.Module, drop: tuple[str, ...] = (), **config: Any) -> Path:
    """A folder of the module's state dict and a config.json. Weights are drawn such that logits are
    near one.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for name, w in module.named_parameters():
            if w.requires_grad:
                w.copy_(
                    torch.randn(w.shape) * (1.5 if "weight" in name else 0.5) / w.shape[-1] ** 0.5
                )
    folder.mkdir(exist_ok=True)
    state = {name: w for name, w in module.state_dict().items() if name not in drop}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


GENERATORS = {
    "one layer": (1, 12, 20, True, False),
    "three layers, tied": (3, 33, 33, True, True),
    "without biases": (2, 40, 16, False, False),
}


def generator(case: str, folder: Path) -> tuple[Assembled, Generator]:
    layers, embedding, hidden, bias, tied = GENERATORS[case]
    module = Generator(*GENERATORS[case])
    names = {"embedding": "encoder", "lstm": "rnn", "output": "decoder"}
    drop = ("decoder.weight",) if tied else ()
    saved(folder, module, drop, model_type="lstm", vocab_size=50, embedding_size=embedding,
          hidden_size=hidden, num_layers=layers, bias=bias, output_bias=bias,
          tie_word_embeddings=tied, module_names=names, dropout=0.2)  # fmt: skip
    return assemble(folder), module


def by_torch(module: nn.Module, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return module(torch.tensor([ids]))[0].numpy()


def runner(made: Assembled, machine: str, level: int = 2) -> Runner:
    name, options = MACHINES[machine]
    return Runner(optimise(made.program, level), made.weights, name, **options)


def near(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(got - want).max() <= TOLERANCE


@on_all
@pytest.mark.parametrize("case", GENERATORS)
def test_language_model(case: str, machine: str, tmp_path: Path) -> None:
    made, module = generator(case, tmp_path)
    want = by_torch(module, IDS)
    assert 0.3 < np.abs(want).max() < 30
    near(runner(made, machine).cycle({"a": IDS}, pick="all")["a"], want)
    stepwise = runner(made, machine)
    rows = [stepwise.cycle({"a": IDS[:5]}, pick="all")["a"]]
    rows += [stepwise.cycle({"a": [token]})["a"] for token in IDS[5:]]
    near(np.concatenate(rows), want)


@on_all
def test_sequences_of_different_lengths_fork_and_end(machine: str, tmp_path: Path) -> None:
    """Each as if alone: prefills and single rows mixed, a fork that goes another way, a slot given
    back and used again.
    """
    made, module = generator("three layers, tied", tmp_path)
    texts = {"a": IDS[:11], "b": IDS[4:5], "c": IDS[2:9]}
    run = runner(made, machine)
    for name, rows in run.cycle(texts, pick="all", padding=2).items():
        near(rows, by_torch(module, texts[name]))
    run.fork("a", "d")
    texts["d"] = [*texts["a"]]
    run.close("c")  # cancelled: its slot goes to e
    work = {"d": [7], "b": [1, 2, 3, 4, 5, 6], "a": [9, 8], "e": IDS[:3]}
    rows = run.cycle(work, pick="all")
    for name, ids in work.items():
        near(rows[name], by_torch(module, [*texts.get(name, []), *ids])[-len(ids) :])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", ["f16", "bf16", "q8_0", "q4_1", "q5_0"])
def test_quantised_language_model(form: str, path: str, tmp_path: Path) -> None:
    """Against torch with the same dequantised weights: what is left is the rounding of activations
    of the output layer, which -O1 leaves out.
    """
    layers, width = 2, 64
    module = Generator(layers, width, width, bias=True, tied=False)
    names = {"embedding": "encoder", "lstm": "rnn", "output": "decoder"}
    saved(tmp_path, module, model_type="lstm", vocab_size=50, hidden_size=width, num_layers=layers,
          module_names=names)  # fmt: skip
    made = assemble(tmp_path)
    rounded = {
        name: stored(name, view.unpack(), form if view.shape[0] > 1 else "f32")
        for name, view in made.weights.items()
    }
    program = verify(
        replace(made.program, weights=tuple(
            replace(w, format=rounded[w.name].format.name) for w in made.program.weights))
    )  # fmt: skip
    theirs = made.reader.tensors
    with torch.no_grad():
        for name, w in module.named_parameters():
            view = next(v for v in made.weights.values() if v.parts[0].tensor is theirs[name])
            w.copy_(torch.tensor(rounded[view.name].unpack()).reshape(w.shape))
    want = by_torch(module, IDS)
    run = Runner(optimise(program, 1), rounded, "native", path=path, threads=2)
    near(run.cycle({"a": IDS[:9]}, pick="all")["a"], want[:9])
    near(np.concatenate([run.cycle({"a": [t]})["a"] for t in IDS[9:]]), want[9:])
    fast = Runner(optimise(program, 2), rounded, "native", path=path, threads=2)
    got = fast.cycle({"a": IDS}, pick="all")["a"]
    assert np.mean((got - want) ** 2) < 1e-3 * np.mean(want**2)


# --- classifier and feed-forward net


def encoded(made: Assembled, machine: str, spans: list[int], **inputs: np.ndarray) -> np.ndarray:
    """Logits of the section `encode` over sequences of so many rows."""
    name, options = MACHINES[machine]
    ours = create(name, **options)
    program = optimise(made.program, 2)
    ours.load(program, made.weights, Capacity(rows=64, slots=8))
    rows = Rows.of([(0, count) for count in spans])
    ours.bind(Batch({"src": rows}, inputs, np.arange(len(spans), dtype=np.int32)))
    ours.run("encode")
    return ours.read("logits")


@on_all
@pytest.mark.parametrize("pooling", ["last", "last_row", "mean", "max"])
@pytest.mark.parametrize(("layers", "both"), [(1, False), (1, True), (3, True), (2, False)])
def test_classifier(layers: int, both: bool, pooling: str, machine: str, tmp_path: Path) -> None:
    vectors = torch.tensor(np.random.default_rng(1).standard_normal((50, 30)), dtype=torch.float32)
    module = Classifier(layers, both, pooling, vectors)
    labels = {"0": "bad", "1": "fair", "2": "good"}
    made = assemble(
        saved(tmp_path, module, model_type="lstm_classifier", vocab_size=50, embedding_size=30,
              hidden_size=17, num_layers=layers, bidirectional=both, pooling=pooling,
              id2label=labels)
    )  # fmt: skip
    assert getattr(made.config, "labels") == ("bad", "fair", "good")  # noqa: B009
    texts = [IDS[:7], IDS[7:8], IDS[8:]]
    want = np.concatenate([by_torch(module, ids)[None] for ids in texts])
    assert 0.1 < np.abs(want).max() < 30
    ids = np.concatenate(texts).astype(np.int32)[:, None]
    near(encoded(made, machine, [len(t) for t in texts], src_ids=ids), want)


def test_classifier_of_texts(tmp_path: Path) -> None:
    """Words to classes with their scores, by the command line's own way."""
    vectors = torch.tensor(np.random.default_rng(1).standard_normal((50, 30)), dtype=torch.float32)
    module = Classifier(1, True, "last", vectors)
    labels = {"0": "bad", "1": "fair", "2": "good"}
    saved(tmp_path, module, model_type="lstm_classifier", vocab_size=50, embedding_size=30,
          hidden_size=17, bidirectional=True, id2label=labels)  # fmt: skip
    (tmp_path / "vocab.txt").write_text("<unk>\n" + "\n".join(f"w{n}" for n in range(1, 50)))
    with lmclock.load(str(tmp_path), threads=1) as model:
        found = model.classify(["w7 w3 w49", "nothing w1"])
    for result, ids in zip(found, ([7, 3, 49], [0, 1]), strict=True):
        scores = torch.softmax(torch.tensor(by_torch(module, ids)), 0)
        assert result.labels[0] == list(labels.values())[int(scores.argmax())]
        np.testing.assert_allclose(result.scores, np.sort(scores)[::-1], atol=TOLERANCE)


ACTS = {
    "relu": nn.ReLU, "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh"), "silu": nn.SiLU,
    "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "none": nn.Identity,
}  # fmt: skip


@on_all
@pytest.mark.parametrize(
    ("sizes", "hidden", "last", "bias"),
    [
        ([2, 3, 1], "relu", "none", True),
        ([7, 40, 33, 5], ["gelu", "tanh"], "sigmoid", True),
        ([16, 8], "relu", "tanh", False),
        ([5, 9, 9, 9, 4], ["gelu_tanh", "silu", "none"], "none", True),
    ],
)
def test_feed_forward(
    sizes: list[int], hidden: Any, last: str, bias: bool, machine: str, tmp_path: Path
) -> None:
    acts = [*(hidden if isinstance(hidden, list) else [hidden] * (len(sizes) - 2)), last]
    parts: list[nn.Module] = []
    for act, a, b in zip(acts, sizes, sizes[1:], strict=False):
        parts += [nn.Linear(a, b, bias=bias), ACTS[act]()]
    module = nn.Sequential(*parts)
    made = assemble(saved(tmp_path, module, model_type="mlp", layer_sizes=sizes, hidden_act=hidden,
                          output_act=last, bias=bias))  # fmt: skip
    x = np.random.default_rng(0).standard_normal((9, sizes[0])).astype(np.float32)
    with torch.no_grad():
        want = module(torch.tensor(x)).numpy()
    near(encoded(made, machine, [4, 5], x=x), want)


def test_rows_of_numbers_from_text(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))
    saved(tmp_path, module, model_type="mlp", layer_sizes=[2, 5, 3], hidden_act="tanh",
          id2label={"0": "a", "1": "b", "2": "c"})  # fmt: skip
    with lmclock.load(str(tmp_path), threads=1) as model:
        found = model.classify(["1 0", "0.5, -2e0"])
        wrong = {"1 x": "'1 x' does not hold numbers", "1": "'1' is no row",
                 "nan 1": "2 finite numbers", "1 2\n3 4": "is no row"}  # fmt: skip
        for text, message in wrong.items():
            with pytest.raises(OptionError, match=message):
                model.classify([text])
    with torch.no_grad():
        want = torch.softmax(module(torch.tensor([[1.0, 0.0], [0.5, -2.0]])), 1).numpy()
    for result, scores in zip(found, want, strict=True):
        assert result.label == "abc"[int(scores.argmax())]
        np.testing.assert_allclose(result.scores, np.sort(scores)[::-1], atol=TOLERANCE)


def test_the_net_of_the_article_number_by_number(tmp_path: Path) -> None:
    """The 2-3-1 net of S3 on [1, 0]: h = relu([0.1, 0.3, 0.5] + [0.2, 0.3, 0.4])."""
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    values = {"0.weight": [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], "0.bias": [0.2, 0.3, 0.4],
              "2.weight": [[0.7, 0.8, 0.9]], "2.bias": [0.5]}  # fmt: skip
    saved(tmp_path, module, model_type="mlp", layer_sizes=[2, 3, 1])
    save_file({n: torch.tensor(v) for n, v in values.items()}, tmp_path / "model.safetensors")
    got = encoded(assemble(tmp_path), "avx2", [1], x=np.array([[1.0, 0.0]], np.float32))
    np.testing.assert_allclose(got, [[0.7 * 0.3 + 0.8 * 0.6 + 0.9 * 0.9 + 0.5]], atol=1e-6)


# --- configurations

LM = {"model_type": "lstm", "vocab_size": 50, "hidden_size": 16}
CLASSIFIER = {"model_type": "lstm_classifier", "vocab_size": 50, "hidden_size": 16}
MLP = {"model_type": "mlp", "layer_sizes": [4, 3]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LM, "bidirectional": True}, "bidirectional=True may change the arithmetic"),
        ({**LM, "proj_hidden_size": 8}, "proj_hidden_size=8 may change the arithmetic"),
        ({**LM, "num_layers": 0}, "num_layers is '0'; valid: an integer from 1"),
        ({**LM, "tie_word_embeddings": True, "embedding_size": 8}, "an embedding_size of 16"),
        ({**LM, "module_names": {"rnn": "x"}}, "an object with embedding, lstm or output"),
        ({**LM, "module_names": {"lstm": "../x"}}, "names of letters, digits"),
        ({**CLASSIFIER, "pooling": "sum"}, "pooling is 'sum'; valid: last, mean, max or last_row"),
        ({**CLASSIFIER, "id2label": {"0": "a", "2": "b"}}, "that of number 1 is 'None'"),
        ({**CLASSIFIER, "id2label": {"0": "a"}, "num_labels": 3}, "valid: 1, the names in"),
        ({**MLP, "layer_sizes": [4]}, "a list of widths"),
        ({**MLP, "layer_sizes": [4, -3]}, "layer_sizes is '-3'"),
        ({**MLP, "hidden_act": ["relu"]}, "valid: one name, or 0 of them"),
        ({**MLP, "output_act": "step"}, "output_act is 'step'; valid: relu, gelu"),
        ({**MLP, "num_labels": 2}, "2 labels, but layer_sizes ends with 3 outputs"),
        ({**MLP, "module_names": ["a", "a"]}, "a list of 1 names"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(config: dict[str, Any], message: str) -> None:
    with pytest.raises((FileError, UnsupportedError), match=message.replace("[", r"\[")):
        from_hf(config)


def test_harmless_fields_are_listed_once() -> None:
    found = from_hf({**LM, "dropout": 0.5, "author": "me", "year": 2019})
    assert found.notes == ("ignored in config.json: author, year",)


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    saved(tmp_path, Generator(1, 8, 8, True, False), model_type="lstm", vocab_size=50,
          hidden_size=9, embedding_size=8,
          module_names={"embedding": "encoder", "lstm": "rnn", "output": "decoder"})  # fmt: skip
    with pytest.raises(FileError, match=r"rnn\.weight_ih_l0 is 32 x 8, but .* 36 x 8"):
        assemble(tmp_path)


# --- words


def words(folder: Path, text: str, **config: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(LM))
    (folder / "vocab.txt").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return from_folder(folder)


def test_words_of_a_vocabulary_file(tmp_path: Path) -> None:
    text = "<unk>\n<eos>\nthe\ncat\n.\n公园\ndon\n't\n"
    ours = words(tmp_path, text, do_lower_case=True)
    assert ours.encode("The CAT, the 公园.") == [2, 3, 0, 2, 5, 4]
    assert ours.decode([2, 3, 4, 0]) == "the cat . <unk>" and ours.eos_ids == {1}
    assert ours.encode("<eos>") == [0, 0, 0] and ours.encode("<eos>", allow_special=True) == [1]
    spaces = words(tmp_path, text, split="spaces", bos_token="<eos>", add_bos_token=True)
    assert spaces.encode("the cat. .") == [1, 2, 0, 4]


@pytest.mark.parametrize(
    ("text", "config", "message"),
    [
        ("the\ncat\n", {}, "vocab.txt: there is no word for unknown ones"),
        ("<unk>\na\nb\na\n", {}, "vocab.txt: the word 'a' is there twice"),
        ("<unk>\na\n", {"split": "letters"}, "split is 'letters' .*valid: words or spaces"),
        ("<unk>\na\n", {"add_bos_token": True}, "bos_token None is not in the vocabulary"),
    ],
)
def test_a_wrong_vocabulary_is_one_sentence(
    text: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FileError, match=message):
        words(tmp_path, text, **config)
