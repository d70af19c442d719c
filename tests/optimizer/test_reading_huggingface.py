"""Local Hugging Face and sentence-transformers folders, small ones made on the spot; never the network."""

import json

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from perwatt.errors import InputError, UntrustedCodeError  # noqa: E402
from perwatt.reading import read  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "very"]


def run(artifact, folder, feed):
    session = onnxruntime.InferenceSession(str(artifact.save(folder / "m.onnx")), _quiet())
    return session.run(None, {i.name: feed[i.name] for i in session.get_inputs()})[0]


def _quiet():
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return options


def bert(folder, classifier=True):
    """A tiny BERT with its tokenizer, saved into `folder`; returns the model."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=3, label2id={"bad": 0, "mixed": 1, "good": 2},
        id2label={0: "bad", 1: "mixed", 2: "good"},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config) if classifier else transformers.BertModel(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    tokenizer(folder)
    return model


def tokenizer(folder):
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)


IDS = np.int64([[2, 5, 6, 8, 3, 0, 0], [2, 9, 9, 7, 5, 8, 3]])
FEED = {"input_ids": IDS, "attention_mask": (IDS > 0).astype(np.int64), "token_type_ids": np.zeros_like(IDS)}


def test_a_classifier_with_dynamic_batch_and_sequence(tmp_path):
    model = bert(tmp_path / "bert")
    reading = read(tmp_path / "bert")
    assert reading.format == "huggingface"
    assert {s.name: s.shape for s in reading.artifact.signature.inputs} == dict.fromkeys(FEED, ("batch", "sequence"))
    assert [str(s) for s in reading.artifact.signature.outputs] == ["logits:float32[batch,3]"]
    assert reading.label2id == {"bad": 0, "mixed": 1, "good": 2}
    assert reading.tokenizer == tmp_path / "bert"
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in reading.assets}
    with torch.no_grad():
        expected = model(**{k: torch.from_numpy(v) for k, v in FEED.items()}).logits.numpy()
    np.testing.assert_allclose(run(reading.artifact, tmp_path, FEED), expected, atol=1e-5)
    one = {k: v[1:, :4] for k, v in FEED.items()}
    assert run(reading.artifact, tmp_path, one).shape == (1, 3)


def test_an_encoder_gives_its_last_hidden_state(tmp_path):
    bert(tmp_path / "bert", classifier=False)
    reading = read(tmp_path / "bert")
    assert [str(s) for s in reading.artifact.signature.outputs] == ["last_hidden_state:float32[batch,sequence,16]"]
    assert reading.label2id is None


def test_an_image_model_takes_the_preprocessors_size(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        num_labels=4,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    reading = read(tmp_path / "vit")
    assert str(reading.artifact.signature.inputs[0]) == "pixel_values:float32[batch,3,32,32]"
    x = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).logits.numpy()
    np.testing.assert_allclose(run(reading.artifact, tmp_path, {"pixel_values": x}), expected, atol=1e-5)
    assert "preprocessor_config.json" in {path.name for path in reading.assets}


# --- sentence-transformers -------------------------------------------------------------------------------------------


def sentence(folder, *modules):
    """A sentence-transformers folder around a tiny BERT; modules are (type, config, weights)."""
    model = bert(folder, classifier=False)
    entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for index, (kind, config, weights) in enumerate(modules, 1):
        kind = kind if "." in kind else f"sentence_transformers.models.{kind}"
        home = folder / f"{index}_{kind.rsplit('.', 1)[-1]}"
        home.mkdir()
        (home / "config.json").write_text(json.dumps(config))
        if weights is not None:
            from safetensors.torch import save_file

            save_file(weights, str(home / "model.safetensors"))
        entries.append({"idx": index, "name": str(index), "path": home.name, "type": kind})
    (folder / "modules.json").write_text(json.dumps(entries))
    return model


def hidden(model):
    with torch.no_grad():
        return model(**{k: torch.from_numpy(v) for k, v in FEED.items()}).last_hidden_state.numpy()


def test_pooling_and_normalization(tmp_path):
    modes = {f"pooling_mode_{mode}": True for mode in ("mean_tokens", "max_tokens", "cls_token")}
    model = sentence(tmp_path / "st", ("Pooling", modes, None), ("Normalize", {}, None))
    reading = read(tmp_path / "st")
    assert reading.format == "sentence-transformers"
    assert [str(s) for s in reading.artifact.signature.outputs] == ["sentence_embedding:float32[batch,48]"]
    states, mask = hidden(model), FEED["attention_mask"][..., None]
    means = (states * mask).sum(1) / mask.sum(1)
    expected = np.concatenate([states[:, 0], np.where(mask > 0, states, -1e9).max(1), means], axis=1)
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(run(reading.artifact, tmp_path, FEED), expected, atol=1e-5)


@pytest.mark.parametrize(("activation", "output"), [("Identity", "logits"), ("Tanh", "sentence_embedding")])
def test_a_dense_layer_at_the_end(activation, output, tmp_path):
    from perwatt.reading_sentence import SentenceEncoder, read_modules

    place = "linear" if activation == "Identity" else "activation"
    config = {"in_features": 16, "out_features": 2, "bias": True}
    config["activation_function"] = f"torch.nn.modules.{place}.{activation}"
    weights = {"linear.weight": torch.randn(2, 16), "linear.bias": torch.randn(2)}
    folder = tmp_path / "st"
    model = sentence(folder, ("Pooling", {"pooling_mode": "mean"}, None), ("Dense", config, weights))
    states, mask = hidden(model), FEED["attention_mask"][..., None]
    pooled = (states * mask).sum(1) / mask.sum(1)
    expected = pooled @ weights["linear.weight"].numpy().T + weights["linear.bias"].numpy()
    expected = np.tanh(expected) if activation == "Tanh" else expected
    encoder = SentenceEncoder(model, list(FEED), folder, read_modules(folder)[1:])
    with torch.no_grad():
        ((name, value),) = encoder(*map(torch.from_numpy, FEED.values())).items()
    assert name == output
    np.testing.assert_allclose(value.numpy(), expected, atol=1e-5)


def test_a_classifier_made_of_an_encoder_and_a_dense_layer(tmp_path):
    config = {"in_features": 16, "out_features": 2, "activation_function": "torch.nn.modules.linear.Identity"}
    weights = {"linear.weight": torch.randn(2, 16), "linear.bias": torch.randn(2)}
    sentence(tmp_path / "st", ("Pooling", {"pooling_mode_mean_tokens": True}, None), ("Dense", config, weights))
    assert str(read(tmp_path / "st").artifact.signature.outputs[0]) == "logits:float32[batch,2]"


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(folder, marker, error=UntrustedCodeError):
    with pytest.raises(error) as caught:
        read(folder)
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def evil_module(folder, marker):
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_remote_code(file, tmp_path):
    marker, folder = tmp_path / "marker", tmp_path / "bert"
    bert(folder)
    evil_module(folder, marker)
    plain = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    plain["auto_map"] = {"AutoModel": "modeling_evil.Evil", "AutoTokenizer": ["modeling_evil.Evil", None]}
    (folder / file).write_text(json.dumps(plain))
    assert "code of its own (auto_map" in refused(folder, marker)


def test_pickled_weights_with_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "marker"), "w")

    bert(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").unlink()
    torch.save({"bert.pooler.dense.bias": Evil()}, tmp_path / "bert" / "pytorch_model.bin")
    refused(tmp_path / "bert", tmp_path / "marker", InputError)


def test_pickled_weights_of_tensors_only_are_read(tmp_path):
    model = bert(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "bert" / "pytorch_model.bin")
    from perwatt.reading_huggingface import _load

    network, _ = _load(tmp_path / "bert", trust=False)
    assert torch.equal(network.classifier.weight, model.classifier.weight)


def test_modules_that_are_code(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    sentence(tmp_path / "st", ("modeling_evil.Evil", {}, None))
    evil_module(tmp_path / "st", marker)
    monkeypatch.syspath_prepend(str(tmp_path / "st"))
    assert "modeling_evil.Evil" in refused(tmp_path / "st", marker)


def test_activations_that_are_code(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    config = {"in_features": 16, "out_features": 2, "activation_function": "modeling_evil.Evil"}
    weights = {"linear.weight": torch.randn(2, 16), "linear.bias": torch.randn(2)}
    sentence(tmp_path / "st", ("Pooling", {"pooling_mode_cls_token": True}, None), ("Dense", config, weights))
    evil_module(tmp_path / "st", marker)
    monkeypatch.syspath_prepend(str(tmp_path / "st"))
    assert "activation modeling_evil.Evil" in refused(tmp_path / "st", marker)


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def half_of_the_weights(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(str(folder / "model.safetensors"))
    save_file(
        {k: v for k, v in state.items() if "classifier" not in k}, str(folder / "model.safetensors"), {"format": "pt"}
    )


def unknown_class(folder):
    plain = json.loads((folder / "config.json").read_text())
    plain["architectures"] = ["BertForSequenceClassificatoin"]
    (folder / "config.json").write_text(json.dumps(plain))


def broken_config(folder):
    (folder / "config.json").write_text("{")


def adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_weights, "needs a model.safetensors"),
        (half_of_the_weights, "lacks 2 weights"),
        (unknown_class, "did you mean BertForSequenceClassification"),
        (broken_config, "can't be read"),
        (adapter, "merge it first"),
    ],
)
def test_folders_that_can_not_be_read(change, said, tmp_path):
    bert(tmp_path / "bert")
    change(tmp_path / "bert")
    assert said in refused(tmp_path / "bert", tmp_path / "marker", InputError)
