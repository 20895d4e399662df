"""Configs: file and overrides in, frozen dataclasses out, and back; every user mistake gets one clear line."""

import dataclasses
import tomllib
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfusion.config import from_dict, load_config, to_dict, to_toml


@dataclass(frozen=True)
class Optim:
    lr: float = 3e-4
    warmup_steps: int = 4000
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        if self.lr < 0:
            raise ValueError(f"lr must not be negative, got {self.lr}")


@dataclass(frozen=True)
class Source:
    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Run:
    name: str = "toy"
    steps: int = 10
    compile: bool = False
    sizes: tuple[int, ...] = (32,)
    tags: tuple[str, ...] = ()
    limit: int | None = 7
    note: str | None = None
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-2))
    sources: tuple[Source, ...] = ()
    teacher: Optim | None = None
    shares: dict[str, float] = field(default_factory=dict)


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "tiny.toml"
        path.write_text(text)
        return path

    return write


def test_file_fills_nested_dataclasses_and_overrides_win(toml):
    path = toml('name = "a"\nsizes = 64\n[optim]\nlr = 1\n[shares]\ntext = 1\n[[sources]]\npath = "x"\n')
    run = load_config(Run, path, ["optim.lr=2e-3", "optim.betas=0.8,0.9"])
    assert run.name == "a" and run.sizes == (64,) and run.shares == {"text": 1.0}
    assert run.optim == Optim(lr=2e-3, betas=(0.8, 0.9)) and run.sources == (Source("x"),)
    assert type(load_config(Run, path).optim.lr) is float


def test_no_file_means_the_defaults():
    assert load_config(Run) == Run()


@pytest.mark.parametrize(
    "override, name, value",
    [
        ("name=2024", "name", "2024"),
        ("name='a,b'", "name", "a,b"),
        ("name=hello, world = 1", "name", "hello, world = 1"),
        ("name=", "name", ""),
        ("sizes=64,128", "sizes", (64, 128)),
        ("sizes=[64, 128]", "sizes", (64, 128)),
        ("sizes=", "sizes", ()),
        ("tags=a,2", "tags", ("a", "2")),
        ("compile=true", "compile", True),
        ("limit=none", "limit", None),
        ("limit=3", "limit", 3),
        ("note=5", "note", "5"),
        ("teacher.lr=1", "teacher", Optim(lr=1.0)),
        ("optim={lr=0.5}", "optim", Optim(lr=0.5)),
        ("shares.text=1", "shares", {"text": 1.0}),
    ],
)
def test_override_is_read_by_the_type_of_its_field(override, name, value):
    assert getattr(load_config(Run, None, [override]), name) == value


def test_partial_table_keeps_the_outer_default_of_what_it_leaves_out():
    assert load_config(Run, None, ["optim.warmup_steps=5"]).optim == Optim(lr=1e-2, warmup_steps=5)


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.warmup=1", "unknown key optim.warmup: did you mean optim.warmup_steps?"),
        ("nam=1", "unknown key nam: did you mean name?"),
        ("lr=1", "unknown key lr: did you mean optim.lr or teacher.lr?"),
        ("optim.zzz=1", "unknown key optim.zzz: valid in optim are lr, warmup_steps, betas"),
        ("steps=1.5", "steps must be int, got 1.5"),
        ("steps=true", "steps must be int, got True"),
        ("steps=many", "steps must be int, got 'many'"),
        ("optim.lr=fast", "optim.lr must be float, got 'fast'"),
        ("compile=1", "compile must be bool, got 1"),
        ("sizes=64,big", "sizes[1] must be int, got 'big'"),
        ("optim.betas=0.9", "optim.betas must be tuple[float, float], got ['0.9']"),
        ("optim=3", "optim must be a table (Optim), got 3"),
        ("shares.text=x", "shares.text must be float, got 'x'"),
        ("sources=[{weight=1.0}]", "sources[0].path is missing: set it to a str in the file or by sources[0].path=..."),
        ("optim.lr=-1", "optim: lr must not be negative, got -1.0"),
        ("optim.lr", "override 'optim.lr' is not of the form a.b=value, such as optim.lr=1e-3"),
        (".lr=1", "override '.lr=1' is not of the form a.b=value, such as optim.lr=1e-3"),
    ],
)
def test_mistake_gets_one_line_with_its_full_name(override, message):
    with pytest.raises(ValueError) as error:
        load_config(Run, None, [override])
    assert str(error.value) == message


def test_error_of_a_class_that_names_its_place_is_not_named_twice():
    @dataclass(frozen=True)
    class Train:
        steps: int = 1

        def __post_init__(self):
            if self.steps < 1:
                raise ValueError(f"train.steps = {self.steps}: it must be at least 1")

    @dataclass(frozen=True)
    class Outer:
        train: Train = Train()

    with pytest.raises(ValueError, match=r"^train.steps = 0: it must be at least 1$"):
        load_config(Outer, None, ["train.steps=0"])


def test_override_inside_a_plain_value_is_refused():
    with pytest.raises(ValueError, match="steps is a value, it has no names inside"):
        load_config(Run, None, ["steps=1", "steps.x=2"])


def test_string_in_a_file_is_not_split_at_its_commas(toml):
    assert load_config(Run, toml('tags = "a,b"')).tags == ("a,b",)


def test_missing_file_names_the_nearest_ones(toml, tmp_path):
    toml("")
    (tmp_path / "other.toml").write_text("")
    with pytest.raises(ValueError, match=r"no config file .*tinny.toml: .* has tiny.toml, other.toml$"):
        load_config(Run, tmp_path / "tinny.toml")
    with pytest.raises(ValueError, match=r"has other.toml, tiny.toml$"):
        load_config(Run, tmp_path / "qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq")
    with pytest.raises(ValueError, match="there is no folder"):
        load_config(Run, tmp_path / "nowhere" / "tiny.toml")


@pytest.mark.parametrize("text, line", [("steps = 1\nname = oops\n", 2), ("steps = 1\n\nsizes = [1,\n", 3)])
def test_syntax_error_names_its_line(toml, text, line):
    with pytest.raises(ValueError, match=f"tiny.toml is not valid TOML: .*line {line}") as error:
        load_config(Run, toml(text))
    assert "\n" not in str(error.value)


def test_file_that_is_not_text_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(ValueError, match="is not a text file in UTF-8"):
        load_config(Run, tmp_path / "a.toml")


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
floats = st.floats(allow_nan=False)
optims = st.builds(Optim, lr=st.floats(0), warmup_steps=st.integers(), betas=st.tuples(floats, floats))
runs = st.builds(
    Run,
    name=text,
    steps=st.integers(),
    compile=st.booleans(),
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    tags=st.lists(text, max_size=3).map(tuple),
    limit=st.none() | st.integers(),
    note=st.none() | text.filter(lambda s: s != "none"),  # the one string that an optional field cannot hold
    optim=optims,
    sources=st.lists(st.builds(Source, path=text, weight=floats), max_size=2).map(tuple),
    teacher=st.none() | optims,
    shares=st.dictionaries(text, floats, max_size=3),
)


@given(runs)
def test_config_survives_toml_and_dict(run):
    assert from_dict(Run, tomllib.loads(to_toml(run))) == run
    assert from_dict(Run, to_dict(run)) == run


def test_dict_form_has_only_json_types():
    assert to_dict(Run(optim=Optim(lr=1.0)))["optim"] == {"lr": 1.0, "warmup_steps": 4000, "betas": [0.9, 0.95]}
    assert dataclasses.is_dataclass(from_dict(Run, to_dict(Run())).optim)
