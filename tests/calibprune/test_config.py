"""Settings: every shipped file loads, and what is wrong is told in one line."""

from pathlib import Path

import pytest

from calibprune.config import Config, parse_pattern
from calibprune.config_file import load_config
from calibprune.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: m}\noutput: runs/x\nprune: {method: {type: wanda}}\n")
    return str(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path):
    assert isinstance(load_config(str(path)), Config)


def test_there_are_the_three_promised_configurations():
    names = {path.name for path in CONFIGS}
    assert {"demo.yaml", "llama3-8b-wanda.yaml", "llama3-70b-sparsegpt.yaml"} <= names


def test_overrides_replace_what_the_file_says(minimal):
    overrides = [
        "prune.sparsity=0.7",
        "generate.prefixes.type=vocabulary",
        "generate.prefixes.tokens=3",
        "evaluate.perplexity=[{name: a, path: b}]",
        "evaluate.perplexity.0.path=c",
        "generate.seed=7",
    ]
    config = load_config(minimal, overrides)
    assert config.prune.target_sparsity == 0.7 and config.generate.seed == 7
    assert config.generate.prefixes.type == "vocabulary" and config.generate.prefixes.tokens == 3
    assert config.evaluate.perplexity[0].path == "c"


def test_a_pattern_needs_no_quotes(minimal):
    prune = load_config(minimal, ["prune.pattern=2:4"]).prune
    assert prune.n_of_m == (2, 4) and prune.target_sparsity == 0.5
    assert load_config(minimal, ["prune.pattern=1:4"]).prune.target_sparsity == 0.75


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.sparsty=0.5", r"unknown key prune\.sparsty: did you mean sparsity\?"),
        ("prune.method.blocksize=128", r"unknown key prune\.method\.blocksize: valid here: type"),
        ("prune.method=ri", r"prune\.method: there is no 'ri': did you mean ria\?"),
        ("prune.method={type: alps, rho: .inf}", "finite number"),
        ("prune.allocation={type: owl, lam: 0.6}", "less than or equal to 0.5"),
        ("prune.allocation=zzz", r"it is one of uniform, owl, alphapruning, list"),
        ("prune.method={blocksize: 64}", r"prune\.method: its type is missing"),
        ("generat.samples=5", r"unknown key generat: did you mean generate\?"),
        ("prune.sparsity=1", r"prune\.sparsity: Input should be less than 1 \(given: 1\)"),
        ("prune.sparsity=0", r"prune\.sparsity: Input should be greater than 0"),
        ("prune.pattern=4:2", r'pattern "4:2"'),
        ("prune.pattern=half", r'"N:M" such as "2:4", not "half"'),
        ("generate.samples=many", r"generate\.samples: .*\(given: 'many'\)"),
        ("prune.method.type=wanad", r"prune\.method: there is no 'wanad': did you mean wanda\?"),
        ("model={}", r"model\.path is missing"),
        ("evaluate.perplexity=[{name: a, path: b}, {name: a, path: c}]", "a name of its own"),
        ("prune", r"an override is key\.path=value"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(minimal, override, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(minimal, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["prune.pattern=2:4", "prune.sparsity=0.6"],
            "removes 0.5 of the weights, sparsity says 0.6",
        ),
        (
            ["prune.pattern=3:6", "prune.method={type: sparsegpt, blocksize: 128}"],
            r"method\.blocksize 128 is not a multiple of 6",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(minimal, overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(minimal, overrides)


@pytest.mark.parametrize("key", ["output", "model.path", "prune.pool"])
def test_credentials_in_a_url_are_refused_and_not_repeated(minimal, key):
    with pytest.raises(UserError, match="no credentials in URLs") as caught:
        load_config(minimal, [f"{key}=s3://AKIA123:hunter2@bucket/run"])
    assert "hunter2" not in str(caught.value)


def test_missing_and_broken_files_are_told(tmp_path):
    with pytest.raises(UserError, match="no configuration at"):
        load_config(str(tmp_path / "nothing.yaml"))
    (tmp_path / "broken.yaml").write_text("model: {path: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(str(tmp_path / "broken.yaml"))
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(UserError, match="model is missing"):
        load_config(str(tmp_path / "empty.yaml"))


def test_settings_cannot_be_changed_afterwards(minimal):
    config = load_config(minimal)
    with pytest.raises(ValueError, match="frozen"):
        config.prune.inputs = "dense"  # type: ignore[misc]


def test_pattern_is_kept_of_group():
    assert parse_pattern("1:4") == (1, 4)


def test_a_name_alone_stands_for_a_type_with_its_defaults(minimal):
    named = ["prune.method=dsnot", "prune.allocation=owl", "prune.refine=swaps"]
    spelt = ["prune.method.type=dsnot", "prune.allocation.type=owl", "prune.refine={type: swaps}"]
    assert load_config(minimal, named) == load_config(minimal, spelt)
    more = load_config(minimal, [*named, "prune.method.faithful=true"])
    assert more.prune.method.model_dump()["faithful"] and more.prune.method.type == "dsnot"
