"""Settings: every shipped file loads, and every error in a setting is explained in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from calibprune.config import Config
from calibprune.config.curate import CurateSettings
from calibprune.config.generate import VocabularyPrefixes
from calibprune.config.load import dump_config, load_config, presets, read_preset
from calibprune.config.prune import parse_pattern
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_what_is_written_out_reads_as_the_same(path, tmp_path):
    odd = [
        "prune.pattern=2:4",
        "prune.sparsity=null",
        "prune.layers='a$ {b}\\\\$'",
        'model.path="1e5"',
        "evaluate.perplexity=[{name: '007', path: 'null', separator: \"\\n\\t'=\"}]",
        "prune.method={type: sparsegpt, damping: 1e-5}",
    ]
    for given in ([], odd):
        config = load_config(str(path), given)
        written = tmp_path / "written.yaml"
        written.write_text(dump_config(config))
        assert load_config(str(written)) == config
    assert config.prune.pattern == "2:4" and config.prune.layers == r"a$ {b}\\$"
    assert config.evaluate.perplexity[0].separator == "\n\t'="


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
        ("model=x", r"model: this is a section, as in model\.path=\.\.\. \(given: 'x'\)"),
        ("curate.sources=[a]", r"curate\.sources\.0: this is a section"),
        ("curate.filters=length", r"curate\.filters: this is a list, as in \[a, b\] \(given"),
        (
            "generate.prefixes={type: dataset, path: p, tokens: 0}",
            r"generate\.prefixes\.tokens: Input should be greater than 0",
        ),
        ("generate.prefixes={type: dataset, path: p, tokens: many}", r"prefixes\.tokens: [^.]*$"),
        ("cluster.gpus_per_worker=4", r"uses one GPU, .* for more GPUs raise workers \(given: 4\)"),
        ("evaluate.perplexity=[{name: a, path: b}, {name: a, path: c}]", "a name of its own"),
        ("prune", r"an override is key\.path=value"),
        ("prune.sparsity=", r"^prune\.sparsity= has no value: .* prune\.sparsity=null"),
        ("preset= ", r"^preset= has no value"),
        ("prune.keep=[down_proj", r"^the value of prune\.keep=\.\.\. is not valid YAML: expected"),
        ("prune={sparsity: 0.5, sparsity: 0.6}", "sparsity is given in line 1 and again in line 1"),
        (
            "curate.filters=[" + "{type: length}, " * 64 + "]",
            r"curate\.filters: this list has 64 entries, at most 63 are possible$",
        ),
        ("curate.sources=[]", r"curate\.sources: this list has 0 entries, at least 1 is needed$"),
        (
            "output=runs/${model.path}",
            r"^output: its value holds \$\{\.\.\.\}, .* output=\$HOME/run$",
        ),
        ("evaluate.perplexity=[{name: a, path: '${b}'}]", r"perplexity: 0\.path holds \$\{"),
        (
            "generate.seed=" + "1" * 5000,
            r"generate\.seed=\.\.\. is not .*: a number of 5000 digits is",
        ),
        ("generate.seed=1e400", r"generate\.seed: Input should be a finite number"),
        ("model.path.x=1", r"model\.path: Input should be a valid string$"),
        ("prune.sparsity.x=1", r"prune\.sparsity: Input should be a valid number$"),
        ("prune..sparsity=0.5", r"an override is key\.path=value"),
        ("prune.layers='(a'", r"prune\.layers: not a regular expression: missing \), unterminated"),
        (
            "prune.keep=['a{99999999999999}']",
            r"prune\.keep\.0: not a regular expression: the repetition",
        ),
        (
            "prune.keep=['" + "(" * 5000 + "']",
            r"prune\.keep\.0: not a regular expression: it is nested",
        ),
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
            "removes 0.5 of the weights, sparsity is 0.6",
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
    with pytest.raises(UserError, match="URLs must not hold credentials") as caught:
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


def test_a_folder_is_no_configuration(tmp_path):
    with pytest.raises(UserError, match="is a folder: give the YAML file"):
        load_config(str(tmp_path))


def test_a_section_that_is_given_twice_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: m}\noutput: x\nprune: {sparsity: 0.7}\nprune: {batch_sequences: 8}\n"
    )
    with pytest.raises(UserError, match="prune is given in line 3 and again in line 4"):
        load_config(str(path))


def test_merge_keys_may_be_overridden_where_they_are_taken(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: m}\noutput: x\n"
        "evaluate:\n  perplexity:\n    - &a {name: a, path: p, column: c}\n"
        "    - &b {<<: *a, name: b}\n    - {<<: *b, name: c}\n"
    )
    texts = load_config(str(path)).evaluate.perplexity
    assert [(one.name, one.path, one.column) for one in texts] == [
        (name, "p", "c") for name in "abc"
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["evaluate.perplexity.-1.path=c"],
            "there is no entry -1: the list has 2, numbered from 0$",
        ),
        (["evaluate.perplexity.2.path=c"], "there is no entry 2: the list has 2"),
        (["evaluate.perplexity.2={name: c, path: c}"], "there is no entry 2: the list has 2"),
        (["evaluate.perplexity.first.path=c"], "there is no entry first: the list has 2"),
        (["evaluate.perplexity.0.0=c"], r"unknown key evaluate\.perplexity\.0\.0"),
        (
            ["curate.filters.0.drop_worst=0.3"],
            r"has no entries to change yet: .*curate\.filters=\[",
        ),
        (["generate.seed=3", "generate.seed.x=1"], r"generate\.seed is 3 and has no settings"),
    ],
)
def test_an_entry_that_is_not_there_cannot_be_changed(tmp_path, overrides, message):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: m}\noutput: x\n"
        "evaluate: {perplexity: [{name: a, path: a}, {name: b, path: b}]}\n"
    )
    with pytest.raises(UserError, match=message) as caught:
        load_config(str(path), overrides)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_values_are_those_of_yaml_1_2(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: 2001-01-01, trust_remote_code: no}\noutput: yes\n"
        "prune: {pattern: 2:4, method: {type: sparsegpt, damping: 1e-3}}\n"
    )
    config = load_config(str(path), ["generate.samples=1e3"])
    assert (config.model.path, config.output) == ("2001-01-01", "yes")
    assert config.model.trust_remote_code is False and config.prune.n_of_m == (2, 4)
    assert getattr(config.prune.method, "damping", None) == 1e-3
    assert config.generate.samples == 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: " + "1" * 5000, "line 1: a number of 5000 digits"),
        ("model: {path: m}\noutput: runs/${x}\n", r"output holds \$\{"),
        ("[" * 2000, "nested too deeply"),
        ("- a\n- b\n", "it holds no sections"),
        ("a: &a [x]\nb: *c\n", "line 2: found undefined alias 'c'"),
        ("model: {path: m}\n  output: x\n", "line 2: "),
        ("a: [" + "1, " * 100_001 + "]", "holds more than 100,000 values"),
        ("# " + "x" * (1 << 20), "has more than 1,048,576 bytes"),
        ("a: \x07", "special characters are not allowed"),
        ("a: 1\n---\na: 2\n", "another document"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_config(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_configuration_may_come_through_a_pipe(minimal):
    ends = os.pipe()
    os.write(ends[1], Path(minimal).read_bytes())
    os.close(ends[1])
    try:
        assert load_config(f"/dev/fd/{ends[0]}") == load_config(minimal)
    finally:
        os.close(ends[0])
    reading = "from calibprune.config.load import load_config; load_config('/dev/stdin')"
    command = [sys.executable, "-c", reading]
    subprocess.run(command, text=True, check=True, input=Path(minimal).read_text())
    with Path(minimal).open() as file:
        subprocess.run(command, text=True, check=True, stdin=file)


def test_a_mistake_is_told_without_the_import_of_torch(minimal):
    reading = (
        "import sys\nfrom calibprune.config.load import load_config\n"
        f"try: load_config({minimal!r}, ['prune.sparsty=0.5'])\n"
        "except Exception as error: print(type(error).__name__, {'torch', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", reading], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "UserError set()"


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


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_says_what_it_is(minimal, name):
    required = ["generate.prefixes.path=tasks.jsonl"] if name == "tasks" else []
    config = load_config(minimal, [f"preset={name}", *required])
    assert (config.curate.sequences, config.curate.sequence_tokens) == (128, 2048)
    assert 20 < len(presets()[name]) < 130
    assert set(read_preset(name)) == {"generate", "curate"}


def test_the_presets_are_those_of_the_papers(minimal):
    assert list(presets()) == ["bos", "ji2025", "ji2025-llama3", "tasks", "unbiased"]
    paper = load_config(minimal, ["preset=ji2025"])
    assert paper.generate.prefixes.model_dump() == {
        "type": "dataset", "path": "wikimedia/wikipedia", "dataset_name": "20231101.en",
        "split": "train", "column": "text", "tokens": 2, "bos": True,
    }  # fmt: skip
    sampling = {"temperature", "top_p", "top_k", "repetition_penalty", "samples", "max_tokens"}
    assert paper.generate.model_dump(include=sampling) == {
        "temperature": 0.6, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.2,
        "samples": 5000, "max_tokens": 2048,
    }  # fmt: skip
    (perplexity,) = paper.curate.filters
    assert (perplexity.type, perplexity.drop_worst) == ("perplexity", 0.2)
    llama = load_config(minimal, ["preset=ji2025-llama3"]).generate
    assert (llama.prefixes.tokens, llama.temperature, llama.repetition_penalty) == (64, 0.8, 1.1)
    assert load_config(minimal, ["preset=unbiased"]) == load_config(minimal)


def test_own_settings_win_over_the_preset_and_overrides_over_all(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "preset: ji2025\nmodel: {path: m}\noutput: x\n"
        "generate: {samples: 7, top_k: 9, prefixes: {tokens: 5}}\n"
    )
    config = load_config(str(path), ["generate.samples=8", "generate.prefixes.bos=false"])
    generate = config.generate
    assert (generate.samples, generate.top_k, generate.top_p) == (8, 9, 0.95)
    prefixes = generate.prefixes
    assert (prefixes.path, prefixes.tokens, prefixes.bos) == ("wikimedia/wikipedia", 5, False)
    other = load_config(str(path), ["preset=ji2025-llama3"]).generate
    assert (other.repetition_penalty, other.prefixes.tokens, other.top_k) == (1.1, 5, 9)


@pytest.mark.parametrize(
    "overrides",
    [
        ["generate.prefixes=vocabulary"],
        ["generate.prefixes.type=vocabulary"],
        ["generate.prefixes={type: vocabulary}"],
        ["generate.prefixes=vocabulary", "generate.prefixes.tokens=1"],
    ],
)
def test_another_type_takes_the_place_of_the_presets(minimal, overrides):
    generate = load_config(minimal, ["preset=ji2025", *overrides]).generate
    assert generate.prefixes == VocabularyPrefixes(type="vocabulary")
    assert generate.temperature == 0.6


def test_the_same_type_keeps_what_the_preset_says_of_it(minimal):
    named = load_config(minimal, ["preset=ji2025", "generate.prefixes=dataset"])
    spelt = load_config(minimal, ["preset=ji2025", "generate.prefixes={type: dataset, bos: true}"])
    assert named == spelt == load_config(minimal, ["preset=ji2025"])


def test_an_entry_of_a_presets_list_can_be_changed(minimal):
    config = load_config(minimal, ["preset=ji2025", "curate.filters.0.drop_worst=0.3"])
    assert [f.drop_worst for f in config.curate.filters] == [0.3]
    assert load_config(minimal, ["preset=ji2025", "curate.filters=[]"]).curate.filters == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["preset=ji2052"], r"there is no preset 'ji2052': did you mean ji2025\?"),
        (["preset=zzz"], r"there is no preset 'zzz': there are bos, ji2025,"),
        (["preset.x=1"], r"^preset is a name and has no settings of its own, as in preset=bos$"),
        (["preset={x: 1}"], r"preset is a name and has no settings"),
        (["prset=bos"], r"unknown key prset: did you mean preset\?"),
        (
            ["preset=tasks"],
            r"generate\.prefixes\.path is missing: the preset tasks leaves it to you, as in "
            r"generate\.prefixes\.path=",
        ),
        (["preset=tasks", "model={}"], r"model\.path is missing$"),
        (["preset=ji2025", "generate.prefixes.tokns=3"], r"did you mean tokens\?"),
    ],
)
def test_what_is_wrong_with_a_preset_is_told_in_one_line(minimal, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(minimal, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("again", ["x/generate", "x/generate/", "./x/generate", "x//generate"])
def test_the_same_samples_cannot_be_two_sources(again):
    sources = [
        {"type": "generated", "name": name, "path": path}
        for name, path in (("a", "x/generate"), ("b", again))
    ]
    with pytest.raises(ValueError, match="two generated sources take the same samples"):
        CurateSettings.model_validate({"sources": sources})
