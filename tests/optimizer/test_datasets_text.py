"""Tables of text: reading them, tokens grouped by length with their labels, and what bad tables say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perwatt.datasets import Roles, open_roles
from perwatt.datasets_text import read_table
from perwatt.errors import InputError
from perwatt.recipe import DataSection
from perwatt.signature import Signature, TensorSpec

WORDS = [f"w{i}" for i in range(40)]


def signature(length: int | str = "sequence", names: tuple[str, ...] = ("input_ids", "attention_mask")) -> Signature:
    return Signature(tuple(TensorSpec(name, "int64", ("batch", length)) for name in names), ())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word tokenizer of at most 12 tokens: [CLS] words [SEP]; wN has the number N + 4."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {word: i + 4 for i, word in enumerate(WORDS)}
    words: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    (folder / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 12}')
    return folder


def table(folder: Path, name: str = "data.tsv") -> Path:
    """40 rows; row i is i % 5 + 1 times the word wi, and its label is i."""
    lines = [" ".join([WORDS[i]] * (i % 5 + 1)) + f"\t{i}" for i in range(40)]
    (folder / name).write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return folder / name


def opened(where: Path, tokenizer: Path, model: Signature | None = None, label2id: Any = None, **fields: Any) -> Roles:
    section = DataSection(all=str(where), **({"text": ["sentence"], "label": "label"} | fields))
    return open_roles(section, model or signature(), tokenizer=tokenizer, label2id=label2id)


def test_sentences_of_one_length_share_a_chunk_and_keep_their_labels(tmp_path: Path, tokenizer: Path) -> None:
    roles = opened(table(tmp_path), tokenizer)
    assert roles.confirm and roles.confirm.labels is not None
    words = []
    for chunk in roles.confirm.chunks:
        assert list(chunk) == ["input_ids", "attention_mask"]
        assert chunk["attention_mask"].all() and chunk["input_ids"].dtype == np.int64
        assert (chunk["input_ids"][:, -1] == 3).all()
        words += [int(v) - 4 for v in chunk["input_ids"][:, 1]]
    assert words == list(roles.confirm.labels)
    lengths = [chunk["input_ids"].shape[1] for chunk in roles.confirm.chunks]
    assert lengths == sorted(set(lengths))


def test_a_fixed_length_is_padded_to(tmp_path: Path, tokenizer: Path) -> None:
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    roles = opened(table(tmp_path), tokenizer, signature(9, names))
    assert roles.confirm and len(roles.confirm.chunks) == 1
    chunk = roles.confirm.chunks[0]
    assert chunk["input_ids"].shape[1] == 9 and not chunk["attention_mask"].all()
    assert list(chunk["position_ids"][0]) == list(range(9))
    assert ((chunk["input_ids"] == 0) == (chunk["attention_mask"] == 0)).all()


def test_pairs_truncation_and_float_targets(tmp_path: Path, tokenizer: Path) -> None:
    rows = [f'"{" ".join(WORDS[: i + 3])}, yes",w{i},{i / 2}' for i in range(8)]
    (tmp_path / "pairs.csv").write_text("a,b,score\n" + "\n".join(rows))
    model = signature(names=("input_ids", "token_type_ids"))
    roles = opened(tmp_path / "pairs.csv", tokenizer, model, text="a,b", label="score")
    assert roles.confirm and roles.confirm.labels is not None and roles.confirm.labels.dtype == np.float32
    assert max(chunk["input_ids"].shape[1] for chunk in roles.confirm.chunks) <= 12
    assert all(chunk["token_type_ids"].any() for chunk in roles.confirm.chunks)
    assert any("cut at 12 tokens" in note for note in roles.notes)


def test_named_labels(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "named.csv").write_text("sentence,label\n" + "w1,good\nw2,bad\n" * 8)
    plain = opened(tmp_path / "named.csv", tokenizer)
    assert plain.class_names == ("bad", "good") and any("bad = 0, good = 1" in note for note in plain.notes)
    own = opened(tmp_path / "named.csv", tokenizer, label2id={"GOOD": 0, "BAD": 1})
    assert own.confirm and own.confirm.labels is not None and plain.confirm and plain.confirm.labels is not None
    assert list(own.confirm.labels) == list(1 - plain.confirm.labels)
    unlabelled = opened(tmp_path / "named.csv", tokenizer, label=None)
    assert unlabelled.confirm and unlabelled.confirm.labels is None


def test_bad_tables(tmp_path: Path, tokenizer: Path) -> None:
    good = table(tmp_path)
    for fields, message in [
        ({"text": ["sentense"]}, "unknown column 'sentense': did you mean sentence"),
        ({"text": None}, "columns sentence, label — say which holds the text: --text"),
        ({"label": "lable"}, "did you mean label"),
    ]:
        with pytest.raises(InputError, match=message):
            opened(good, tokenizer, **fields)
    with pytest.raises(InputError, match="comes without a tokenizer"):
        open_roles(DataSection(all=str(good), text=["sentence"]), signature())
    with pytest.raises(InputError, match="holds no tokenizer"):
        opened(good, tmp_path)
    with pytest.raises(InputError, match="the model's inputs are pixels, a tokenizer gives"):
        opened(good, tokenizer, signature(names=("pixels",)))
    for content, message in [
        (b"sentence,label\nw1,1\nw2\n", "line 3: 1 fields where the header has 2"),
        (b"sentence,label\n", "needs a header and at least one row"),
        (b"sentence,label\nw1,\nw2,1\n", "label 1 of 2 is empty"),
        (b"sentence,label\nw1,\xff\n", "not UTF-8"),
    ]:
        (tmp_path / "bad.csv").write_bytes(content)
        with pytest.raises(InputError, match=message):
            opened(tmp_path / "bad.csv", tokenizer)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('a\tb\nsay "hi\t1\nbye\t2\n', [['say "hi', "1"], ["bye", "2"]]),
        ('a\tb\n"one ""two"" three"\t1\n', [['one "two" three', "1"]]),
        ('a\tb\n"one\ntwo"\t1\n', [["one\ntwo", "1"]]),
        ('a,b\n"one, two",1\n', [["one, two", "1"]]),
        ("a;b\none, two;1\n", [["one, two", "1"]]),
        ("a\nonly one column\n", [["only one column"]]),
        ("\ufeffa,b\r\none,1\r\n\r\n", [["one", "1"]]),
    ],
)
def test_dialects(tmp_path: Path, content: str, rows: list[list[str]]) -> None:
    (tmp_path / "t").write_bytes(content.encode())
    header, found = read_table(tmp_path / "t")
    assert found == rows and header[0] == "a"
