"""Settings: what is refused, how it is said, and that a file gives back what was written."""

import json
import re
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, get_args

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfrs_pipeline import run as pipeline
from tfrs_pipeline.config import (
    RUN_PRESETS,
    Config,
    ConfigError,
    DataConfig,
    EasySampler,
    EvaluationConfig,
    ExportConfig,
    ModelConfig,
    RunConfig,
    SamplesConfig,
    SplitConfig,
    StageName,
    TrainingConfig,
    check_model_name,
    dump_config,
    load_config,
    main_job_config,
    with_settings,
)
from tfrs_pipeline.data.schema import Stage

TABLES: list[type[Config]] = [
    DataConfig,
    SplitConfig,
    EasySampler,
    SamplesConfig,
    ModelConfig,
    TrainingConfig,
    EvaluationConfig,
    ExportConfig,
    RunConfig,
]
FIELDS = [(table, name) for table in TABLES for name in table.model_fields]


def load(folder: Path, text: str) -> RunConfig:
    path = folder / "run.toml"
    path.write_text(text)
    return load_config(path)


def problems(table: type[Config], **settings: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as raised:
        table(**settings)
    return dict(raised.value.problems)


# Files


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == RunConfig()


def test_a_file_sets_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        seed = 3
        [training]
        batch_size = 512
        [samples]
        easy_negatives = [{alpha = 1.0, num = 7}]
        [data]
        source = "clicks"
        path = "clicks.csv"
        columns = {user_id = "viewer"}
        items_path = "items.csv"
        item_features = {title = "text"}
        """,
    )
    assert config.seed == 3
    assert config.training == TrainingConfig(batch_size=512)
    assert config.samples.easy_negatives == (EasySampler(alpha=1.0, num=7),)
    assert config.data.path == Path("clicks.csv")
    assert config.data.columns == {"user_id": "viewer"}
    assert config.model == ModelConfig()


def test_a_file_names_itself_and_every_problem_in_a_line_each(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, 'sed = 1\n[training]\nlearning_rte = 1\npatience = 0\noptimizer = "sgd"\n')
    first, *lines = str(raised.value).splitlines()
    assert first == f"{tmp_path / 'run.toml'}:"
    assert {line.strip() for line in lines} == {
        "sed: unknown setting; did you mean 'seed'?",
        "training.learning_rte: unknown setting; did you mean 'learning_rate'?",
        "training.patience: got 0; must be greater than 0",
        "training.optimizer: got 'sgd'; must be 'adagrad', 'adam' or 'lazy_adam'",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed = ", "is not a TOML file: Invalid value"),
        (b"seed = 1\nseed = 2\n", "is not a TOML file: .*line 2"),
        (b"name = '\xff'", "is not a TOML file: .*utf-8"),
        (b"training = 3", "training: got 3; must be a table of settings"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"(?s)^{re.escape(str(path))}:.*{message}"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)nowhere\.toml:.*No such file"):
        load_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("config", [RunConfig(), main_job_config()])
def test_a_dump_loads_back_equal(tmp_path: Path, config: RunConfig) -> None:
    assert load(tmp_path, dump_config(config)) == config


def test_a_dump_holds_every_setting_but_those_that_are_none() -> None:
    def names(tree: dict[str, Any]) -> Iterator[str]:
        for name, value in tree.items():
            yield name
            if isinstance(value, dict):
                yield from (f"{name}.{inner}" for inner in names(value))

    dumped = set(names(tomllib.loads(dump_config(main_job_config()))))
    for name, table in [
        (name, getattr(main_job_config(), name)) for name in RunConfig.model_fields
    ]:
        if isinstance(table, Config):
            for setting in type(table).model_fields:
                is_left_out = f"{name}.{setting}" not in dumped
                assert is_left_out == (getattr(table, setting) is None), setting


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=10)
ZONES = st.sampled_from(
    [UTC, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(hours=-8))]
)


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    test_start = draw(st.datetimes(datetime(2001, 1, 1), datetime(2030, 1, 1), timezones=ZONES))
    numbers = st.floats(1e-9, 1e9)
    return RunConfig(
        data=DataConfig(
            source="events",
            path=Path(draw(st.from_regex(r"[a-zé ]{1,9}/[a-z\"'\\]{1,9}", fullmatch=True))),
            columns=draw(st.dictionaries(st.sampled_from(["user_id", "item_id"]), TEXT)),
            stage_values=draw(st.dictionaries(TEXT, st.sampled_from(["exposed", "clicked"]))),
            item_features=draw(st.dictionaries(TEXT, st.sampled_from(["text", "numeric"]))),
            items_path=Path("items"),
            list_separator=draw(TEXT),
        ),
        split=SplitConfig(
            kind="time",
            test_start=test_start,
            validation_start=test_start - timedelta(microseconds=draw(st.integers(1, 10**15))),
        ),
        samples=SamplesConfig(
            easy_negatives=tuple(
                EasySampler(alpha=alpha, num=num)
                for alpha, num in draw(st.lists(st.tuples(numbers, st.integers(1, 10**9))))
            )
        ),
        model=ModelConfig(temperature=draw(numbers), query_layers=()),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@given(configs())
def test_any_config_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, config: RunConfig
) -> None:
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(dump_config(config), encoding="utf-8", newline="")
    assert load_config(path) == config


# Every field


def test_a_field_has_a_sentence_for_the_help_and_a_default() -> None:
    for table, name in FIELDS:
        field = table.model_fields[name]
        assert re.fullmatch(r"[^ ].*\.", field.description or ""), (table, name)
        assert "  " not in str(field.description), (table, name)
        assert not field.is_required(), (table, name)
        # TOML has no null, so that None is written by leaving the setting out.
        if type(None) in get_args(field.annotation):
            assert field.default is None, (table, name)


def test_a_number_has_a_range() -> None:
    for table, name in FIELDS:
        annotation = table.model_fields[name].annotation
        if not {int, float} & {annotation, *get_args(annotation)}:
            continue
        for value in (-1, float("nan"), float("inf"), "many"):
            if name != "rating_threshold" or value != -1:
                assert name in problems(table, **{name: value}), (table, name, value)


@pytest.mark.parametrize(
    ("table", "name", "refused", "allowed"),
    [
        (ModelConfig, "temperature", [0], [1e-9]),
        (ModelConfig, "history_dropout", [1], [0]),
        (ModelConfig, "recency_decay", [0, 1.01], [1]),
        (ModelConfig, "query_layers", [[64, 0]], [[]]),
        (SplitConfig, "test_share", [0, 1], [0.5]),
        (TrainingConfig, "batch_size", [1], [2]),
        (TrainingConfig, "monitor", ["ndcg", "ndcg@0", "loss@10"], ["recall@5"]),
        (EvaluationConfig, "cutoffs", [[], [20, 20]], [[20]]),
        (EvaluationConfig, "baselines", [["ease", "ease"]], [[]]),
        (ExportConfig, "target_recall", [1.5], [1]),
        (ExportConfig, "name", ["../elsewhere", ""], ["films-2.1"]),
        (RunConfig, "seed", [2**31], [2**31 - 1]),
    ],
)
def test_the_ends_of_a_range(
    table: type[Config], name: str, refused: list[Any], allowed: list[Any]
) -> None:
    for value in refused:
        (setting,) = problems(table, **{name: value})
        assert setting.split(".")[0] == name
    for value in allowed:
        table(**{name: value})


# Unknown settings


@pytest.mark.parametrize(
    ("table", "name", "message"),
    [
        (TrainingConfig, "learning_rte", "did you mean 'learning_rate'?"),
        (RunConfig, "batch_size", "did you mean 'training.batch_size'?"),
        (RunConfig, "trainig", "did you mean 'training'?"),
        (EasySampler, "zzz", "known: alpha, num"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest(
    table: type[Config], name: str, message: str
) -> None:
    assert problems(table, **{name: 1}) == {name: f"unknown setting; {message}"}


def test_a_problem_within_a_list_of_tables_has_its_place() -> None:
    found = problems(RunConfig, samples={"easy_negatives": [{"alpha": 1}, {"alpah": 1}]})
    assert found == {
        "samples.easy_negatives.1.alpah": "unknown setting; did you mean 'alpha'?",
    }


# Settings that ask for each other


def test_files_need_a_path_and_ratings_a_threshold() -> None:
    assert set(problems(DataConfig, source="ratings")) == {"path", "rating_threshold"}
    assert set(problems(DataConfig, source="events")) == {"path"}
    DataConfig(source="ratings", path="ratings.csv", rating_threshold=4)


def test_features_need_the_file_that_holds_them() -> None:
    features = {"item_features": {"title": "text"}, "user_features": {"gender": "categorical"}}
    found = problems(DataConfig, source="clicks", path="x.csv", **features)
    assert set(found) == {"items_path", "users_path"}
    DataConfig(**features)
    DataConfig(source="clicks", path="x", items_path="y", users_path="z", **features)


def test_what_decides_the_positives_is_refused_where_it_would_not() -> None:
    for source, settings in (
        ("clicks", {"rating_threshold": 4}),
        ("clicks", {"stage_values": {"view": "exposed"}}),
        ("ratings", {"rating_threshold": 4, "label": {"is_click": 1}}),
        ("movielens-100k", {"label": {"is_click": 1}}),
    ):
        found = problems(DataConfig, source=source, path="x", **settings)
        assert list(found) == [list(settings)[-1]]
        assert "has no effect with source" in found[list(settings)[-1]]
    # What is harmless is let be.
    DataConfig(columns={"user_id": "viewer"}, time_zone="UTC", unknown_items="drop")


@pytest.mark.parametrize("source", ["kuairand", "recflow"])
def test_a_published_log_needs_its_folder_and_no_other_file(source: str) -> None:
    assert set(problems(DataConfig, source=source)) == {"path"}
    settings = {"label": {"long_view": 1}, "duplicates": "drop"}
    features = {"item_features": {"author_id": "categorical"}, "user_features": {"age": "numeric"}}
    DataConfig(source=source, path="folder", **settings, **features)


def test_a_split_by_column_needs_a_log_that_may_have_it() -> None:
    split = SplitConfig(kind="column")
    for source in ("events", "clicks", "kuairand"):
        RunConfig(data=DataConfig(source=source, path="x"), split=split)
    for data in (DataConfig(), DataConfig(source="recflow", path="x")):
        found = problems(RunConfig, data=data, split=split)
        assert set(found) == {"split.kind"}
        assert "no column part" in found["split.kind"]


def test_columns_are_named_as_the_package_names_them() -> None:
    found = problems(DataConfig, source="clicks", path="x.csv", columns={"user": "viewer"})
    assert found == {"columns.user": "unknown column; did you mean 'user_id'?"}


def test_a_stage_and_a_feature_kind_are_known_ones() -> None:
    settings = {"stage_values": {"view": "shown"}, "item_features": {"title": "string"}}
    found = problems(DataConfig, source="events", path="x.csv", items_path="y.csv", **settings)
    assert set(found) == {"stage_values.view", "item_features.title"}


def test_a_time_zone_exists() -> None:
    found = problems(DataConfig, source="clicks", path="x.csv", time_zone="Europe/Pari")
    assert found == {"time_zone": "unknown time zone 'Europe/Pari'; did you mean 'Europe/Paris'?"}


def test_starts_of_a_split_by_time() -> None:
    early, late = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 2, 1, tzinfo=UTC)
    SplitConfig(kind="time", validation_start=early, test_start=late)
    assert "test_start" in problems(
        SplitConfig, kind="time", validation_start=late, test_start=early
    )
    assert "" in problems(SplitConfig, kind="time", test_start=late)
    assert set(problems(SplitConfig, validation_start=early, test_start=late)) == {
        "validation_start",
        "test_start",
    }


def test_a_start_without_time_zone_is_refused(tmp_path: Path) -> None:
    starts = "validation_start = 2024-01-01\ntest_start = 2024-02-01T00:00:00Z"
    with pytest.raises(ConfigError, match="write 2024-01-01T00:00:00Z if it is UTC"):
        load(tmp_path, f'[split]\nkind = "time"\n{starts}')


def test_shares_leave_something_to_train_on() -> None:
    assert "sum to less than 1" in problems(SplitConfig, test_share=0.5, validation_share=0.5)[""]


def test_there_are_negatives() -> None:
    assert "no negatives" in problems(SamplesConfig, in_batch=False, easy_negatives=())[""]
    SamplesConfig(in_batch=True, easy_negatives=())
    SamplesConfig(in_batch=False)


def test_the_default_mixture_can_draw_every_item() -> None:
    assert any(sampler.alpha == 0 for sampler in SamplesConfig().easy_negatives)


def test_each_tower_reads_something() -> None:
    blind = {"history_pooling": (), "use_candidate_id": False}
    lines = [message for _, message in _all_problems(RunConfig, model=blind)]
    assert [line.split(":")[0] for line in lines] == [
        "the query tower reads nothing",
        "the candidate tower reads nothing",
    ]
    features = {"item_features": {"title": "text"}, "user_features": {"gender": "categorical"}}
    RunConfig(model=blind, data=features)


def _all_problems(table: type[Config], **settings: Any) -> tuple[tuple[str, str], ...]:
    with pytest.raises(ConfigError) as raised:
        table(**settings)
    return raised.value.problems


# Frozen, replaced


def test_settings_do_not_change() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        RunConfig().seed = 1  # type: ignore[misc]
    assert RunConfig() == RunConfig()


def test_replaced_settings_are_checked() -> None:
    base = main_job_config()
    changed = with_settings(base, {"training.max_epochs": 2, "samples.easy_negatives": []})
    assert changed.training.max_epochs == 2
    assert changed.samples.easy_negatives == ()
    assert changed.data == base.data
    assert base == main_job_config()
    for name, value, message in [
        ("training.max_epochs", 0, "must be greater than 0"),
        ("training.max_epoch", 2, "did you mean 'max_epochs'"),
        ("train.max_epochs", 2, "did you mean 'training.max_epochs'"),
        ("seed.max_epochs", 2, "did you mean 'training.max_epochs'"),
        ("export.index", "faiss", "must be 'auto', 'scann' or 'exact'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            with_settings(base, {name: value})


def test_the_main_job_is_movielens_served_by_scann() -> None:
    config = main_job_config()
    assert config.data.source == "movielens-100k"
    assert config.data.item_features == {
        "title": "text",
        "year": "categorical",
        "genres": "multi_categorical",
    }
    assert config.export.index == "scann"
    assert config.model_name == "movielens-100k"


# Names of models


def of_clicks(path: str, **export: Any) -> RunConfig:
    return RunConfig(data={"source": "clicks", "path": path}, export=export)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("logs/shop.csv", "shop"),
        ("logs/log[1].csv", "log-1"),
        ("a b/Ж 7.parquet", "7"),
        ("-v1.2_x.csv", "v1.2_x"),
        (".hidden", "hidden"),
    ],
)
def test_a_model_is_named_by_its_file_so_that_it_can_be_loaded(path: str, name: str) -> None:
    assert of_clicks(path).model_name == name
    ExportConfig(name=name)
    assert of_clicks(path, name="mine").model_name == "mine"


def test_a_name_is_not_taken_from_a_model_of_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = Path("saved_models/log/1/manifest.json")
    written.parent.mkdir(parents=True)
    config = of_clicks("a/log.csv").model_dump(mode="json")
    written.write_text(json.dumps({"config": config}))
    for same in ("a/log.csv", tmp_path / "a" / "log.csv", "b/../a/log.csv"):
        check_model_name(of_clicks(str(same)))
    check_model_name(of_clicks("b/log.csv", name="log"))
    with pytest.raises(ConfigError, match=r"^export.name: .*log/1 is a model of a/log.csv: set"):
        check_model_name(of_clicks("b/log.csv"))
    with pytest.raises(ConfigError, match=r"^export.name: required: no letter or digit"):
        check_model_name(of_clicks("журнал.csv"))
    with pytest.raises(ConfigError, match="log/1"):
        pipeline.run(of_clicks("b/log.csv"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stages_are_those_of_the_event_table() -> None:
    assert set(get_args(StageName)) == {stage.value for stage in Stage}


def test_a_preset_sets_the_hard_share_and_a_new_one_replaces_it() -> None:
    events = RunConfig(data=DataConfig(source="events", path=Path("log.csv")))
    one = with_settings(events, {"samples.preset": "hybrid_1_100"})
    half = with_settings(one, {"samples.preset": "hybrid_50_50"})
    easy = with_settings(half, {"samples.preset": "easy"})
    assert [c.samples.hard_share for c in (one, half, easy)] == [0.01, 0.5, 0.0]
    assert [s.stage for s in half.samples.hard_negatives] == ["retrieved", "pre_ranked"]
    free = with_settings(half, {"samples.preset": None, "samples.hard_share": 0.05})
    assert free.samples.hard_share == 0.05
    with pytest.raises(ConfigError, match="no losers of a funnel"):
        with_settings(RunConfig(), {"samples.preset": "hybrid_50_50"})
    for other in (
        {"hard_share": 0.3},
        {"hard_share": 0.0},
        {"hard_negatives": [{"stage": "ranked"}]},
    ):
        with pytest.raises(ConfigError, match="is not what preset 'hybrid_50_50' sets"):
            SamplesConfig(preset="hybrid_50_50", **other)


@pytest.mark.parametrize(
    "settings", [{"mask_exposed": False}, {"hard_negatives": [{"stage": "exposed"}]}]
)
def test_exposed_items_are_negatives_only_for_who_insists(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"never a negative.*allow_exposed_as_negatives"):
        SamplesConfig(**settings)
    assert SamplesConfig(**settings, allow_exposed_as_negatives=True)


@pytest.mark.parametrize("name", RUN_PRESETS)
def test_presets_of_runs_go_with_the_main_job_and_with_clicks(tmp_path: Path, name: str) -> None:
    clicks = RunConfig(data={"source": "clicks", "path": "clicks.csv"})
    for base in (main_job_config(), clicks):
        config = with_settings(base, preset=name)
        assert config != base
        assert load(tmp_path, dump_config(config)) == config
        assert with_settings(config, preset=name) == config
        assert config.data.path == base.data.path


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sequence'"):
        with_settings(main_job_config(), preset="sequences")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples.in_batch": True}, "samples.in_batch.*alpha 1"),
        ({"samples.resampling": "power_law"}, "resampling_as.*'weights'"),
        ({"model.history_pooling": (), "model.use_user_id": True}, "history_pooling"),
        ({"model.correction": "streaming"}, "model.correction.*no in-batch"),
        ({"training.batch_size": 64}, "training.batch_size.*must be 402 or more"),
    ],
)
def test_what_does_not_go_with_all_positions_is_refused(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        with_settings(main_job_config(), changed, preset="sequence")


UNORDERED = {
    "data": {"source": "clicks", "path": "clicks.csv", "ordered": False},
    "samples": {"in_batch": False},
    "training": {"positions": "all", "batch_size": 32},
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples.in_batch": True}, "samples.in_batch.*alpha 1"),
        ({"samples.resampling": "power_law"}, "resampling_as.*'weights'"),
        ({"samples.preset": "mined_1_100"}, "samples.hard_share.*'one'"),
        ({"samples.mask_known_positives": False}, "mask_known_positives.*hold none of them"),
        ({"model.history_pooling": (), "model.use_user_id": True}, "history_pooling"),
        ({"model.correction": "streaming"}, "model.correction.*no in-batch"),
    ],
)
def test_what_does_not_go_with_users_as_sets_is_refused(
    changed: dict[str, Any], message: str
) -> None:
    # A batch may be shorter than any window would let it.
    config = RunConfig(**UNORDERED)
    with pytest.raises(ConfigError, match=message):
        with_settings(config, changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"history_pooling": ("attention",), "attention_heads": 3}, "must divide embedding_dim 64"),
        ({"share_item_embedding": True, "use_candidate_id": False}, "needs use_candidate_id"),
        ({"candidate_bias": True, "use_candidate_id": False}, "needs use_candidate_id"),
    ],
)
def test_towers_that_cannot_be_built_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**changed)


def test_a_file_without_a_source_is_told_which_sources_read_one() -> None:
    found = problems(DataConfig, path="clicks.csv")
    assert "'clicks', 'events' and 'ratings'" in found["source"]


def test_a_filter_goes_by_a_feature_with_values(tmp_path: Path) -> None:
    config = main_job_config()
    assert with_settings(config, {"export.filter_by": "year"}).export.filter_by == "year"
    for name in ("title", "genre"):
        with pytest.raises(
            ConfigError, match=rf"export.filter_by: got '{name}'.*data.item_features has title"
        ):
            with_settings(config, {"export.filter_by": name})
