"""Settings: which are refused, with what message, and that a file reads back as written."""

import re
import tomllib
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tfrs_pipeline as tp
from tfrs_pipeline import dump_config, load_config, movielens_config, with_settings
from tfrs_pipeline.config import Config, ConfigError, EvaluationConfig, ExportConfig, RunConfig
from tfrs_pipeline.data.schema import Stage
from tfrs_pipeline.data.settings import SplitConfig, StageName
from tfrs_pipeline.model.settings import TrainingSettings, TwoTowerSettings
from tfrs_pipeline.presets import PRESETS
from tfrs_pipeline.settings import tables_in


def tables(table: type[Config]) -> Iterator[type[Config]]:
    yield table
    for inner in tables_in(table).values():
        yield from tables(inner)


FIELDS = [(table, name) for table in tables(RunConfig) for name in table.model_fields]


def load(folder: Path, text: str) -> RunConfig:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8", newline="")
    return load_config(path)


def problems(table: type[Config], **settings: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as raised:
        table(**settings)
    return dict(raised.value.problems)


# Files


def test_a_file_sets_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    assert load(tmp_path, "seed = 0") == RunConfig()
    kinds = '{kind = "popularity", alpha = 1.0, num = 7}, "uniform:num=5", "in_batch"'
    text = f'model.negatives = [{kinds}]\ndata.path = "clicks.csv"\ntraining.batch_size = 512'
    assert load(tmp_path, text) == RunConfig(
        training={"batch_size": 512},
        model={"negatives": (tp.Popularity(7, 1.0), tp.Uniform(5), tp.InBatch())},
        data={"source": "files", "path": Path("clicks.csv")},
    )


def test_a_file_names_itself_and_every_problem_in_a_line_each(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load(
            tmp_path,
            'sed = 1\nmodel.negatives = ["in_batch", {kind = "popularity", alpah = 1}, "unifrm"]\n'
            '[training]\nlearning_rte = 1\npatience = 0\noptimizer = "sgd"\n',
        )
    first, *lines = str(raised.value).splitlines()
    assert first == f"{tmp_path / 'run.toml'}:"
    assert {line.strip() for line in lines} == {
        "sed: unknown setting; did you mean 'seed'?",
        "model.negatives.1.popularity.alpah: unknown setting; did you mean 'alpha'?",
        "model.negatives: unknown kind 'unifrm'; did you mean 'uniform'?",
        "training.learning_rte: unknown setting; did you mean 'training.learning_rate'?",
        "training.patience: got 0; must be greater than 0",
        "training.optimizer: got 'sgd'; must be 'adagrad', 'adam' or 'lazy_adam'",
    }


@pytest.mark.parametrize(("content", "message"), [
    (b"seed = ", "is not a TOML file: Invalid value"),
    (b"seed = 1\nseed = 2\n", "is not a TOML file: .*line 2"),
    (b"name = '\xff'", "is not a TOML file: .*utf-8"),
    (b"training = 3", "training: got 3; must be a table of settings"),
    (b"", "holds no setting"),
    (None, "cannot be read: No such file"),
])  # fmt: skip
def test_a_wrong_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"(?s)^{re.escape(str(path))}:.*{message}"):
        load_config(path)


def test_a_dump_holds_every_setting_but_those_that_are_none() -> None:
    config = movielens_config()
    for name, settings in tomllib.loads(dump_config(config)).items():
        table = getattr(config, name)
        if isinstance(table, Config):
            assert set(settings) == {key for key, value in table if value is not None}


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=10)
ZONES = st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))])
HARD = [None, tp.FunnelLosers(stages=("ranked",), bottom_share=0.3)]


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    test_start = draw(st.datetimes(datetime(2001, 1, 1), datetime(2030, 1, 1), timezones=ZONES))
    earlier = timedelta(microseconds=draw(st.integers(1, 10**15)))
    numbers = st.floats(1e-9, 1e9)
    data: dict[str, Any] = {"items_path": Path("items"), "list_separator": draw(TEXT)}
    data["path"] = Path(draw(st.from_regex(r"[a-zé ]{1,9}/[a-z\"'\\]{1,9}", fullmatch=True)))
    for name, kinds in (("stage_values", "exposed clicked"), ("item_features", "text numeric")):
        data[name] = draw(st.dictionaries(TEXT, st.sampled_from(kinds.split())))
    data["columns"] = draw(st.dictionaries(st.sampled_from(["user_id", "item_id"]), TEXT))
    easy = draw(st.lists(st.builds(tp.Popularity, st.integers(1, 10**9), numbers)))
    model = {"negatives": easy, "hard": draw(st.sampled_from(HARD)), "temperature": draw(numbers)}
    split = {"kind": "time", "test": test_start, "validation": test_start - earlier}
    return RunConfig(data=data, model=model, split=split, seed=draw(st.integers(0, 2**31 - 1)))


@given(configs())
def test_configs_survive_files(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> None:
    assert load(tmp_path_factory.mktemp("config"), dump_config(config)) == config


# Every field


def test_a_run_has_few_settings() -> None:
    assert set(get_args(StageName)) == {stage.value for stage in Stage}
    num_tables = sum(len(tables_in(table)) for table in tables(RunConfig))
    assert len(FIELDS) - num_tables <= 88


def test_a_field_has_a_sentence_for_the_help_a_default_and_a_number_its_range() -> None:
    for table, name in FIELDS:
        field = table.model_fields[name]
        assert re.fullmatch(r"[^ ]((?!  ).)*\.", field.description or ""), (table, name)
        assert not field.is_required(), (table, name)
        kinds = {field.annotation, *get_args(field.annotation)}
        # TOML has no null, so that None is written by omitting the setting.
        assert type(None) not in kinds or field.default is None, (table, name)
        if {int, float} & kinds:
            for value in (-1, float("nan"), float("inf"), "many"):
                if name != "rating_threshold" or value != -1:
                    assert name in problems(table, **{name: value}), (table, name, value)


@pytest.mark.parametrize(("table", "name", "refused", "allowed"), [
    (TwoTowerSettings, "temperature", [0], [1e-9]),
    (TwoTowerSettings, "history_dropout", [1], [0]),
    (TwoTowerSettings, "recency_decay", [0, 1.01], [1]),
    (TwoTowerSettings, "history_shrinkage", [-1, float("inf"), float("nan")], [None, 0, 1e-9]),
    (TwoTowerSettings, "hidden_layers", [[64, 0]], [[]]),
    (SplitConfig, "test", [1.5, -1], [0, 0.5, 1, 2]),
    (TrainingSettings, "batch_size", [1], [2]),
    (TrainingSettings, "monitor", ["ndcg", "ndcg@0", "loss@10"], ["recall@5"]),
    (EvaluationConfig, "cutoffs", [[], [20, 20]], [[20]]),
    (EvaluationConfig, "baselines", [["ease", "ease"]], [[]]),
    (ExportConfig, "target_recall", [1.5], [1]),
    (ExportConfig, "name", ["../elsewhere", ""], ["films-2.1"]),
    (RunConfig, "seed", [2**31], [2**31 - 1]),
])  # fmt: skip
def test_the_ends_of_a_range(table: type[Config], name: str, refused: Any, allowed: Any) -> None:
    for value in refused:
        (setting,) = problems(table, **{name: value})
        assert setting.split(".")[0] == name
    for value in allowed:
        table(**{name: value})


# Settings that ask for each other

FILES = {"data.path": "x.csv"}
SPARK = {"data.source": "spark", "data.path": "shop.events"}
FIRST, SECOND = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 2, 1, tzinfo=UTC)
STARTS = {"split.validation": FIRST, "split.test": SECOND}
SEQUENCES = PRESETS["sequence"].settings
FEATURES = {"data.item_features": {"title": "text", "year": "categorical"}}
FEATURES |= {"data.user_features": {"age": "numeric"}}
BLIND = {"model.history_pooling": (), "model.use_candidate_id": False}


@pytest.mark.parametrize(("fitting", "changed", "setting", "message"), [
    (FILES, {"data.path": None}, "data.path", "required"),
    (SPARK, {"data.path": None}, "data.path", "name of the table"),
    (SPARK, {"data.columns": {"user_id": "x"}}, "data.columns", "no effect"),
    (SPARK, {"data.event_weights": {"buy": 5}}, "data.event_weights",
     "only with 'files': a table has its stages and weights"),
    (FILES, {"data.memory_limit": "lots"}, "data.memory_limit", "pattern"),
    (FILES, {"data.item_features": {"t": "text"}}, "data.items_path", "required"),
    (FILES, {"data.user_features": {"t": "text"}}, "data.users_path", "required"),
    # Settings that decide which events are positives; harmless ones are accepted.
    ({}, {"data.rating_threshold": 4}, "data.rating_threshold", "no effect with source 'movie"),
    ({}, {"data.label": {"like": 1}}, "data.label", "no effect"),
    (SPARK, {"data.stage_values": {"x": "exposed"}}, "data.stage_values", "no effect"),
    # Also refused: tables that would not be read, and rules by which no event would be dropped.
    ({}, {"data.items_path": "items.csv"}, "data.items_path", "only with 'files' or 'spark'"),
    (FILES | {"data.unknown_items": "drop"}, {"data.source": "movielens-100k"},
     "data.unknown_items", "no effect"),
    (FILES | {"data.duplicates": "drop"},
     {"data.source": "movielens-100k"}, "data.duplicates", "no effect"),
    ({}, {"data.earliest_time": datetime(2022, 4, 8)}, "data.earliest_time", "no effect"),
    ({}, {"data.columns": {"user_id": "x"}}, "data.columns", "no effect with source 'movie"),
    (FILES, {"data.columns": {"user": "x"}}, "data.columns.user", "did you mean 'user_id'"),
    (FILES, {"data.stage_values": {"x": "shown"}}, "data.stage_values.x", "'clicked' or"),
    ({}, {"data.item_features": {"x": "string"}}, "data.item_features.x", "known: .*, categorical"),
    (FILES, {"data.time_zone": "Europe/Pari"}, "data.time_zone", "did you mean 'Europe/Paris'"),
    ({}, {"split.kind": "column"}, "split.kind", "no column part"),
    (FILES | {"split.test": 0.2}, {"split.kind": "column"}, "split.test", "the log's own"),
    ({"split.test": 0.2}, {"split.validation": 0}, "split", "chooses its model on validation"),
    (STARTS, {"split.test": None}, "split", "for both"),
    (STARTS, {"split.kind": "last_n"}, "split.test", "only with 'time'"),
    (STARTS, {"split.test": datetime(2024, 2, 1)}, "split.test", "write 2024-02-01T00:00:00Z"),
    (STARTS, {"split.test": date(2024, 2, 1)}, "split.test", "write 2024-02-01T00:00:00Z"),
    ({"split.kind": "last_n"}, {"split.test": True}, "split.test", "got True; must be a share"),
    ({}, {"model.hard": {"kind": "funnel", "stages": ["exposed"]}}, "model.hard",
     "never a negative.*allow_exposed"),
    (SEQUENCES, {"model.negatives": ["in_batch"]}, "model.negatives", "alpha=1"),
    (SEQUENCES, {"training.batch_size": 64}, "training.batch_size", "must be 402 or more"),
    (SEQUENCES, {"data.is_ordered": False}, "training.examples",
     "with data.is_ordered false: set that to true.* or take --preset sets"),
    (FEATURES | BLIND, {"data.item_features": {}}, "model", "candidate tower reads nothing"),
    (FEATURES | BLIND, {"data.user_features": {}}, "model", "query tower reads nothing"),
    (FEATURES, {"export.filter_by": "title"}, "export.filter_by", "got 'title'.*title, year"),
    ({"model.use_user_id": True}, {"export.user_data": False}, "export.user_data",
     "each user is user data"),
    ({}, {"model.hard": "funnel:num=-5"}, "model.hard.num", "greater than 0"),
    ({}, {"model.hard": "funnel:num=1:num=2"}, "model.hard", "sets num twice"),
    ({"export.index": "none"}, {"export.gate": True}, "export.gate", "which exports nothing"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(
    fitting: dict[str, Any], changed: dict[str, Any], setting: str, message: str
) -> None:
    config = with_settings(RunConfig(), fitting)
    with pytest.raises(ConfigError) as raised:
        with_settings(config, changed)
    found = [text for name, text in raised.value.problems if name == setting]
    assert found, raised.value
    assert re.search(message, found[0])


# Frozen, replaced


def test_replaced_settings_are_checked() -> None:
    base = movielens_config()
    changed = with_settings(base, {"training.max_epochs": 2, "model.hidden_layers": [8]})
    assert (changed.training.max_epochs, changed.model.hidden_layers) == (2, (8,))
    assert (changed.data, base) == (base.data, movielens_config())
    with pytest.raises(ValueError, match="frozen"):
        base.seed = 1
    with pytest.raises(ConfigError, match="must be greater than 0"):
        with_settings(base, {"training.max_epochs": 0})
    for name in ("training.max_epoch", "train.max_epochs", "seed.max_epochs"):
        with pytest.raises(ConfigError, match=r"did you mean 'training\.max_epochs'"):
            with_settings(base, {name: 2})


@pytest.mark.parametrize(("fixed", "dim", "max_epochs"), [
    ([], 16, 3), (["model.dim"], 64, 3), (["training"], 16, 30), (["model.di", "train"], 16, 3),
])  # fmt: skip
def test_a_setting_that_is_fixed_keeps_its_value_and_so_does_its_table(
    fixed: list[str], dim: int, max_epochs: int
) -> None:
    changed = with_settings(RunConfig(), {"model.dim": 16, "training.max_epochs": 3}, fixed=fixed)
    assert (changed.model.dim, changed.training.max_epochs) == (dim, max_epochs)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_goes_with_the_main_job_and_with_clicks(tmp_path: Path, name: str) -> None:
    for base in (movielens_config(), with_settings(RunConfig(), FILES)):
        config = with_settings(base, preset=name)
        assert (config != base) == (name != "default")  # It stands for the settings as they are.
        assert load(tmp_path, dump_config(config)) == config
        assert with_settings(config, preset=name) == config
        assert config.data.path == base.data.path
        assert with_settings(base, {"seed": 9}, preset=name) == with_settings(config, {"seed": 9})
    with pytest.raises(ConfigError, match=f"did you mean '{name}'"):
        with_settings(base, preset=name + "s")


def test_a_model_is_named_by_its_file_so_that_it_can_be_loaded() -> None:
    names = {"logs/shop.csv": "shop", "logs/log[1].csv": "log-1", "a b/Ж 7.parquet": "7"}
    for path, name in {**names, "-v1.2_x.csv": "v1.2_x", ".hidden": "hidden"}.items():
        config = RunConfig(data={"path": path})
        assert (config.data.source, config.model_name) == ("files", name)
        ExportConfig(name=name)
    assert with_settings(config, {"export.name": "mine"}).model_name == "mine"
