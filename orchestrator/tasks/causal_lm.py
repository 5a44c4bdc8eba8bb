"""Predicting the next token of running text."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from orchestrator.problems import raise_if
from orchestrator.tasks import Encoded, Estimate, Kind, Record, Rows, Split
from orchestrator.tasks.data import (
    TABLE_SUFFIXES,
    Table,
    cell_text,
    collate,
    collect,
    is_local,
    local_path,
    missing_columns,
    read_splits,
    read_table,
    shared_sources,
    split_path,
)
from orchestrator.tasks.statistics import matched, percentile_interval, resample
from orchestrator.trial import BadInput, Frozen

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PYTHON_STDLIB = "python_stdlib"
# Tests repeat themselves, installed packages differ by machine, and tables are no code.
NOT_STDLIB = {
    "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test",
    "tests", "turtledemo", "__pycache__",
}  # fmt: skip
MIN_DOCUMENTS = 3  # with fewer documents than splits, texts are cut


@dataclass(frozen=True, kw_only=True)
class Document:
    """A file, a row of a table, or a part of one."""

    id: str
    text: str


class CausalLm(Frozen):
    """`data` is "python_stdlib", a text file, a folder of *.txt, a table or a hub data set (at `data_revision`).

    "python_stdlib" are the sources of this interpreter's standard library. Several files are
    shared out whole, by the hash of their paths; one text is cut into its first 80 %, the next
    10 % and the last 10 %; parts that `train`, `validation` and `test` name stay as they are.
    Documents are joined by the end-of-text token and cut into blocks of `block_size` tokens; of
    validation and test at most `max_eval_blocks` are used, evenly spread. `max_files` limits the
    files (or rows) read, `max_chars` the characters trained on.
    """

    kind: ClassVar[Kind] = "decoder"
    quality: ClassVar[str] = "perplexity"
    comparable_vocabulary: ClassVar[bool] = False

    name: Literal["causal_lm"] = "causal_lm"
    data: str
    data_config: str | None = None
    data_revision: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    validation_share: float = Field(0.1, gt=0, lt=0.5)
    test_share: float = Field(0.1, gt=0, lt=0.5)
    text_column: str = "text"
    block_size: int = Field(128, ge=2)
    max_files: int | None = Field(None, gt=0)
    max_chars: int | None = Field(None, gt=0)
    max_eval_blocks: int = Field(256, gt=0)

    def load(self) -> dict[Split, Rows]:
        problems: list[str] = []
        parts = self._read(problems)
        raise_if(problems or [f"{s} has no text." for s, p in parts.items() if not num_chars(p)])
        parts = self._with_all_splits(parts)
        parts["train"] = first_chars(parts["train"], self.max_chars)
        return {
            split: Rows(
                ids=[document.id for document in part],
                texts=[(document.text,) for document in part],
                split=split,
            )
            for split, part in parts.items()
        }

    def label_names(self, rows: dict[Split, Rows]) -> list[str]:
        return []

    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """Blocks whose labels are the same tokens, one ahead; a block begins where the last ended."""
        stream = _token_stream([text for (text,) in rows.texts], tokenizer)
        starts = np.arange(0, len(stream) - self.block_size, self.block_size)
        if rows.split != "train" and len(starts) > self.max_eval_blocks:
            starts = starts[np.linspace(0, len(starts) - 1, self.max_eval_blocks).astype(int)]
        if not len(starts):
            raise BadInput(
                [
                    f"{rows.split} has {len(stream)} tokens, fewer than a block of"
                    f" {self.block_size} and the token after it; lower task.block_size or give"
                    " more text."
                ]
            )
        mask = np.ones(self.block_size, dtype=np.int64)
        return Encoded(
            ids=[f"{rows.split}-{start}" for start in starts],
            features=[
                {
                    "input_ids": stream[start : start + self.block_size],
                    "attention_mask": mask,
                    "labels": stream[start + 1 : start + self.block_size + 1],
                }
                for start in starts
            ],
            padding={"input_ids": tokenizer.pad_token_id or 0},
        )

    def collate(
        self, encoded: Encoded, indices: Sequence[int], *, length: int | None = None
    ) -> dict[str, np.ndarray]:
        return collate(encoded, indices, length=length)

    def logits(self, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[batch, length, vocabulary]"""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**inputs, use_cache=False).logits

    def loss(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy, a mean over tokens."""
        from torch.nn import functional as F

        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def distillation_loss(
        self,
        logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        batch: dict[str, torch.Tensor],
        *,
        temperature: float,
    ) -> torch.Tensor:
        from torch.nn import functional as F

        student = F.log_softmax(logits.float() / temperature, dim=-1)
        teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
        divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
        asked = batch["labels"] != -100
        return (divergence * asked).sum() / asked.sum() * temperature**2

    def records(
        self, logits: np.ndarray, batch: dict[str, np.ndarray], ids: Sequence[str]
    ) -> list[Record]:
        asked = batch["labels"] != -100
        nll = _nll(logits, np.where(asked, batch["labels"], 0)) * asked
        return [
            {"id": id, "nll": total, "num_tokens": count}
            for id, total, count in zip(
                ids, nll.sum(-1).tolist(), asked.sum(-1).tolist(), strict=True
            )
        ]

    def metrics(
        self, records: Sequence[Record], dense: Sequence[Record] | None = None
    ) -> dict[str, Estimate]:
        """Perplexity weighs every token alike; its interval is a bootstrap over blocks."""
        rows = _totals(records)
        resampled = _perplexity(resample(np.ones(len(rows), dtype=int)) @ rows)
        return {"perplexity": percentile_interval(_perplexity(rows.sum(0)), resampled)}

    def paired_difference(self, records: Sequence[Record], other: Sequence[Record]) -> Estimate:
        rows, others = _totals(records), _totals(matched(records, other))
        counts = resample(np.ones(len(rows), dtype=int))
        value = _perplexity(rows.sum(0)) - _perplexity(others.sum(0))
        return percentile_interval(value, _perplexity(counts @ rows) - _perplexity(counts @ others))

    # -- reading ---------------------------------------------------------------------------------

    def _read(self, problems: list[str]) -> dict[Split, list[Document]]:
        """The documents of each part that was given."""
        names: dict[Split, str | None] = {
            "train": self.train, "validation": self.validation, "test": self.test
        }  # fmt: skip
        if self.data == PYTHON_STDLIB:
            return {"train": self._read_files(stdlib_files(), stdlib_folder())}
        if not is_local(self.data):
            tables = read_splits(
                self.data,
                problems,
                names=names,
                data_config=self.data_config,
                data_revision=self.data_revision,
            )
            return collect(tables, self._documents, problems)
        if (root := local_path(self.data, problems)) is None:
            return {}
        if root.is_dir() and not any(names.values()):
            files = sorted(root.rglob("*.txt"))
            raise_if([] if files else [f"task.data: {root} has no .txt files; name task.train."])
            return {"train": self._read_files(files, root)}
        pairs = {split: (split, name) for split, name in names.items() if name or split == "train"}
        paths = collect(pairs, lambda pair: split_path(root, *pair), problems)
        problems += shared_sources(paths)
        return collect(paths, self._read_file, problems)

    def _read_files(self, paths: Sequence[Path], root: Path) -> list[Document]:
        """Whole files, in an order that depends on their names alone."""
        names = {path.relative_to(root).as_posix(): path for path in paths}
        chosen = sorted(names, key=_name_hash)[: self.max_files]
        return [Document(id=name, text=read_text(names[name])) for name in chosen]

    def _read_file(self, path: Path) -> list[Document]:
        """The rows of a table, or one text."""
        if path.suffix in TABLE_SUFFIXES:
            return self._documents(read_table(path))
        return [Document(id=path.name, text=read_text(path))]

    def _documents(self, table: Table) -> list[Document]:
        raise_if(missing_columns(table, {"text_column": self.text_column}))
        texts = [str(text) for text in table.columns[self.text_column] if cell_text(text)]
        return [
            Document(id=f"row-{row}", text=text) for row, text in enumerate(texts[: self.max_files])
        ]

    def _with_all_splits(self, parts: dict[Split, list[Document]]) -> dict[Split, list[Document]]:
        """Cut the parts that were not given off the end of train, test last."""
        train = parts["train"]
        shares: dict[Split, float] = {"test": self.test_share, "validation": self.validation_share}
        total = num_chars(train)
        cut: dict[Split, list[Document]] = {}
        for split, share in shares.items():
            if split not in parts:
                train, cut[split] = cut_off(train, share * total)
        validation, test = ({**parts, **cut}[split] for split in ("validation", "test"))
        return {"train": train, "validation": validation, "test": test}


def stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def stdlib_files() -> list[Path]:
    """The Python sources of this interpreter's standard library, without tests and packages."""
    folder = stdlib_folder()
    return [
        path
        for path in sorted(folder.rglob("*.py"))
        if not NOT_STDLIB.intersection(path.relative_to(folder).parts)
    ]


def read_text(path: Path) -> str:
    """A file's text; what is not UTF-8 becomes the replacement character."""
    return path.read_text(encoding="utf-8-sig", errors="replace")


def num_chars(documents: Sequence[Document]) -> int:
    return sum(len(document.text) for document in documents)


def first_chars(documents: list[Document], limit: int | None) -> list[Document]:
    """The first `limit` characters, all of them for None."""
    if limit is None:
        return documents
    kept = []
    for document in documents:
        if limit > 0:
            kept.append(Document(id=document.id, text=document.text[:limit]))
            limit -= len(document.text)
    return kept


def cut_off(documents: list[Document], chars: float) -> tuple[list[Document], list[Document]]:
    """All but the last `chars` characters, and these.

    Where there are enough documents they stay whole, else a text is cut behind a line.
    """
    sizes = np.cumsum([len(document.text) for document in reversed(documents)])
    if len(documents) >= MIN_DOCUMENTS:
        count = min(int(np.abs(sizes - chars).argmin()) + 1, len(documents) - 1)
        return documents[:-count], documents[-count:]
    count = int(np.searchsorted(sizes, chars))  # documents before the one that is cut
    before = int(sizes[count - 1]) if count else 0
    *head, last = documents[: len(documents) - count]
    first, second = cut_text(last, math.ceil(chars - before))
    return [*head, first], [second, *documents[len(documents) - count :]]


def cut_text(document: Document, chars: int) -> tuple[Document, Document]:
    """A document without its last `chars` characters or a little more, and the rest."""
    place = max(0, len(document.text) - chars)
    place = document.text.rfind("\n", 0, place) + 1 or place
    return (
        Document(id=document.id, text=document.text[:place]),
        Document(id=document.id, text=document.text[place:]),
    )


def _name_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _token_stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """All documents as one vector of tokens, each followed by the end-of-text token."""
    tokens = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.concatenate([np.array(part + end, dtype=np.int64) for part in tokens])


def _nll(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each label, [batch, length] of float64."""
    highest = logits.max(-1, keepdims=True)
    total = np.exp(logits - highest).sum(-1, dtype=np.float64)
    chosen = np.take_along_axis(logits, labels[..., None], -1) - highest
    return np.log(total) - chosen[..., 0]


def _totals(records: Sequence[Record]) -> np.ndarray:
    """Negative log-likelihood and number of tokens of each block, [blocks, 2]."""
    if not records:
        raise ValueError("metrics need at least one record, got none")
    return np.array([[record["nll"], record["num_tokens"]] for record in records])


def _perplexity(totals: np.ndarray) -> np.ndarray:
    """Of sums [..., 2] over blocks; infinite where it is beyond a float."""
    with np.errstate(over="ignore"):
        return np.exp(totals[..., 0] / totals[..., 1])
