"""A CSV or TSV table of text as a data set, read with the model's own tokenizer.

Sentences of one exact token length share a chunk, so nothing is padded, unless the model's sequence length is fixed.
Longer texts are truncated at what the tokenizer and the model can take.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perwatt.data import Samples
from perwatt.datasets_fit import dtype_of
from perwatt.datasets_source import Labels, Notes, Source, encode_text, listed
from perwatt.errors import InputError, install_words, nearest
from perwatt.recipe import DataSection
from perwatt.signature import Array, Batch, Signature

_NO_LIMIT = 1_000_000
_LONGEST_FIELD = 1 << 24


def open_table(
    path: Path,
    section: DataSection,
    signature: Signature,
    *,
    tokenizer: Path | None,
    label2id: Mapping[str, int] | None,
) -> Source:
    """Reads the table; text is tokenized when loaded. Raises InputError for unknown columns, ragged rows, a missing or
    broken tokenizer, and a model whose inputs a tokenizer can't feed."""
    notes = Notes()
    header, lines = read_table(path)
    if not section.text:
        raise InputError(f"{path} has the columns {listed(header)}", fix="say which holds the text: --text NAME")
    if len(section.text) > 2:
        raise InputError(f"--text takes one column or two, not {len(section.text)}")
    columns = [_column(name, header, path) for name in section.text]
    labels = _labels(section, header, lines, path, label2id, notes)
    if tokenizer is None:
        raise InputError(
            f"{path} holds text and the model comes without a tokenizer",
            fix="give the model as its Hugging Face folder, or tokenized samples as .npz",
        )
    encoder = _Encoder(tokenizer, signature, notes)

    def load(indices: Array) -> Samples:
        texts = [[lines[i][column] for i in indices] for column in columns]
        chunks, order = encoder.encode(texts)
        return Samples(chunks, None if labels is None else labels.values[indices][order])

    return Source(len(lines), load, [path], notes, None if labels is None else labels.class_names)


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV or TSV file; the header tells which it is. Raises InputError for a file that is no text,
    has no rows, or has rows of the wrong length."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from None
    first = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = max("\t,;", key=lambda d: (first.count(d) > 0, d == "\t", first.count(d)))
    # Tables with tabs are mostly written without quoting: a lone " in a sentence must not swallow the lines after it.
    ways = (csv.QUOTE_NONE, csv.QUOTE_MINIMAL) if delimiter == "\t" else (csv.QUOTE_MINIMAL,)
    problems = []
    for quoting in ways:
        lines, problem = _parse(text, delimiter, quoting, path)
        if problem is None:
            return [name.strip().strip('"') for name in lines[0]], lines[1:]
        problems.append(problem)
    raise problems[-1]


def _parse(text: str, delimiter: str, quoting: Any, path: Path) -> tuple[list[list[str]], InputError | None]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    lines: list[list[str]] = []
    try:
        for line in reader:
            if not line:
                continue
            if lines and len(line) != len(lines[0]):
                have = f"{len(line)} fields where the header has {len(lines[0])}"
                return lines, InputError(f"{path}, line {reader.line_num}: {have}")
            lines.append(line)
    except csv.Error as error:
        return lines, InputError(f"{path}, line {reader.line_num}: {error}")
    if len(lines) < 2:
        return lines, InputError(f"{path} is no table: it needs a header and at least one row")
    if quoting == csv.QUOTE_NONE and any(_quoted(field) for line in lines[1:] for field in line if '""' in field):
        return lines, InputError(f"{path}: fields are quoted")
    return lines, None


def _quoted(field: str) -> bool:
    """A field that only a writer with quoting makes: in quotes, every quote inside doubled."""
    return len(field) > 2 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', "")


def _column(name: str, header: Sequence[str], path: Path) -> int:
    if name not in header:
        raise InputError(f"{path}: {nearest(name, header, 'column')}")
    return list(header).index(name)


def _labels(
    section: DataSection, header: Sequence[str], lines: Sequence[Sequence[str]], path: Path,
    label2id: Mapping[str, int] | None, notes: Notes,
) -> Labels | None:  # fmt: skip
    if section.label is None:
        others = [name for name in header if name not in (section.text or ())]
        if others:
            notes.add(f"{path}: no labels used; --label names their column ({listed(others)})")
        return None
    column = _column(section.label, header, path)
    return encode_text([line[column] for line in lines], f"{path}, column {section.label}", label2id, notes)


class _Encoder:
    """Turns sentences into chunks of model inputs."""

    def __init__(self, folder: Path, signature: Signature, notes: Notes) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.signature = signature
        self.notes = notes
        self.fixed_length = self._fixed_length()
        self.longest = self.fixed_length or min(self._tokenizer_limit(), _model_limit(folder))
        known = {"input_ids", "position_ids", *self.tokenizer.model_input_names, "token_type_ids", "attention_mask"}
        unknown = [spec.name for spec in signature.inputs if spec.name not in known]
        if unknown or "input_ids" not in {spec.name for spec in signature.inputs}:
            names = listed(spec.name for spec in signature.inputs)
            raise InputError(f"the model's inputs are {names}, a tokenizer gives {listed(sorted(known))}")

    def _fixed_length(self) -> int | None:
        fixed = {spec.shape[1] for spec in self.signature.inputs if spec.shape is not None and len(spec.shape) == 2}
        lengths = [d for d in fixed if isinstance(d, int)]
        return lengths[0] if lengths else None

    def _tokenizer_limit(self) -> int:
        return int(min(self.tokenizer.model_max_length or _NO_LIMIT, _NO_LIMIT))

    def encode(self, texts: Sequence[Sequence[str]]) -> tuple[list[Batch], Array]:
        """Chunks by length, shortest first, and the position in `texts` of each item in them."""
        if not texts[0]:
            return [], np.zeros(0, dtype=np.int64)
        limited = self.longest < _NO_LIMIT
        if self.fixed_length and self.tokenizer.pad_token is None:
            raise InputError(f"the model takes {self.fixed_length} tokens exactly, and its tokenizer can't pad")
        encoded = self.tokenizer(
            *[list(column) for column in texts],
            truncation=limited,
            max_length=self.longest if limited else None,
            padding="max_length" if self.fixed_length else False,
            return_token_type_ids=True,
            return_attention_mask=True,
        )
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        if self.fixed_length:
            self.notes.add(f"texts padded or cut to the model's fixed length of {self.fixed_length} tokens")
        elif limited and (cut := int((lengths == self.longest).sum())):
            self.notes.add(f"texts are cut at {self.longest} tokens ({cut} of {len(lengths)} reach that)")
        if not lengths.min():
            raise InputError("a text gives no token at all: is a row of the table empty?")
        order = np.argsort(lengths, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1)
        return [self._chunk(encoded, group) for group in groups], order

    def _chunk(self, encoded: Any, group: Array) -> Batch:
        length = len(encoded["input_ids"][group[0]])
        chunk: Batch = {}
        for spec in self.signature.inputs:
            if spec.name == "position_ids" and spec.name not in encoded:
                values = np.tile(np.arange(length), (len(group), 1))
            else:
                values = np.array([encoded[spec.name][i] for i in group])
            chunk[spec.name] = values.astype(dtype_of(spec))
        return chunk


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer saved in `folder`; nothing is fetched and no code of the folder is run. Raises InputError."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise InputError("text needs a tokenizer library", fix=install_words("huggingface")) from None
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        raise InputError(f"{folder} holds no tokenizer that can be loaded: {words}") from None


def _model_limit(folder: Path) -> int:
    """The longest sequence that the folder allows: positions of the model, and what sentence-transformers cuts at."""
    wanted = (("config.json", "max_position_embeddings"), ("sentence_bert_config.json", "max_seq_length"))
    limits = []
    for name, key in wanted:
        try:
            config = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            continue
        limit = config.get(key) if isinstance(config, dict) else None
        if isinstance(limit, int) and limit > 0:
            limits.append(limit)
    return min(limits, default=_NO_LIMIT)
