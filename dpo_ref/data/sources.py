"""Preference data from files, folders and the hub: `data=jsonl` and the presets of published sets.

A source is read once: rows become groups, bad rows are named or counted, filters applied, the result kept.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpo_ref.component import component
from dpo_ref.data.formats.checks import BadRow, Row, columns_of
from dpo_ref.data.formats.columns import GivenColumns, ReadRow, unread_columns
from dpo_ref.data.formats.published import are_scored
from dpo_ref.data.formats.recognise import Format, check_format, convert, format_of, known_logps, named_logps
from dpo_ref.data.groups import StoredGroups, write
from dpo_ref.data.pairing import Filters, Seen, add_pairs
from dpo_ref.data.rows import Named, Source, open_source
from dpo_ref.data.thoughts import without_earlier_thoughts
from dpo_ref.files.cache import cache_folder, in_use, is_kept
from dpo_ref.files.digests import seal_folder
from dpo_ref.files.writing import replacing_folder, write_json
from dpo_ref.types import PreferenceData, Progress, PromptGroup, Reading, digest, silent

# --- one source read


VERSION = 5  # of what is kept; a change of meaning makes it 6
EARLIER_THOUGHTS = {"keep": tuple, "drop": without_earlier_thoughts}
EXAMPLES = 10  # bad rows listed with their reasons
_SHOWN = 20  # names of columns that are not read
_JUDGED_AFTER = 1000  # rows, before which the share of bad ones is not looked at


@dataclass(frozen=True)
class Rules:
    """How rows are read, whatever the source. Raises ValueError for values out of range."""

    format: str = "auto"
    pairing: str | None = None
    rating: str | None = None
    filters: Filters = field(default_factory=Filters)
    limit: int | None = None
    on_bad_row: str = "error"
    max_bad_share: float = 0.1
    logps_columns: tuple[str, ...] | None = None
    columns: tuple[tuple[str, str], ...] | None = None  # our name, theirs
    ignore: tuple[str, ...] | None = None
    earlier_thoughts: str = "keep"

    @property
    def identity(self) -> dict[str, Any]:
        """What is said, without what is left open."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: value for name, value in said.items() if (name, value) != ("earlier_thoughts", "keep")}

    def __post_init__(self) -> None:
        check_format(self.format)
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"data.max_bad_share={self.max_bad_share} is a share: it must lie in [0, 1]")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"data.limit={self.limit} must be at least 1 row")
        if self.logps_columns is not None and not len(set(self.logps_columns)) == len(self.logps_columns) > 0:
            raise ValueError(f"data.logps_columns=[{', '.join(self.logps_columns)}] must name columns, each once")
        theirs = [name for _, name in self.columns or ()]
        if twice := next((name for name in theirs if theirs.count(name) > 1), None):
            raise ValueError(f"data.columns gives the column {twice} two names; give it one")
        if twice := next((name for name in theirs if name in (self.ignore or ())), None):
            raise ValueError(f"data.columns and data.ignore say two things about the column {twice}; say one")


class Reader:
    """Makes groups of rows and remembers what became of them."""

    def __init__(self, rules: Rules, source: str) -> None:
        self.rules, self.source = rules, source
        self.num_rows, self.num_kept = 0, 0
        self.dropped: Counter[str] = Counter()
        self.examples: list[str] = []
        self.format: Format | None = None
        self._seen = Seen(rules.filters.deduplicate)
        self._given = GivenColumns(dict(rules.columns or ()), rules.ignore or ())
        self._missing = {"data.logps_columns": set(rules.logps_columns or ()), **self._given.missing}
        self._first_columns = ""  # of the first row, for messages
        self._unread: dict[str, None] = {}
        self._columns: dict[str, bool] = {}  # whether some row's was read
        self._num_without_thoughts, self._num_contradicted = 0, 0
        self._has_scores: set[bool] = set()  # of ranked rows

    @property
    def reading(self) -> Reading:
        """What became of the rows so far."""
        formats = (self.format.name,) if self.format else ()
        notes = _listed("columns not read", list(self._unread))
        if self.rules.earlier_thoughts != "keep":
            notes += (f"prompts without their earlier thoughts: {self._num_without_thoughts}",)
        if self._num_contradicted:
            count = f"{self._num_contradicted} (data.min_margin=0 leaves them out)"
            notes += (f"pairs whose rejected side has the higher score: {count}",)
        return Reading(self.num_rows, dict(self.dropped), tuple(self.examples), formats, notes, self._read_or_not())

    def _read_or_not(self) -> tuple[str, ...]:
        read = [name for name, was_read in self._columns.items() if was_read]
        others = [name for name in self._columns if name not in read and name not in self._unread]
        return _listed("columns read", read) + _listed("harmless, empty, or said before", others)

    def groups(self, rows: Iterable[Named]) -> Iterator[PromptGroup]:
        """The groups to keep. Raises ValueError for a bad row, or for too many, as the rules say, and for no group."""
        for group in self._merge_prompts(self._convert(rows)):
            outcome = self._finish(group)
            if isinstance(outcome, str):
                self.dropped[outcome] += 1
                continue
            self.num_kept += 1
            scores = outcome.rewards or ()
            self._num_contradicted += sum(bool(scores) and scores[a] < scores[b] for a, b in outcome.pairs)
            yield outcome
            if self.num_kept == self.rules.limit:
                break
        self._judge(0)
        for option, missing in self._missing.items():
            if self.num_kept and missing:
                raise ValueError(
                    f"{self.source}: no row has the column {min(missing)}, which {option} names; the first has "
                    f"{self._first_columns}"
                )
        if not self.num_kept:
            raise ValueError(f"{self.source}: no usable row: {self._reasons() or 'it is empty'}")

    def _convert(self, rows: Iterable[Named]) -> Iterator[PromptGroup]:
        for origin, row in rows:
            self.num_rows += 1
            try:
                group = self._group(origin, row)
            except BadRow as error:
                self._report_bad_row(origin, error)
            except RecursionError:
                self._report_bad_row(origin, BadRow("holds lists and objects too deep inside each other"))
            else:
                yield group

    def _group(self, origin: str, content: Row | BadRow) -> PromptGroup:
        """The group of a row. Raises BadRow."""
        if isinstance(content, BadRow):
            raise content
        self._first_columns = self._first_columns or columns_of(content)
        row = self._given.row(content)
        self.format = self.format or self._accept(format_of(self.rules.format, row))
        options = {"rating": self.rules.rating} if self.rules.rating else {}
        group = convert(row, origin, self.format, options, self.rules.format != "auto")
        if self.format.name == "ranked" and self.rules.rating is None:
            self._check_scores(are_scored(row))
        group = self._with_logps(group, row, self.format)
        prompt = EARLIER_THOUGHTS[self.rules.earlier_thoughts](group.prompt)
        self._num_without_thoughts += prompt != group.prompt
        group = replace(group, prompt=prompt)
        self._given.check_used(row, self.format.name)
        self._unread.update(dict.fromkeys(unread_columns(row, group, self.format.known, self.format.name)))
        self._columns.update({name: True for name in row if name in row.read})
        if not row.keys() <= self._columns.keys():
            self._columns |= {name: False for name in row if name not in self._columns}
        return group

    def _check_scores(self, has_scores: bool) -> None:
        """Refuse a ranked row without scores among rows that have them, or the other way round."""
        self._has_scores.add(has_scores)
        if len(self._has_scores) > 1:
            self._has_scores.discard(has_scores)
            own, before = ("scores", "none") if has_scores else ("no scores", "them")
            raise BadRow(
                f"has {own}, while the rows before have {before}: the order of responses ranks all rows or none"
            )

    def _with_logps(self, group: PromptGroup, row: ReadRow, format: Format) -> PromptGroup:
        """The group with the log-probs that the row brings, if it does."""
        columns, size = self.rules.logps_columns, len(group.responses)
        self._missing["data.logps_columns"].difference_update(row)
        logps = known_logps(row, format.logps, size) if columns is None else named_logps(row, columns, size)
        return group if logps is None else replace(group, logps=logps)

    def _accept(self, format: Format) -> Format:
        if self.rules.rating and "rating" not in format.options:
            raise ValueError(
                f"data.rating={self.rules.rating} has no effect: format {format.name} has one score alone"
            )
        columns = self.rules.logps_columns
        if columns and len(columns) not in map(len, format.logps):
            takes = (
                f"takes columns like {', '.join(format.logps[0])}" if format.logps else "has no place for log-probs"
            )
            raise ValueError(f"data.logps_columns=[{', '.join(columns)}] has no effect: format {format.name} {takes}")
        return format

    def _merge_prompts(self, groups: Iterator[PromptGroup]) -> Iterator[PromptGroup]:
        """Groups, consecutive ones with the same prompt as one where the format has a row for each response."""
        pending: PromptGroup | None = None
        for group in groups:
            assert self.format is not None
            if not self.format.rows_of_one_prompt:
                yield group
            elif pending is not None and _same_prompt(pending, group) and pending.rewards and group.rewards:
                pending = replace(
                    pending, responses=pending.responses + group.responses, rewards=pending.rewards + group.rewards
                )
            else:
                if pending is not None:
                    yield pending
                pending = group
        if pending is not None:
            yield pending

    def _finish(self, group: PromptGroup) -> PromptGroup | str:
        """The group with its pairs, or why it is left out."""
        rules = self.rules
        if rules.pairing is not None and (group.pairs or group.rewards is None):
            reason = "has its pairs already" if group.pairs else "has no scored responses to pair"
            raise ValueError(f"data.pairing={rules.pairing} has no effect: {group.origin} {reason}")
        if group.rewards is not None and not group.pairs:
            if len(group.responses) == 1:
                return "one response alone"
            outcome = add_pairs(group, rules.pairing or "best_vs_worst", rules.filters)
            if isinstance(outcome, str):
                return outcome
            group = outcome
        refusal = rules.filters.refusal(group)
        return refusal or ("a duplicate" if self._seen.before(group) else group)

    def _report_bad_row(self, origin: str, error: BadRow) -> None:
        if self._missing["data.columns"] and not self.num_kept:
            name = min(self._missing["data.columns"])
            error = BadRow(f"{error}; no row so far has the column {name}, which data.columns names")
        if self.rules.on_bad_row == "error":
            raise ValueError(f"{origin} {error}. data.on_bad_row=skip leaves such rows out") from error
        self.dropped["bad rows"] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{origin} {error}")
        self._judge(_JUDGED_AFTER)

    def _judge(self, after: int) -> None:
        bad, share = self.dropped["bad rows"], self.rules.max_bad_share
        if self.num_rows > after and bad > share * self.num_rows + 1e-9 and (self.num_kept or bad < self.num_rows):
            raise ValueError(
                f"{self.source}: {bad} of {self.num_rows} rows cannot be used, more than "
                f"data.max_bad_share={share:g}, such as: {'; '.join(self.examples[:3])}"
            )
        if not bad:
            del self.dropped["bad rows"]

    def _reasons(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items() if count)
        return "; ".join((reasons, *self.examples[:3])) if self.examples else reasons


def _same_prompt(a: PromptGroup, b: PromptGroup) -> bool:
    return (a.prompt, a.tools, a.template_options) == (b.prompt, b.tools, b.template_options)


def _listed(title: str, names: list[str]) -> tuple[str, ...]:
    """A line that names columns; none for none."""
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return (f"{title}: {', '.join([*names[:_SHOWN], *more])}",) if names else ()


def read(source: Source, rules: Rules, key: str, cache: Path, progress: Progress) -> tuple[Path, Reading]:
    """The Arrow file of a source's groups, made now unless an equal reading was kept, and what became of its rows."""
    opened = open_source(source, key)
    said = {name: value for name, value in asdict(source).items() if (name, value) != ("revision", None)}
    if opened.content is None:
        folder = Path(_temporary_folder().name) / digest([said, rules.identity])
    else:
        folder = cache / "groups" / digest([VERSION, opened.content, said, rules.identity])
    if not is_kept(folder, f"{source.path} is read again"):
        reader = Reader(rules, source.path)
        with replacing_folder(folder) as partial:
            write(reader.groups(progress(opened.rows, f"reading {source.path}", None)), partial / "groups.arrow")
            write_json(partial / "reading.json", reader.reading._asdict())
            seal_folder(partial)
        in_use(folder)
    record = json.loads((folder / "reading.json").read_text())
    lists = (tuple(record[name]) for name in ("examples", "formats", "notes", "columns"))
    reading = Reading(record["num_rows"], record["dropped"], *lists)
    # Of files that are not read the digest knows nothing: what is said of them is of now.
    return folder / "groups.arrow", reading._replace(notes=(*opened.notes, *reading.notes))


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that lives as long as the process: for rows that are streamed and so cannot be known again."""
    if not _FOLDERS:
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="dpo_ref_"))
    return _FOLDERS[0]


# --- the components


OWN_RULES = ("format", "logps_columns", "columns", "ignore")  # that an entry of data.sources may say for itself


def refuse_ineffective(
    *,
    path: str | None,
    sources: list[Any] | None,
    hub: dict[str, Any] | None,
    eval_path: str | None,
    eval_split: str | None,
    eval_fraction: float,
    subset: int | None,
    **others: Any,
) -> None:
    """Refuse, before anything is read, options of `preferences` of which one would be ignored. Raises ValueError."""
    if path is None and sources is None and hub is None:
        raise ValueError("data needs data.path=... (a file, a folder, a name on the hub), or data.sources=[...]")
    if path is not None and sources is not None:
        raise ValueError("data.path and data.sources both say where the rows are; give one of them")
    if sources is not None and not sources:
        raise ValueError("data.sources=[] names no source")
    if sources is not None:
        for key, value in {**others, "eval_split": eval_split}.items():
            if key in ("name", "folder", "split", "eval_split", "streaming", "revision") and value:
                raise ValueError(f"data.{key}={value} has no effect: write it into data.sources")
    if eval_fraction and (eval_path or eval_split):
        raise ValueError("data.eval_path, data.eval_split and data.eval_fraction hold rows out; give one of them")
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"data.eval_fraction={eval_fraction} must lie in [0, 1)")
    if subset is not None and subset < 1:
        raise ValueError(f"data.subset={subset} must be at least 1 group")


@component(check=refuse_ineffective)
def preferences(
    seed: int,
    progress: Progress = silent,
    *,
    path: str | None = None,
    sources: list[Any] | None = None,
    format: str = "auto",
    name: str | None = None,
    folder: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    eval_path: str | None = None,
    eval_split: str | None = None,
    eval_fraction: float = 0.0,
    hub: dict[str, Any] | None = None,
    revision: str | None = None,
    pairing: Literal["best_vs_worst", "best_vs_random", "all"] | None = None,
    rating: str | None = None,
    min_margin: float | None = None,
    min_score_ratio: float | None = None,
    min_chars: int | None = None,
    max_chars: int | None = None,
    deduplicate: Literal["off", "exact", "normalised"] = "off",
    limit: int | None = None,
    subset: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    max_bad_share: float = 0.1,
    logps_columns: list[str] | None = None,
    columns: dict[str, str] | None = None,
    ignore: list[str] | None = None,
    earlier_thoughts: Literal["keep", "drop"] = "keep",
) -> PreferenceData:
    """Preference pairs, ranked or scored responses, unpaired answers or demonstrations, in the formats people have.

    `path` is a file (.jsonl, .json, .csv, .tsv, .parquet, each also compressed), a folder of such files, a folder
    written by `datasets`, or a name on the hub, with its configuration `name`, `folder`, `split` and `revision`, a
    branch, tag or commit (summary.json says which commit it was); `streaming` fetches only the rows that are used.
    Several at once: `sources`, a list of {path, weight, and any of format, name, folder, split, revision}, where the
    weight is the share of the source's groups that is used: 0.5 a random half, 2 every group twice. `hub` is where a
    preset's rows are unless `path` or `sources` says otherwise: {path, name, folder, split, eval_split}. `format`
    names the layout of the rows (see `formats`); `auto` recognises it.

    Held out are the rows of `eval_path`, those of `eval_split`, or a share `eval_fraction` of the prompts drawn from
    the seed; by default nothing. `pairing` says which pairs to make of k scored responses (best_vs_worst unless given)
    and `rating` which of a row's ratings scores them. `min_margin` and `min_score_ratio` compare the scores of chosen
    and rejected, `min_chars` and `max_chars` bound every response, `deduplicate` drops groups seen before. `limit`
    takes the first groups of every source, `subset` draws as many training groups by the seed. A bad row stops the run
    with its file, row and reason, or is counted and skipped as long as no more than `max_bad_share` are.
    `logps_columns` names the columns that bring log-probs of the responses for `reference=columns` (chosen's and
    rejected's; of ranked responses one, a list) where they are not well-known ones. `columns` gives columns the names
    that the formats know, {prompt: question}, and `ignore` names columns, or keys of turns, that may be passed over:
    else a column that is not read stops the run where it changes what a row means. An entry of `sources` may say
    these three for itself. `earlier_thoughts=drop` leaves out what the assistant thought before the user's last
    question, in keys or in its words, as templates do that show a model no earlier thoughts.

    Raises ValueError for what cannot be read, and for options that would have no effect.
    """
    filters = Filters(min_margin, min_score_ratio, min_chars, max_chars, deduplicate)
    own = _own_rules({"logps_columns": logps_columns, "columns": columns, "ignore": ignore}, "data.", "")
    rules = Rules(
        format, pairing, rating, filters, limit, on_bad_row, max_bad_share, **own, earlier_thoughts=earlier_thoughts
    )
    refuse_ineffective(
        path=path, sources=sources, hub=hub, eval_path=eval_path, eval_split=eval_split, eval_fraction=eval_fraction,
        subset=subset, name=name, folder=folder, split=split, streaming=streaming, revision=revision,
    )  # fmt: skip
    if path is None and sources is None and hub is not None:
        path, name, folder, split, eval_split = _preset(
            hub, (name, folder, split, eval_split), eval_path, eval_fraction
        )
    source = Source(path or "", name, folder, split, streaming=streaming, revision=revision)
    weighted = [(source, rules, 1.0)] if sources is None else [_weighted_source(entry, rules) for entry in sources]
    train, readings = _join_sources(weighted, "data.path" if path else "data.sources", seed, progress)
    held_out = train.select(np.zeros(0, dtype=np.int64))
    if eval_path is not None or eval_split is not None:
        if eval_path is None:
            eval_source, eval_key = replace(source, split=eval_split, split_key="data.eval_split"), "data.path"
        else:
            eval_source, eval_key = Source(eval_path, split=eval_split, split_key="data.eval_split"), "data.eval_path"
        eval_file, reading = read(eval_source, rules, eval_key, cache_folder(), progress)
        held_out, readings = StoredGroups.load([eval_file]), [*readings, reading]
    elif eval_fraction:
        train, held_out = _split(train, eval_fraction, seed)
    if subset is not None:
        rows = np.random.default_rng([seed, 1]).permutation(len(train))[:subset]
        train = train.select(train.places[np.sort(rows)])
    prompts = {group.asked_id: group.asked for group in held_out if group.prompt}
    return PreferenceData(train, held_out, list(prompts.values()), _total(readings))


def _preset(
    hub: dict[str, Any], overrides: tuple[str | None, ...], eval_path: str | None, eval_fraction: float
) -> tuple[str | None, ...]:
    """Where a preset's rows are: path, name, folder, split, eval_split; overrides go before the preset."""
    names = ("name", "folder", "split", "eval_split")
    unknown = set(hub) - {"path", *names}
    if unknown or "path" not in hub:
        raise ValueError(f"data.hub is {{path: ..., {', '.join(names)}}}, not {hub}")
    options = {name: value or hub.get(name) for name, value in zip(names, overrides, strict=True)}
    if (eval_path is not None or eval_fraction) and overrides[3] is None:
        options["eval_split"] = None
    return hub["path"], options["name"], options["folder"], options["split"], options["eval_split"]


def _weighted_source(entry: Any, rules: Rules) -> tuple[Source, Rules, float]:
    """One entry of `data.sources`."""
    keys = {f.name for f in fields(Source)} - {"split_key"} | {"weight", *OWN_RULES}
    unknown = set(entry) - keys if isinstance(entry, dict) else {str(entry)}
    if unknown or "path" not in entry:
        problem = f"{', '.join(sorted(unknown))} is unknown" if unknown else "path is missing"
        raise ValueError(f"data.sources: {problem}; an entry is {{path: ..., {', '.join(sorted(keys - {'path'}))}}}")
    weight = entry.get("weight", 1.0)
    if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ValueError(f"data.sources: weight={weight} of {entry['path']} must be a positive number")
    given = {name: entry[name] for name in OWN_RULES if name in entry}
    own = _own_rules(given, "data.sources: ", f" of {entry['path']}")
    location = {name: value for name, value in entry.items() if name not in ("weight", *OWN_RULES)}
    return Source(**location), replace(rules, **own), float(weight)


def _own_rules(given: dict[str, Any], key: str, of: str) -> dict[str, Any]:
    """Rules that name columns, as `Rules` holds them. Raises ValueError for what is no list and no mapping."""
    own = dict(given)
    for name in ("logps_columns", "ignore"):
        if own.get(name) is not None:
            if not isinstance(own[name], list):
                raise ValueError(f"{key}{name}={own[name]}{of} must be a list of names")
            own[name] = tuple(own[name])
    columns = own.get("columns")
    if columns is not None:
        if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns.values()):
            raise ValueError(f"{key}columns={columns}{of} must be {{our name: the column's name}}")
        own["columns"] = tuple(sorted(columns.items()))
    return own


def _join_sources(
    weighted: Sequence[tuple[Source, Rules, float]], key: str, seed: int, progress: Progress
) -> tuple[StoredGroups, list[Reading]]:
    """All sources' groups, each in its share."""
    files = [read(source, rules, key, cache_folder(), progress) for source, rules, _ in weighted]
    together = StoredGroups.load([path for path, _ in files])
    sizes = [len(StoredGroups.load([path])) for path, _ in files]
    starts = np.cumsum([0, *sizes[:-1]])
    parts = [
        start + _share(size, weight, np.random.default_rng([seed, 2, index]))
        for index, (start, size, (_, _, weight)) in enumerate(zip(starts, sizes, weighted, strict=True))
    ]
    if not sum(map(len, parts)):
        raise ValueError("data.sources: with these weights no group is left")
    return together.select(np.concatenate(parts)), [reading for _, reading in files]


def _share(size: int, weight: float, rng: np.random.Generator) -> np.ndarray:
    """Rows of a source: all of them as often as the weight's whole part says, and a random part of the rest."""
    whole, part = divmod(weight, 1.0)
    extra = np.sort(rng.permutation(size)[: round(part * size)])
    return np.concatenate([*[np.arange(size)] * int(whole), extra])


def _split(groups: StoredGroups, fraction: float, seed: int) -> tuple[StoredGroups, StoredGroups]:
    """Train and held-out groups; a share of the prompts is held out, so that a prompt is on one side only."""
    ids = groups.ids("prompt_id")
    prompts = list(dict.fromkeys(ids))
    indices = np.random.default_rng(seed).permutation(len(prompts))[: round(fraction * len(prompts))]
    held_out = {prompts[i] for i in indices}
    side = np.array([prompt in held_out for prompt in ids], dtype=bool)
    return groups.select(groups.places[~side]), groups.select(groups.places[side])


def _total(readings: Sequence[Reading]) -> Reading:
    """What became of the rows of all sources together."""
    dropped: dict[str, int] = {}
    for reading in readings:
        for reason, count in reading.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    return Reading(
        sum(reading.num_rows for reading in readings),
        dropped,
        tuple(example for reading in readings for example in reading.examples),
        tuple(dict.fromkeys(name for reading in readings for name in reading.formats)),
        tuple(dict.fromkeys(note for reading in readings for note in reading.notes)),
        tuple(dict.fromkeys(line for reading in readings for line in reading.columns)),
    )
