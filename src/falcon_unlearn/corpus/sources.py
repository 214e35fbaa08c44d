"""Where records come from: files, folders and hub datasets, and the forget and retain sets made of them.

A path that exists is read from the disk, whatever else its name could mean; a relative one is looked for in the
recipe's folder, then in the current directory. Everything else is a dataset id of the Hugging Face hub.

==========  ==========================================================================
``.jsonl``  one JSON object a line
``.json``   a list of objects, ``{"data": [...]}``, or JSON lines (as many hub files are)
``.csv``    comma-separated, first line names the columns
``.parquet``  one record a row
``.txt``    one ``text`` record a paragraph (blank lines between paragraphs)
==========  ==========================================================================

A folder is read file by file, sorted by path, hidden and unknown files left out. A folder in hub layout (its
README.md declares configurations, or its files or folders are named after splits) is read as a dataset, so that
no test split slips into training; so is any folder for which a ``config`` or another ``split`` is named. Rows of a
dataset whose text is blank (WikiText has thousands) are no records.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, model_validator

from falcon_unlearn.config import Section
from falcon_unlearn.corpus.batching import PLAIN_TEMPLATE, LongRecords, LossMask, TemplateChoice
from falcon_unlearn.corpus.records import COLUMN_SETS, RECORD_COLUMNS, Record, record_from_row
from falcon_unlearn.errors import UserError, did_you_mean

OnOverlap = Literal["error", "drop", "allow"]
Rows = Iterator[tuple[Mapping[str, Any], str]]
"""Rows of a file or dataset, each with the place it stands at (``people.jsonl:3``)."""

_SPLIT_NAME = re.compile(r"(?:^|/)(?:train|test|validation|dev)[./]|-\d{5}-of-\d{5}\.")
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


class SourceConfig(Section):
    """One source of records; a bare string is short for ``{source: string}``."""

    source: str = Field(min_length=1)
    """File, folder of files, or dataset id of the hub."""
    config: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset; slices such as ``train[:10%]`` work."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first N records only."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


def _domain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError("a domain's name is made of letters, digits, _ and -")
    return name


_DOMAINS = TypeAdapter(dict[Annotated[str, AfterValidator(_domain_name)], SourceConfig])


def parse_domains(value: Any) -> SourceConfig | dict[str, SourceConfig]:
    """Tell one source from several named domains before pydantic does, so that errors name the key alone.

    A mapping is one source if it has a key of :class:`SourceConfig`, or one that looks like a slip of the pen for
    such a key (``{sorce: people.jsonl}``); otherwise its keys are domain names.

    Raises:
        pydantic.ValidationError: with locations relative to ``value``.
    """
    if isinstance(value, str | SourceConfig):
        return SourceConfig.model_validate(value)
    if not isinstance(value, Mapping):
        raise ValueError("expected a path or hub id, {source: ...}, or several domains {name: {source: ...}, ...}")  # noqa: TRY004
    fields = SourceConfig.model_fields
    single = not value or any(
        key in fields or (not isinstance(entry, Mapping | SourceConfig) and did_you_mean(str(key), fields))
        for key, entry in value.items()
    )
    return SourceConfig.model_validate(value) if single else _DOMAINS.validate_python(value)


Domains = Annotated[SourceConfig | dict[str, SourceConfig], BeforeValidator(parse_domains)]


class SelfSamplesConfig(Section):
    """Retain records that the original model writes itself (:mod:`falcon_unlearn.self_samples`)."""

    count: int = Field(0, ge=0)
    """How many it writes, of which those about the forget set are left out; 0: none."""
    per_retain_record: float = Field(0.5, gt=0)
    """At most so many for each retain record, which too many would crowd out of the batches."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest question and longest answer, which are left out where they do not end before, or longest text."""
    batch_size: int = Field(128, ge=1)
    """Sequences at a time."""

    def wanted(self, retain_records: int) -> int:
        """How many are written beside so many retain records."""
        return min(self.count, int(self.per_retain_record * retain_records))


class CorpusConfig(Section):
    """What to forget, what to keep, and how both become tokens."""

    forget: Domains
    """One source, or several named domains, each with its own source."""
    retain: Domains
    """One source, or several named domains, each with its own source."""
    on_overlap: OnOverlap = "error"
    """Records in both forget and retain: ``error``, ``drop`` (forget only) or ``allow`` (keep both, report)."""
    template: TemplateChoice = "auto"
    """``auto``: the tokenizer's chat template where it has one, else the plain template."""
    plain_template: str = PLAIN_TEMPLATE
    """Template of question and answer without a chat template."""
    loss_mask: LossMask | None = None
    """Tokens in the losses: ``answer`` or ``all``; empty: as the method's preset says."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest record in tokens; empty: the model's context."""
    on_long: LongRecords = "error"
    """Records longer than that: ``error``, ``drop`` or ``truncate``."""
    self_samples: SelfSamplesConfig = SelfSamplesConfig()
    """Further retain records that the original model writes itself, spread over the retain domains."""


@dataclass(frozen=True)
class CorpusReport:
    """What was found on loading.

    Mappings are keyed like the recipe below ``corpus``: ``forget`` and ``retain``, or ``forget.bio`` where domains
    are named.

    Attributes:
        records: records in use.
        duplicates: further copies of a record of the same domain; the first copy is in use.
        overlap: retain records that also stand in forget.
        overlap_example: origins of the first such pair, forget before retain.
        on_overlap: what was done with them.
    """

    records: Mapping[str, int]
    duplicates: Mapping[str, int]
    overlap: int
    overlap_example: tuple[str, str] | None
    on_overlap: OnOverlap


@dataclass(frozen=True)
class Corpus:
    """Records by domain; a set with a single source is one domain named ``forget`` or ``retain``.

    ``hashes`` holds the SHA-256 of each domain's records as used (their content and order, not where they stand),
    keyed like :class:`CorpusReport`.
    """

    forget: Mapping[str, tuple[Record, ...]]
    retain: Mapping[str, tuple[Record, ...]]
    report: CorpusReport
    hashes: Mapping[str, str]


def _read_text(path: Path, shown: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: not UTF-8 (byte {error.start}): save the file as UTF-8") from None


def _parse_json(text: str, shown: str, line: int) -> Any:
    """Parse ``text``, which begins at ``line`` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{shown}:{line + error.lineno - 1}"
        raise UserError(f"{place}: malformed JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown}:{line}: malformed JSON: {error}") from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _jsonl_rows(path: Path, shown: str) -> Rows:
    # Not str.splitlines: it also breaks at U+2028 and U+0085, which may stand inside a JSON string.
    for number, line in enumerate(_read_text(path, shown).split("\n"), start=1):
        if line.strip():
            yield _parse_json(line, shown, number), f"{shown}:{number}"


def _json_rows(path: Path, shown: str) -> Rows:
    text = _read_text(path, shown)
    first, _, rest = text.strip().partition("\n")
    if not first or (rest and _is_json(first)):
        yield from _jsonl_rows(path, shown)
        return
    value = _parse_json(text, shown, 1)
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(f'{shown}: expected a list of objects, {{"data": [...]}} or one object a line')
    yield from ((row, f"{shown}, record {number}") for number, row in enumerate(rows, start=1))


def _csv_header(cells: list[str], shown: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    if not any(set(columns) <= set(header) for columns in RECORD_COLUMNS):
        raise UserError(
            f"{shown}:1: the first line must name the columns ({COLUMN_SETS}), it reads: {', '.join(header)}"
        )
    if len(set(header)) < len(header):
        raise UserError(f"{shown}:1: a column name stands twice in the first line: {', '.join(header)}")
    return header


def _csv_rows(path: Path, shown: str) -> Rows:
    reader = csv.reader(io.StringIO(_read_text(path, shown), newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    # The module's limit of 128 KiB a field is process-wide and shorter than a book.
    previous_limit = csv.field_size_limit(sys.maxsize)
    try:
        for cells in reader:
            if header is None:
                header = _csv_header(cells, shown)
            elif cells:
                if len(cells) != len(header):
                    raise UserError(
                        f"{shown}:{line}: {len(cells)} fields, but the first line names {len(header)} columns"
                    )
                yield dict(zip(header, cells, strict=True)), f"{shown}:{line}"
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{shown}:{line}: malformed CSV: {error}") from error
    finally:
        csv.field_size_limit(previous_limit)


def _parquet_rows(path: Path, shown: str) -> Rows:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{shown}, row {number}"
    except pyarrow.ArrowException as error:
        raise UserError(f"{shown}: not a readable Parquet file: {_first_line(error)}") from error


def _txt_rows(path: Path, shown: str) -> Rows:
    paragraph: list[str] = []
    lines = _read_text(path, shown).replace("\r\n", "\n").split("\n")
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield {"text": "\n".join(paragraph)}, f"{shown}:{number - len(paragraph)}"
            paragraph = []


_READERS: Mapping[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _txt_rows,
}
_SUFFIXES = " ".join(_READERS)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _dataset_error(error: Exception, source: SourceConfig, where: str) -> UserError:
    """One line for what ``datasets.load_dataset`` raised; it tells its errors apart by their text alone."""
    name, text = f"dataset '{source.source}'", " ".join(str(error).split())
    choices = re.search(r"\[.*\]", text)
    available = f"; available: {choices[0][1:-1]}" if choices else ""
    if "gated dataset" in text:
        page = f"https://huggingface.co/datasets/{source.source}"
        return UserError(f"{where}: {name} is gated: ask for access at {page}, then log in with 'hf auth login'")
    if isinstance(error, ConnectionError):
        return UserError(
            f"{where}: '{source.source}' is no local file or folder, and the hub could not be reached for a dataset of "
            "that name: check the path, the network and HF_HUB_OFFLINE"
        )
    if type(error).__name__ == "DatasetNotFoundError":
        return UserError(
            f"{where}: '{source.source}' is neither a local file or folder nor a dataset on the hub that you can read: "
            "check the name, or log in with 'hf auth login' if it is private"
        )
    if "Config name is missing" in text:
        return UserError(f"{where}: {name} needs a config{available}")
    if re.search(r"BuilderConfig .* not found", text):
        return UserError(f"{where}: {name} has no config '{source.config}'{available}")
    if "Unknown split" in text:
        return UserError(f"{where}: {name} has no split '{source.split}'{available}")
    return UserError(f"{where}: {name} could not be loaded: {_first_line(error)}")


def _dataset_rows(path: str, source: SourceConfig, where: str) -> Rows:
    """Rows of a hub dataset, or of a local folder in hub layout at ``path``."""
    import datasets

    try:
        dataset = datasets.load_dataset(path, source.config, split=source.split)
    except Exception as error:  # whatever it is, it is about this dataset
        raise _dataset_error(error, source, where) from error
    place = f"{source.source} ({', '.join(filter(None, (source.config, source.split)))})"
    for number, row in enumerate(dataset, start=1):
        text = row.get("text")
        if not (isinstance(text, str) and not text.strip()):
            yield row, f"{place}, row {number}"


def _hub_layout(folder: Path, files: list[Path]) -> bool:
    readme = folder / "README.md"
    declared = readme.is_file() and re.search(r"^configs:", readme.read_text(errors="replace"), flags=re.MULTILINE)
    return bool(declared) or any(_SPLIT_NAME.search(file.relative_to(folder).as_posix()) for file in files)


def _folder_rows(folder: Path, source: SourceConfig, where: str) -> Rows:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in _READERS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise UserError(f"{where}: no {_SUFFIXES} file in the folder '{source.source}'")
    if source.config is not None or source.split != "train" or _hub_layout(folder, files):
        yield from _dataset_rows(str(folder.resolve()), source, where)
        return
    for path in files:
        shown = f"{source.source.rstrip('/')}/{path.relative_to(folder).as_posix()}"
        yield from _READERS[path.suffix.lower()](path, shown)


def _file_rows(path: Path, source: SourceConfig, where: str) -> Rows:
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{where}: '{source.source}' is not one of the formats that can be read ({_SUFFIXES})")
    if source.config is not None or source.split != "train":
        raise UserError(f"{where}: '{source.source}' is a file: config and split are for datasets and folders only")
    yield from _READERS[path.suffix.lower()](path, source.source)


def _locate(source: str, base_dir: Path, where: str) -> Path | None:
    """The existing path that ``source`` names, or None where it must be a hub id."""
    places = [base_dir, Path.cwd()]
    try:
        for place in places:
            path = place / Path(source).expanduser()
            if path.exists():
                return path
    except (OSError, RuntimeError) as error:
        raise UserError(f"{where}: cannot look up '{source}': {error}") from error
    if Path(source).suffix.lower() in _READERS or source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
        relative = not Path(source).is_absolute() and not source.startswith("~")
        looked = f" (looked beside the recipe and in {Path.cwd()})" if relative else ""
        raise UserError(f"{where}: missing file '{source}'{looked}: check the path")
    return None


def load_records(source: SourceConfig, base_dir: Path, where: str) -> list[Record]:
    """Read every record of one source, duplicates included.

    Args:
        source: what to read.
        base_dir: folder that relative paths start from (the recipe's), before the current directory.
        where: the recipe's key, such as ``corpus.forget``, for messages.

    Raises:
        UserError: missing or unreadable source, malformed content, columns not recognised, or no record at all.
    """
    path = _locate(source.source, base_dir, where)
    if path is None:
        rows = _dataset_rows(source.source, source, where)
    elif path.is_dir():
        rows = _folder_rows(path, source, where)
    else:
        rows = _file_rows(path, source, where)
    records = []
    try:
        for row, origin in islice(rows, source.limit):
            if not isinstance(row, Mapping):
                raise UserError(f"{origin}: expected an object with the columns {COLUMN_SETS}")
            records.append(record_from_row(row, origin))
    except OSError as error:
        raise UserError(f"{where}: cannot read '{source.source}': {error}") from error
    if not records:
        raise UserError(f"{where}: '{source.source}' holds no records")
    return records


def _distinct(records: list[Record]) -> tuple[Record, ...]:
    first: dict[tuple[str, str], Record] = {}
    for record in records:
        first.setdefault(record.key, record)
    return tuple(first.values())


def content_hash(records: Sequence[Record]) -> str:
    """SHA-256 of records as used: content and order, not where they stand."""
    digest = hashlib.sha256()
    for record in records:
        fields = dataclasses.asdict(record)
        del fields["origin"]
        digest.update(json.dumps(fields, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _key(side: str, domain: str) -> str:
    return side if domain == side else f"{side}.{domain}"


def load_side(
    side: str, value: SourceConfig | Mapping[str, SourceConfig], base_dir: Path
) -> tuple[dict[str, tuple[Record, ...]], dict[str, int]]:
    """One side of a corpus, one of each exact duplicate.

    Returns:
        Records by domain, and the number of further copies, keyed like :class:`CorpusReport`.

    Raises:
        UserError: as :func:`load_records`.
    """
    domains: dict[str, tuple[Record, ...]] = {}
    duplicates: dict[str, int] = {}
    for domain, source in ({side: value} if isinstance(value, SourceConfig) else value).items():
        found = load_records(source, base_dir, f"corpus.{_key(side, domain)}")
        domains[domain] = _distinct(found)
        duplicates[_key(side, domain)] = len(found) - len(domains[domain])
    return domains, duplicates


def load_corpus(config: CorpusConfig, base_dir: Path) -> Corpus:
    """Load both sets, keep one of each exact duplicate and settle what stands in both.

    Args:
        config: the recipe's ``corpus`` section.
        base_dir: the recipe's folder.

    Raises:
        UserError: as :func:`load_records`; overlap with ``on_overlap = "error"``; nothing left with ``"drop"``.
    """
    sides: dict[str, dict[str, tuple[Record, ...]]] = {"forget": {}, "retain": {}}
    duplicates: dict[str, int] = {}
    for side, value in (("forget", config.forget), ("retain", config.retain)):
        sides[side], further = load_side(side, value, base_dir)
        duplicates |= further

    forgotten = {record.key: record for records in sides["forget"].values() for record in records}
    shared = [record for records in sides["retain"].values() for record in records if record.key in forgotten]
    example = (forgotten[shared[0].key].origin, shared[0].origin) if shared else None
    if example and config.on_overlap == "error":
        raise UserError(
            f"corpus: {len(shared)} retain records also stand in forget (first: {example[0]} and {example[1]}); "
            "remove them from one of the two, or set corpus.on_overlap to drop (forget only) or allow (both)"
        )
    if example and config.on_overlap == "drop":
        for domain, records in sides["retain"].items():
            sides["retain"][domain] = tuple(record for record in records if record.key not in forgotten)
            if not sides["retain"][domain]:
                raise UserError(
                    f"corpus.{_key('retain', domain)}: every record also stands in forget, none is left after "
                    "corpus.on_overlap=drop"
                )

    domains = {_key(side, domain): records for side in sides for domain, records in sides[side].items()}
    return Corpus(
        forget=sides["forget"],
        retain=sides["retain"],
        report=CorpusReport(
            records={key: len(records) for key, records in domains.items()},
            duplicates=duplicates,
            overlap=len(shared),
            overlap_example=example,
            on_overlap=config.on_overlap,
        ),
        hashes={key: content_hash(records) for key, records in domains.items()},
    )
