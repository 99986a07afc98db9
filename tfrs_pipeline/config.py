"""The settings of a run; the text under each is its documentation, and its help as a flag."""

import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt

from tfrs_pipeline.data.schema import AskedBy, Exclude
from tfrs_pipeline.data.settings import DataConfig, SplitConfig
from tfrs_pipeline.evaluation.metrics import metric_of
from tfrs_pipeline.features.kinds import KINDS
from tfrs_pipeline.libraries import tomli_w
from tfrs_pipeline.messages import beside, suggest, suggest_part
from tfrs_pipeline.model.settings import TrainingSettings, TwoTowerSettings, check_examples
from tfrs_pipeline.presets import PRESETS, RecipeName
from tfrs_pipeline.settings import (
    Config,
    ConfigError,
    Distinct,
    Several,
    refuse,
    setting_names,
)

COMPARED_WITH = ("uncorrected", "popularity", "repeats", "transitions", "itemknn", "ease", "ials")
"""What every run is compared with, unless it is told otherwise; `uncorrected` is a model."""


def _read_duration(value: Any) -> Any:
    """Converts text such as 90s, 10m or 2h to seconds."""
    if not isinstance(value, str):
        return value
    duration = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", value.strip())
    if duration is None:
        raise ValueError("must be seconds, or a number with s, m or h, such as 10m")
    # Each unit is 60 of the one before it.
    return float(duration[1]) * 60.0 ** "smh".index(duration[2] or "s")


def _or_none(values: Any) -> Any:
    # The command line cannot give an empty list, so "none" stands for it.
    listed = values if isinstance(values, list | tuple) else [values]
    return () if listed and all(value == "none" for value in listed) else values


def _known_baseline(name: str) -> str:
    if name not in COMPARED_WITH:  # Only then, because the classes import libraries of logs.
        from tfrs_pipeline.evaluation.baselines import BASELINES

        if name not in BASELINES:
            raise ValueError(f"no baseline; {suggest_part(name, {*COMPARED_WITH, *BASELINES})}")
    return name


class EvaluationConfig(Config):
    """What is measured on the test, and the baselines to compare with."""

    by: AskedBy | None = None
    """The question that decides everything: the epoch, the race, the verdict and the export.
    requests asks at each request, with the history up to it, as in service; users asks once per
    user, with the history before the part, as for a daily mail. If not given, requests if
    the log has an order, else users."""
    cutoffs: Several[PositiveInt] = (20, 100)
    """Lengths of the ranking at which metrics are reported."""
    exclude: Exclude = "clicked"
    """What is excluded from a user's ranking, and from answers by user id: clicked items, all items
    shown, or none; disliked items always are."""
    max_users: PositiveInt = 100_000
    """Most users to measure, and most requests; sampled if the test has more."""
    baselines: Distinct[Annotated[str, AfterValidator(_known_baseline)]] = COMPARED_WITH
    """What the model is compared with in the same table: itself, trained without the correction;
    the most popular items (in a split by time of the latest clicks, a share that validation
    chooses); the user's own items again, if evaluation.exclude is none; what came next after the
    user's last two items, if the log has an order; ItemKNN; EASE; iALS."""


class ExportConfig(Config):
    """The model in service: its index and where it is saved."""

    name: str | None = None
    """Name of the model's folder; if not given, the name of the events' file or data source."""
    directory: Path = Path("saved_models")
    """Folder that holds the models, as DIRECTORY/NAME/VERSION."""
    index: Literal["auto", "scann", "exact", "none"] = "auto"
    """Search structure: ScaNN, exact search, or auto, which chooses by the size of the corpus; with
    none, nothing is exported."""
    target_recall: float = Field(0.98, gt=0, le=1)
    """Recall target: share of the exact top items that the ScaNN index must find."""
    filter_by: str | None = None
    """Item feature, categorical or multi_categorical, that requests may filter items by."""
    keep_versions: PositiveInt | None = None
    """How many versions to keep: the newest two, then the newest of each training, then further
    refreshes; the others are deleted. If not given, all."""
    gate: bool = False
    """Whether to export a model only if it is not worse than the version in service, beyond the 95%
    interval of training.monitor on the same test queries, asked as evaluation.by says."""
    if_beaten: bool = False
    """Whether to export a model that a baseline beats beyond the 95% interval of training.monitor
    on the test, asked as evaluation.by says, or that none could be compared with, because all
    failed."""
    user_data: bool = True
    """Whether the export holds personal data of the log: users' ids, histories and features, and
    held-out queries. Without it, every request must send the user's history."""

    def _problems(self) -> Iterator[tuple[str, str]]:
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            message = "must be letters, digits, '.', '_' and '-', a letter or digit first"
            yield "name", f"got {self.name!r}; {message}"


class CompareConfig(Config):
    """What `tfrs-pipeline compare` tries."""

    plans: Several[str] = (
        "mixed",
        "in_batch_uncorrected",
        "in_batch",
        "uniform",
        "popularity",
        "hybrid_0.01",
        "hybrid_0.05",
        "hybrid_0.2",
        "hybrid_0.5",
        "resampled_0.3",
        "resampled_0.6",
    )
    """Sampling plans to compare, the reference first. The names hold a number: hybrid_0.01 adds
    hard negatives that have 1% of the negatives' weight, exposed_0.01 takes items for them that
    were shown and not clicked (not among the defaults), and resampled_0.3 down-samples positives of
    popular items with exponent .3."""
    seeds: PositiveInt = 1
    """How many times each plan is trained, with the seeds seed, seed + 1 and so on, on the same
    data; plans are compared seed by seed. A finished comparison can be given more."""


class RunConfig(Config):
    """All settings of a run."""

    data: DataConfig = DataConfig()
    """Where events, items and users come from."""
    split: SplitConfig = SplitConfig()
    """Which events train the model, which choose its settings, which test it."""
    model: TwoTowerSettings = TwoTowerSettings()
    """The two towers, their score, and what their positives are compared with."""
    training: TrainingSettings = TrainingSettings()
    """How the model is fitted."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured on the test, and the baselines to compare with."""
    export: ExportConfig = ExportConfig()
    """The model in service: its index and where it is saved."""
    compare: CompareConfig = CompareConfig()
    """What `tfrs-pipeline compare` tries."""
    warm_start: Annotated[Path | None, BeforeValidator(lambda x: None if x == "none" else x)] = None
    """Finished run or exported model to start from. The command line takes its model, training,
    baselines, evaluation.exclude and evaluation.by, unless given, with a fifth of its epochs."""
    recipes: Annotated[Distinct[RecipeName], BeforeValidator(_or_none)] = ()
    """Recipes that race on validation. On your own log, all race unless a preset is given."""
    fixed: Distinct[str] = ()
    """Settings, by dotted name, that neither a recipe nor the run of `warm_start` replaces: the
    command line lists those of its flags, file and preset. Without any, a warm start replaces
    none."""
    members: int = Field(5, ge=1)
    """Most models summed; 1 keeps the winner."""
    budget: Annotated[PositiveFloat, BeforeValidator(_read_duration)] = 600.0
    """CPU time of a race's epochs, such as 2h; the winner's last ones come on top."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random in the run."""

    def _problems(self) -> Iterator[tuple[str, str]]:
        data, model, training, export = self.data, self.model, self.training, self.export
        cutoffs = list(self.evaluation.cutoffs)
        kinds = [name for name, kind in KINDS.items() if kind.holds_categories]
        is_filterable = data.item_features.get(export.filter_by or "") in kinds
        of_query = data.user_features or data.request_features
        reads_query = model.use_user_id or model.history_pooling or of_query
        rows: list[tuple[Any, str, str]] = [
            (self.split.kind == "column" and data.source == "movielens-100k", "split.kind",
             "got 'column' with source 'movielens-100k', whose log has no column part; choose "
             "another kind"),
            (0 in (self.split.validation, self.split.test), "split",
             "got 0 for a part: a run chooses its model on validation and measures it on the test"),
            (export.gate and export.index == "none", "export.gate",
             "got true with export.index 'none', which exports nothing"),
            (model.use_user_id and not export.user_data and export.index != "none",
             "export.user_data",
             "got false with model.use_user_id, whose embedding of each user is user data"),
            (not data.is_ordered and training.examples == "sequences", "training.examples",
             "got 'sequences' with data.is_ordered false: set that to true, as suits a log with "
             "timestamps too, or take --preset sets for a log without an order"),
            (bool(self.recipes) and self.warm_start is not None, "recipes",
             "got some with warm_start, which continues the model of another run: leave out one "
             "of the two"),
            (data.request_features and training.examples == "sets", "data.request_features",
             f"got {', '.join(data.request_features)} with training.examples 'sets', which "
             "gives a query the positives of many requests: train 'single' or 'sequences'"),
            (metric_of(training.monitor).k not in cutoffs, "training.monitor",
             f"got {training.monitor!r}; evaluation.cutoffs are {cutoffs}: add its cutoff, or take "
             "one of these"),
            (export.filter_by is not None and not is_filterable, "export.filter_by",
             f"got {export.filter_by!r}, which is no item feature of kind {' or '.join(kinds)}; "
             f"data.item_features has {', '.join(data.item_features) or 'none'}"),
            (not reads_query, "model",
             "the query tower reads nothing: set use_user_id, history_pooling, user_features or "
             "request_features"),
            (not (model.use_candidate_id or data.item_features), "model",
             "the candidate tower reads nothing: set use_candidate_id or item_features"),
        ]  # fmt: skip
        yield from ((setting, message) for is_wrong, setting, message in rows if is_wrong)
        yield from check_examples(model, training)

    @property
    def model_name(self) -> str:
        """Name of the model's folder: letters, digits, '.', '_' and '-'."""
        if self.export.name is not None:
            return self.export.name
        name = self.data.source if self.data.path is None else self.data.path.stem
        return re.sub(r"^[._-]+|-+$", "", re.sub(r"[^A-Za-z0-9._-]+", "-", name))

    @property
    def model_folder(self) -> Path:
        """Folder of the model's versions."""
        return self.export.directory / self.model_name


def movielens_config() -> RunConfig:
    """Returns the settings of the main job: MovieLens-100K, served by ScaNN."""
    from tfrs_pipeline.sources.movielens import ITEM_FEATURES, USER_FEATURES

    return RunConfig(
        data=DataConfig(item_features=dict(ITEM_FEATURES), user_features=dict(USER_FEATURES)),
        # The published protocol, which asks once per user.
        split=SplitConfig(kind="last_share", validation=0.1, test=0.2),
        evaluation=EvaluationConfig(by="users"),
        export=ExportConfig(name="movielens-100k", index="scann", filter_by="genres"),
    )


def load_config(path: Path | str) -> RunConfig:
    """Reads settings from a TOML file with a table for each stage; absent ones are the defaults.

    Raises a `ConfigError`, a line for each problem, if the file cannot be read or used.
    """
    try:
        # Some editors begin a file with a byte order mark, which TOML does not allow.
        settings = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not settings:  # Usually the disk was full. The defaults would make another run.
            refuse([("", "holds no setting: it is cut, or not a config of a run; write it again")])
        return RunConfig(**settings)
    except ConfigError as error:
        problems = error.problems
    except OSError as error:
        near = beside(Path(path), lambda x: x.suffix == ".toml" and x.name != Path(path).name)
        problems = (("", f"cannot be read: {error.strerror}{near and f'.{near}'}"),)
    except ValueError as error:  # Not UTF-8, or not TOML: its message holds line and column.
        problems = (("", f"is not a TOML file: {error}"),)
    raise ConfigError(problems, str(path))


def flat_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested tables of settings, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = flat_settings(value, f"{prefix}{name}.") if isinstance(value, Mapping) else None
        flat |= inner or {f"{prefix}{name}": value}
    return flat


def dump_config(config: RunConfig) -> str:
    """Writes settings as TOML that `load_config` reads back equal.

    TOML has no null: only settings that are None are omitted.
    """
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def dump_changes(config: RunConfig) -> str:
    """Writes the settings that are not the defaults, in the form of `dump_config`."""
    configs = config, RunConfig()
    tables = (settings.model_dump(mode="json", exclude_none=True) for settings in configs)
    return tomli_w.dumps(_changed(*tables))


def _changed(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    # `model_dump(exclude_defaults=True)` would drop `kind`, so it could not be read back.
    changed = {name: value for name, value in settings.items() if value != usual.get(name)}
    for name, value in changed.items():  # Of a table, only what differs within it.
        if isinstance(value, Mapping) and isinstance(usual.get(name), Mapping):
            changed[name] = _changed(value, usual[name])
    return changed


def with_settings(
    config: RunConfig,
    settings: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    fixed: Collection[str] = (),
) -> RunConfig:
    """Returns the settings with some of them replaced, checked as a whole.

    `settings` are new values by dotted name; those of the `preset` are set first. Those that are
    `fixed` keep their values, as do all settings of a fixed table. Raises a `ConfigError` if a name
    is unknown, or a value cannot be used.

    Example:
        >>> config = with_settings(RunConfig(), {"training.batch_size": 512, "seed": 7})
        >>> config.training.batch_size, config.training.max_epochs, config.seed
        (512, 30, 7)
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError([("preset", f"unknown preset {preset!r}; {suggest(preset, PRESETS)}")])
    kept = tuple(f"{name}." for name in fixed)
    settings = {**(PRESETS[preset].settings if preset else {}), **(settings or {})}
    settings = {name: value for name, value in settings.items() if not f"{name}.".startswith(kept)}
    tree = config.model_dump()  # Replaced in a dictionary: two settings may only fit together.
    if settings.get("data.path") and config.data.path is None and "data.source" not in settings:
        del tree["data"]["source"]  # The path decides the source.
    for name, value in settings.items():
        *tables, setting = name.split(".")
        table = tree
        for key in tables:
            if not isinstance(table.get(key), dict):
                known = setting_names(RunConfig)
                raise ConfigError([(name, f"unknown setting; {suggest(name, known)}")])
            table = table[key]
        table[setting] = value
    return RunConfig(**tree)
